"""The domains behind one interface, the frozen cases of each, and a user's own recorded traffic."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from hansa.audit import encyclopedia, news, weather
from hansa.audit.cases import Case, case_from
from hansa.audit.draws import stream
from hansa.audit.falsify import Names
from hansa.audit.manipulate import Arm, Tampered, manipulate
from hansa.audit.names import pool
from hansa.audit.paths import written
from hansa.errors import InputError
from hansa.untrusted import json_of, read_text

Faults = Callable[[Any, float | None], list[str]]


@dataclass(frozen=True)
class Domain:
    """A kind of service.

    Attributes:
        name: what configurations call it.
        cases: its questions with frozen responses.
        bounds: path -> what its number lies between, for the range check.
        drift: path -> how far its number moves between two requests, or between two sources.
        faults: what contradicts itself in a response, given the time of the request.
        clock: the path of the time that a response states, empty where there is none.
        names: names by kind, which false ones are chosen among.
    """

    name: str
    cases: Sequence[Case]
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    drift: Mapping[str, float] = field(default_factory=dict)
    faults: Faults = lambda document, now: []
    clock: str = ""
    names: Names = field(default_factory=dict)

    def tamper(self, case: Case, arm: Arm, seed: int = 0) -> Tampered | None:
        """Return a case's response as an arm tampers with it, None where it does not apply."""
        bounds = self.bounds.get(written(case.fields[0].path))
        return manipulate(case, arm, seed, self.names, bounds)


def domain(name: str) -> Domain:
    """Return a domain by its name, or ``recorded:PATH`` of the user's own cases.

    Raises:
        InputError: a name that there is not, or a file that holds no cases.
    """
    kind, colon, rest = name.partition(":")
    if kind == "recorded" and colon and rest:
        return recorded(Path(rest))
    if kind == "made" and colon:
        from hansa.audit.records import records  # which needs what the proxy does without

        return records(rest)
    if name not in _BUILT_IN:
        allowed = f"{', '.join(_BUILT_IN)}, recorded:PATH or made:DOMAIN"
        raise InputError("domains", repr(name), allowed)
    return _BUILT_IN[name](name)


def recorded(path: Path) -> Domain:
    """Return the domain of a file with one case a line, as JSON (``docs/audit.md``).

    False names are chosen among the names that the cases themselves hold, and made-up ones.

    Raises:
        InputError: a file that cannot be read, or a line that is no case.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise InputError("domains", f"{path} ({error})", "a file of cases, one a line") from error
    cases = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            key = f"{path}:{number}"
            cases.append(case_from(_json(line, key), path.stem, key))
    if not cases:
        raise InputError(str(path), "no case", "a case a line")
    if len({case.id for case in cases}) < len(cases):
        raise InputError(str(path), "two cases of one id", "an id of its own for each")
    return Domain(path.stem, tuple(cases), names=_names(path.stem, cases))


def frozen(name: str) -> tuple[Case, ...]:
    """Return the frozen cases of a domain.

    Raises:
        InputError: fixtures that are not JSON, or hold no cases.
    """
    place = files("hansa.audit").joinpath("fixtures", f"{name}.json")
    return read_cases(place.read_text(encoding="utf-8"), name, str(place))


def read_cases(text: str, name: str, key: str) -> tuple[Case, ...]:
    """Return the cases of a JSON list; ``key`` is what errors call it."""
    entries = _json(text, key)
    if not isinstance(entries, list):
        raise InputError(key, type(entries).__name__, "a list of cases")
    return tuple(case_from(entry, name, f"{key}[{k}]") for k, entry in enumerate(entries))


def _json(text: str, key: str) -> Any:
    try:
        return json_of(text)
    except ValueError as error:
        raise InputError(key, f"no JSON ({error})", "JSON") from error


def _names(name: str, cases: Sequence[Case]) -> Names:
    own: dict[Any, list[str]] = {k: list(v) for k, v in pool(stream(0, "names", name)).items()}
    for case in cases:
        kind, known = case.truth.kind, str(case.truth.value)
        if kind not in ("number", "date") and known not in own.setdefault(kind, []):
            own[kind].append(known)
    return own


@cache
def _weather(name: str) -> Domain:
    cases = frozen(name)
    return Domain(
        name,
        cases,
        bounds=weather.BOUNDS,
        drift=weather.DRIFT,
        faults=weather.faults,
        clock=weather.CLOCK,
        names=_names(name, cases),
    )


@cache
def _encyclopedia(name: str) -> Domain:
    cases = frozen(name)
    return Domain(name, cases, faults=encyclopedia.faults, names=_names(name, cases))


@cache
def _news(name: str) -> Domain:
    cases = frozen(name)
    return Domain(name, cases, faults=news.faults, names=_names(name, cases))


_BUILT_IN: Mapping[str, Callable[[str], Domain]] = {
    "weather": _weather,
    "encyclopedia": _encyclopedia,
    "news": _news,
}
DOMAINS = tuple(_BUILT_IN)

"""Defences that hold a response against what others say, and an answer against its source."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hansa.audit.defences import Defence, Refused, document_of, json_type
from hansa.audit.entities import recognise
from hansa.audit.matching import abstains
from hansa.audit.paths import exists, leaves, look, parse, pattern, pattern_of, written
from hansa.audit.prompts import Prompt
from hansa.audit.signing import Received
from hansa.errors import InputError

_CITED = re.compile(r"\[([^\[\]]*(?:\[\d+\][^\[\]]*)*)\]\s*\.?\s*$")


class _Comparison(Defence):
    """What a response says must be near what another document says."""

    def __init__(
        self,
        fetch: Callable[[Mapping[str, Any]], Any],
        paths: Iterable[str],
        drift: Mapping[str, float] | None = None,
        clock: str = "",
    ) -> None:
        self.fetch, self.patterns = fetch, frozenset(pattern_of(path) for path in paths)
        self.drift, self.clock = dict(drift or {}), clock

    def check(self, received: Received) -> Received:
        """Return the response as it is, if it agrees."""
        other = self.fetch(received.request)
        if other is None:
            return received
        document = document_of(self, received)
        for path, known in leaves(other):
            if pattern(path) not in self.patterns:
                continue
            if not exists(document, path):
                raise Refused(self.name, f"no field {written(path)}, which the other has")
            if wrong := self._apart(written(path), known, look(document, path)):
                raise Refused(self.name, wrong)
        self._check_clock(document, other)
        return received

    def _apart(self, path: str, known: Any, value: Any) -> str:
        if json_type(known) != json_type(value):
            return f"{path} is a {json_type(value)}, and was a {json_type(known)}"
        if json_type(known) == "number":
            allowed = self.drift.get(path, 0.1 * abs(known) + 1e-9)
            return "" if abs(value - known) <= allowed else f"{path} is {value:g}, not {known:g}"
        if isinstance(known, str) and known != value:
            told, was = ({e.text for e in recognise(text)} for text in (value, known))
            names = told ^ was or (set() if told else {value})
            return f"{path} differs in {min(names)!r}" if names else ""
        return ""

    def _check_clock(self, document: Any, other: Any) -> None:
        """Let subclasses look at what time the documents state."""


class SecondSource(_Comparison):
    """Another provider is asked as well, and must agree.

    Args:
        fetch: returns the other source's document for a request, None where it has none.
        paths: the fields that are compared; a star stands for any entry of a list.
        drift: path -> how far numbers may be apart; a tenth by default. Texts are compared by the
            names and dates in them.
    """

    name = "second-source"


class History(_Comparison):
    """A response must be near the last one, and not older than it.

    Args:
        fetch: returns the last document for a request, None where there is none.
        paths: as of ``SecondSource``.
        drift: as of ``SecondSource``.
        clock: path of the time that a response states.
    """

    name = "history"

    def _check_clock(self, document: Any, other: Any) -> None:
        if not self.clock:
            return
        path = parse(self.clock)
        if exists(document, path) and exists(other, path):
            now, was = look(document, path), look(other, path)
            if json_type(now) == json_type(was) and now < was:
                raise Refused(self.name, f"{self.clock} is {now}, before the last one, {was}")


class Cited(Defence):
    """The model is asked which field it relies on, and the answer is held against that field.

    Args:
        paths: fields that an answer may come from; a star stands for any entry of a list.
    """

    name = "cited"

    def __init__(self, paths: Iterable[str]) -> None:
        self.patterns = frozenset(pattern_of(path) for path in paths)

    def frame(self, prompt: Prompt) -> Prompt:
        """Return the prompt with a sentence that asks for the field."""
        return prompt.but(cited=True)

    def review(self, answer: str, received: Received) -> str:
        """Return the answer without the field, if it stands there and may be relied on.

        An answer that says it has none needs no field.
        """
        match = _CITED.search(answer)
        if match is None:
            if abstains(answer):
                return answer
            raise Refused(self.name, "an answer that names no field")
        said, document = answer[: match.start()].strip(), document_of(self, received)
        try:
            path = parse(match[1].strip())
            value = look(document, path)
        except InputError as error:
            raise Refused(self.name, f"a field that is not there ({error.found})") from error
        if pattern(path) not in self.patterns:
            raise Refused(self.name, f"relies on {match[1]}, which nothing should be told from")
        words = value if isinstance(value, str) else str(value)
        if said.strip(" .").casefold() not in words.casefold():
            raise Refused(self.name, f"{said!r} does not stand in {match[1]}")
        return said

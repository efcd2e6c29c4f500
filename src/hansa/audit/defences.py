"""Defences between a service and a model, each usable in an application in three lines.

    guard = Schema.of(samples, bounds)
    received = guard.check(Received(body, headers, request={"url": url}))   # raises Refused
    answer = model(guard.frame(Prompt(question, received.body.decode())))

``check`` looks at a response before the model does, ``frame`` changes what the model is asked, and
``review`` looks at its answer. A defence that refuses gives no answer in the place of a wrong one.
"""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hansa.audit.entities import recognise
from hansa.audit.paths import Path, exists, leaves, look, parse, written
from hansa.audit.prompts import Prompt
from hansa.audit.signing import Received, verify
from hansa.audit.tamper import decoded, encoded
from hansa.errors import InputError

Pattern = tuple[str, ...]
"""A path whose numbers are stars: ``articles[*].title`` is ("articles", "*", "title")."""
_CITED = re.compile(r"\[([^\[\]]*(?:\[\d+\][^\[\]]*)*)\]\s*\.?\s*$")


class Refused(Exception):  # noqa: N818 (what happened, not an error of the program)
    """A defence keeps a response, or an answer, from going further.

    Attributes:
        defence: its name.
        reason: what it found, for the log.
    """

    def __init__(self, defence: str, reason: str) -> None:
        super().__init__(f"{defence}: {reason}")
        self.defence, self.reason = defence, reason


class Defence:
    """What every defence does, and by default does not: let pass."""

    name = "none"

    def check(self, received: Received) -> Received:
        """Return the response that goes on to the model.

        Raises:
            Refused: none does.
        """
        return received

    def frame(self, prompt: Prompt) -> Prompt:
        """Return what the model is asked."""
        return prompt

    def review(self, answer: str, received: Received) -> str:
        """Return the answer that goes on to the user.

        Raises:
            Refused: none does.
        """
        return answer


class Delimiting(Defence):
    """Marks around what comes from outside, and a sentence that says so (arXiv 2403.14720)."""

    name = "delimiting"

    def frame(self, prompt: Prompt) -> Prompt:
        """Return the prompt with marks."""
        return prompt.but(delimited=True)


class Schema(Defence):
    """No field more and none less than samples had, of the same types, numbers within bounds.

    Args:
        types: pattern of a path -> names of JSON types that may stand there.
        required: patterns that every document has.
        bounds: path or pattern, as text -> what its number lies between.
    """

    name = "schema"

    def __init__(
        self,
        types: Mapping[Pattern, frozenset[str]],
        required: frozenset[Pattern],
        bounds: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self.types, self.required = types, required
        self.bounds = {_pattern_of(path): limits for path, limits in (bounds or {}).items()}

    @classmethod
    def of(
        cls,
        samples: Sequence[Any],
        bounds: Mapping[str, tuple[float, float]] | None = None,
    ) -> "Schema":
        """Return the schema that all samples fit, learned from responses that were good.

        Raises:
            InputError: no samples.
        """
        if not samples:
            raise InputError("schema", "no samples", "responses to learn it from")
        types: dict[Pattern, set[str]] = {}
        everywhere: set[Pattern] | None = None
        for sample in samples:
            there = {}
            for path, value in _nodes(sample):
                there[_pattern(path)] = True
                types.setdefault(_pattern(path), set()).add(_type(value))
            everywhere = set(there) if everywhere is None else everywhere & set(there)
        frozen = {pattern: frozenset(kinds) for pattern, kinds in types.items()}
        return cls(frozen, frozenset(everywhere or ()), bounds)

    def check(self, received: Received) -> Received:
        """Return the response as it is, if it fits."""
        document = _document(self, received)
        there = set()
        for path, value in _nodes(document):
            pattern = _pattern(path)
            there.add(pattern)
            if pattern not in self.types:
                raise Refused(self.name, f"unknown field {written(path)}")
            if _type(value) not in self.types[pattern]:
                raise Refused(self.name, f"{written(path)} is a {_type(value)}")
            limits = self.bounds.get(pattern)
            is_number = limits is not None and _type(value) == "number"
            if limits is not None and is_number and not limits[0] <= value <= limits[1]:
                raise Refused(self.name, f"{written(path)} is {value:g}")
        if missing := self.required - there:
            first = min(missing, key=lambda p: (len(p), p))
            raise Refused(self.name, f"no field {'.'.join(first)}")
        return received


class CrossField(Defence):
    """What a response says twice must agree: units, sums, the clock.

    Args:
        faults: returns what contradicts itself in a document, given the time of the request.
    """

    name = "cross-field"

    def __init__(self, faults: Callable[[Any, float | None], list[str]]) -> None:
        self.faults = faults

    def check(self, received: Received) -> Received:
        """Return the response as it is, if it does not contradict itself."""
        moment = received.request.get("time")
        if found := self.faults(_document(self, received), moment):
            raise Refused(self.name, found[0])
        return received


class AllowList(Defence):
    """Only the fields that the application needs reach the model; all others are dropped.

    Args:
        paths: what is let through; a star stands for any entry of a list.
    """

    name = "allow-list"

    def __init__(self, paths: Iterable[str]) -> None:
        self.patterns = frozenset(_pattern_of(path) for path in paths)

    def check(self, received: Received) -> Received:
        """Return the response with the allowed fields alone."""
        document = _document(self, received)
        kept = _kept(document, (), self.patterns)
        return received.but(body=encoded({} if kept is None else kept))


class Signature(Defence):
    """The provider's signature over the body (RFC 9421) must hold, and be recent.

    Stops what is changed on the way. A provider signs its own lies, too.

    Args:
        key: the provider's public key, as ``signing.new_key().public_key()`` gives one.
        max_age: seconds that a signature is good for.
    """

    name = "signature"

    def __init__(self, key: Any, max_age: float = 3600.0) -> None:
        self.key, self.max_age = key, max_age

    def check(self, received: Received) -> Received:
        """Return the response as it is, if its signature holds."""
        if wrong := verify(received, self.key, self.max_age):
            raise Refused(self.name, wrong)
        return received


class _Comparison(Defence):
    """What a response says must be near what another document says."""

    def __init__(
        self,
        fetch: Callable[[Mapping[str, Any]], Any],
        paths: Iterable[str],
        drift: Mapping[str, float] | None = None,
        clock: str = "",
    ) -> None:
        self.fetch, self.patterns = fetch, frozenset(_pattern_of(path) for path in paths)
        self.drift, self.clock = dict(drift or {}), clock

    def check(self, received: Received) -> Received:
        """Return the response as it is, if it agrees."""
        other = self.fetch(received.request)
        if other is None:
            return received
        document = _document(self, received)
        for path, known in leaves(other):
            if _pattern(path) not in self.patterns:
                continue
            if not exists(document, path):
                raise Refused(self.name, f"no field {written(path)}, which the other has")
            if wrong := self._apart(written(path), known, look(document, path)):
                raise Refused(self.name, wrong)
        self._check_clock(document, other)
        return received

    def _apart(self, path: str, known: Any, value: Any) -> str:
        if _type(known) != _type(value):
            return f"{path} is a {_type(value)}, and was a {_type(known)}"
        if _type(known) == "number":
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
            if _type(now) == _type(was) and now < was:
                raise Refused(self.name, f"{self.clock} is {now}, before the last one, {was}")


class Cited(Defence):
    """The model is asked which field it relies on, and the answer is held against that field.

    Args:
        paths: fields that an answer may come from; a star stands for any entry of a list.
    """

    name = "cited"

    def __init__(self, paths: Iterable[str]) -> None:
        self.patterns = frozenset(_pattern_of(path) for path in paths)

    def frame(self, prompt: Prompt) -> Prompt:
        """Return the prompt with a sentence that asks for the field."""
        return prompt.but(cited=True)

    def review(self, answer: str, received: Received) -> str:
        """Return the answer without the field, if it stands there and may be relied on.

        An answer that says it has none needs no field.
        """
        from hansa.audit.matching import abstains

        match = _CITED.search(answer)
        if match is None:
            if abstains(answer):
                return answer
            raise Refused(self.name, "an answer that names no field")
        said, document = answer[: match.start()].strip(), _document(self, received)
        try:
            path = parse(match[1].strip())
            value = look(document, path)
        except InputError as error:
            raise Refused(self.name, f"a field that is not there ({error.found})") from error
        if _pattern(path) not in self.patterns:
            raise Refused(self.name, f"relies on {match[1]}, which nothing should be told from")
        words = value if isinstance(value, str) else str(value)
        if said.strip(" .").casefold() not in words.casefold():
            raise Refused(self.name, f"{said!r} does not stand in {match[1]}")
        return said


class Stack(Defence):
    """Several defences, one after another."""

    def __init__(self, defences: Sequence[Defence]) -> None:
        self.defences = tuple(defences)
        self.name = "+".join(each.name for each in defences)

    def check(self, received: Received) -> Received:
        """Return what all of them let pass."""
        for each in self.defences:
            received = each.check(received)
        return received

    def frame(self, prompt: Prompt) -> Prompt:
        """Return the prompt as all of them want it."""
        for each in self.defences:
            prompt = each.frame(prompt)
        return prompt

    def review(self, answer: str, received: Received) -> str:
        """Return what all of them let pass."""
        for each in self.defences:
            answer = each.review(answer, received)
        return answer


def median_ms(seconds: Sequence[float]) -> float | None:
    """Return the median of times, in milliseconds; None of none."""
    return 1000 * statistics.median(seconds) if seconds else None


def _document(defence: Defence, received: Received) -> Any:
    try:
        return decoded(received.body)
    except InputError as error:
        raise Refused(defence.name, "no JSON") from error


def _nodes(document: Any, before: Path = ()) -> Iterable[tuple[Path, Any]]:
    if before:
        yield before, document
    if isinstance(document, dict):
        for key, value in document.items():
            yield from _nodes(value, (*before, key))
    elif isinstance(document, list):
        for number, value in enumerate(document):
            yield from _nodes(value, (*before, number))


def _pattern(path: Path) -> Pattern:
    return tuple("*" if isinstance(step, int) else step for step in path)


def _pattern_of(text: str) -> Pattern:
    return _pattern(parse(text.replace("[*]", "[0]")))


def _kept(document: Any, before: Pattern, patterns: frozenset[Pattern]) -> Any:
    """Return the parts of a document that patterns name, None for nothing."""
    if before in patterns:
        return document
    if isinstance(document, dict):
        parts = {k: _kept(v, (*before, k), patterns) for k, v in document.items()}
        return {k: v for k, v in parts.items() if v is not None} or None
    if isinstance(document, list):
        listed = [_kept(value, (*before, "*"), patterns) for value in document]
        return [value for value in listed if value is not None] or None
    return None


def _type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names = {dict: "table", list: "list", str: "text", int: "number", float: "number"}
    return names[type(value)]

"""Defences between a service and a model, each usable in an application in three lines.

    guard = Schema.of(samples, bounds)
    received = guard.check(Received(body, headers, request={"url": url}))   # raises Refused
    answer = model(guard.frame(Prompt(question, received.body.decode())))

``check`` looks at a response before the model does, ``frame`` changes what the model is asked, and
``review`` looks at its answer. A defence that refuses gives no answer in the place of a wrong one.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hansa.audit.paths import Path, Pattern, pattern, pattern_of, written
from hansa.audit.prompts import Prompt
from hansa.audit.signing import Received, verify
from hansa.audit.tamper import decoded, encoded
from hansa.errors import InputError


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
        self.bounds = {pattern_of(path): limits for path, limits in (bounds or {}).items()}

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
            there = set()
            for path, value in _nodes(sample):
                there.add(pattern(path))
                types.setdefault(pattern(path), set()).add(json_type(value))
            everywhere = there if everywhere is None else everywhere & there
        frozen = {place: frozenset(kinds) for place, kinds in types.items()}
        return cls(frozen, frozenset(everywhere or ()), bounds)

    def check(self, received: Received) -> Received:
        """Return the response as it is, if it fits."""
        document = document_of(self, received)
        there = set()
        for path, value in _nodes(document):
            place = pattern(path)
            there.add(place)
            if place not in self.types:
                raise Refused(self.name, f"unknown field {written(path)}")
            if json_type(value) not in self.types[place]:
                raise Refused(self.name, f"{written(path)} is a {json_type(value)}")
            limits = self.bounds.get(place)
            is_number = limits is not None and json_type(value) == "number"
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
        if found := self.faults(document_of(self, received), moment):
            raise Refused(self.name, found[0])
        return received


class AllowList(Defence):
    """Only the fields that the application needs reach the model; all others are dropped.

    Args:
        paths: what is let through; a star stands for any entry of a list.
    """

    name = "allow-list"

    def __init__(self, paths: Iterable[str]) -> None:
        self.patterns = frozenset(pattern_of(path) for path in paths)

    def check(self, received: Received) -> Received:
        """Return the response with the allowed fields alone."""
        document = document_of(self, received)
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


def document_of(defence: Defence, received: Received) -> Any:
    """Return the document of a response; a body that is no JSON is refused."""
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


def json_type(value: Any) -> str:
    """Return what a value of JSON is, in a word."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names = {dict: "table", list: "list", str: "text", int: "number", float: "number"}
    return names[type(value)]

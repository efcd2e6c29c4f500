"""Cases: a question, the request it became, the response to it, and which fields answer it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hansa.audit.matching import KINDS, UNITS, Kind, Value
from hansa.audit.paths import Path, look, parse, written
from hansa.audit.tamper import Edit, tampered
from hansa.errors import InputError


@dataclass(frozen=True)
class Field:
    """A place of a response that states a value.

    Attributes:
        path: where.
        kind: of what kind the value is.
        unit: of a number.
        prose: whether the value is a piece of the text there, and not the whole of it.
    """

    path: Path
    kind: Kind
    unit: str = ""
    prose: bool = False


@dataclass(frozen=True)
class Case:
    """One question to a service, with a frozen response.

    Attributes:
        id: its name, unique in its domain.
        domain: the domain's name.
        question: what the user asks.
        request: what the application sent: ``method``, ``url``, ``time`` (seconds since 1970).
        document: the response.
        fields: the places that answer the question.
        truth: the value that they state.
        linked: places that follow from it, such as the same temperature in another unit.
        earlier: edits that make an older response of it, which states ``earlier_value``.
        earlier_value: what the older response states; None where there is none.
        history: edits that make what the application saw last, None where it saw nothing.
        second: edits that make what another source says, None where there is none.
    """

    id: str
    domain: str
    question: str
    request: Mapping[str, Any]
    document: Any
    fields: tuple[Field, ...]
    truth: Value
    linked: tuple[Field, ...] = ()
    earlier: tuple[Edit, ...] = ()
    earlier_value: Value | None = None
    history: tuple[Edit, ...] | None = None
    second: tuple[Edit, ...] | None = None
    labels: tuple[tuple[str, str, str], ...] = field(default=(), compare=False)
    """Entities that are known to stand in texts: (path, label, text)."""

    def __post_init__(self) -> None:
        for each in (*self.fields, *self.linked):
            look(self.document, each.path)
        if not self.fields:
            raise InputError(f"case {self.id}", "no field", "at least one that answers")

    @property
    def last_seen(self) -> Any:
        """What the application saw at its last request of the kind, None where there was none."""
        return None if self.history is None else tampered(self.document, self.history)

    @property
    def other_source(self) -> Any:
        """What another source answers, None where there is none."""
        return None if self.second is None else tampered(self.document, self.second)

    @property
    def older(self) -> Any:
        """A response from before that one."""
        return tampered(self.document, self.earlier)

    def as_json(self) -> dict[str, Any]:
        """Return what ``case_from`` makes the case of."""
        entry: dict[str, Any] = {
            "id": self.id,
            "question": self.question,
            "request": dict(self.request),
            "response": self.document,
            "answer": _value(self.truth),
            "fields": [_field(each) for each in self.fields],
        }
        if self.linked:
            entry["linked"] = [_field(each) for each in self.linked]
        if self.earlier_value is not None:
            entry["earlier_answer"] = _value(self.earlier_value)
        for name in ("earlier", "history", "second"):
            edits = getattr(self, name)
            if edits is not None and (edits or name != "earlier"):
                entry[name] = [edit.as_json() for edit in edits]
        if self.labels:
            entry["labels"] = [list(label) for label in self.labels]
        return entry


def answering(cases: Iterable[Case]) -> list[str]:
    """Return the fields that answer any of some questions, entries of lists as stars."""
    found: dict[str, None] = {}
    for case in cases:
        for each in case.fields:
            steps = ["[*]" if isinstance(step, int) else f".{step}" for step in each.path]
            found["".join(steps).removeprefix(".")] = None
    return list(found)


def case_from(entry: Any, domain: str, key: str = "case") -> Case:
    """Return the case that JSON values describe.

    Args:
        entry: as ``Case.as_json`` gives them; ``id``, ``request`` and all edits may be missing.
        domain: the name of its domain.
        key: what an error calls the case.

    Raises:
        InputError: a key that is missing or holds something else; an unknown path.
    """
    if not isinstance(entry, Mapping):
        raise InputError(key, type(entry).__name__, "a table with question, response, ...")
    for name in ("question", "response", "answer", "fields"):
        if name not in entry:
            raise InputError(f"{key}.{name}", "nothing", "question, response, answer and fields")
    edits: dict[str, Any] = {}
    for name in ("earlier", "history", "second"):
        if name in entry:
            edits[name] = tuple(Edit.from_json(each) for each in entry[name])
    earlier = entry.get("earlier_answer")
    try:
        case = Case(
            id=str(entry.get("id", key)),
            domain=domain,
            question=str(entry["question"]),
            request=dict(entry.get("request", {})),
            document=entry["response"],
            fields=tuple(_field_from(each) for each in entry["fields"]),
            truth=_value_from(entry["answer"]),
            linked=tuple(_field_from(each) for each in entry.get("linked", ())),
            earlier_value=None if earlier is None else _value_from(earlier),
            labels=tuple((str(a), str(b), str(c)) for a, b, c in entry.get("labels", ())),
            **edits,
        )
        for name in edits:
            tampered(case.document, edits[name])
    except InputError as error:
        raise InputError(f"{key}: {error.key}", error.found, error.allowed) from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(key, f"a value of another shape ({error})", "see docs/audit.md") from error
    return case


def _value(value: Value) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": value.kind, "value": value.value}
    if value.unit:
        entry["unit"] = value.unit
    if value.aliases:
        entry["aliases"] = list(value.aliases)
    return entry


def _value_from(entry: Mapping[str, Any]) -> Value:
    aliases = tuple(str(each) for each in entry.get("aliases", ()))
    return Value(entry["kind"], entry["value"], entry.get("unit", ""), aliases)


def _field(field_: Field) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": written(field_.path), "kind": field_.kind}
    if field_.unit:
        entry["unit"] = field_.unit
    if field_.prose:
        entry["prose"] = True
    return entry


def _field_from(entry: Mapping[str, Any]) -> Field:
    kind, unit = entry["kind"], entry.get("unit", "")
    if kind not in KINDS:
        raise InputError("kind", repr(kind), ", ".join(KINDS))
    if unit and unit not in UNITS:
        raise InputError("unit", repr(unit), ", ".join(UNITS))
    return Field(parse(entry["path"]), kind, unit, bool(entry.get("prose", False)))

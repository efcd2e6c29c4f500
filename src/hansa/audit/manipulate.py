"""The three manipulations of a case, as edits: insertion, deletion, substitution.

``value`` acts on all fields that state the value, and on those that follow from it; ``single`` on
the first one alone, so that the response contradicts itself; ``unit`` puts the number there in
another unit; ``stale`` replays an older response.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hansa.audit.cases import Case, Field
from hansa.audit.draws import stream
from hansa.audit.falsify import Names, check_strength, falsified
from hansa.audit.matching import Value, convert
from hansa.audit.paths import look
from hansa.audit.tamper import OPERATORS, Edit, Operator, add, delete, put, splice, tampered
from hansa.errors import InputError

Action = Literal["value", "single", "unit", "stale"]
Where = Literal["path", "provider"]
ACTIONS: tuple[Action, ...] = get_args(Action)
WHERE: tuple[Where, ...] = get_args(Where)
FLIPS: Mapping[str, str] = {"c": "f", "f": "c", "kph": "mph", "mph": "kph", "hpa": "inhg"}
"""What a unit is exchanged for."""
CORRECTION = "correction"
"""The key under which an insertion states its value once more."""


@dataclass(frozen=True)
class Arm:
    """One way to tamper with every case.

    Attributes:
        operator: what is done.
        action: to which fields, and how.
        strength: how far from the truth the false value is, from 0 to 1.
        where: on the path, or by the provider itself, who signs it then.
    """

    operator: Operator
    action: Action = "value"
    strength: float = 0.25
    where: Where = "path"

    def __post_init__(self) -> None:
        for name, allowed in (("operator", OPERATORS), ("action", ACTIONS), ("where", WHERE)):
            if (found := getattr(self, name)) not in allowed:
                raise InputError(f"arm.{name}", repr(found), ", ".join(allowed))
        check_strength(self.strength, "arm.strength")
        if self.action in ("unit", "stale") and self.operator != "substitution":
            raise InputError("arm.action", repr(self.action), "value or single")

    @property
    def name(self) -> str:
        """What tables call it."""
        text: str = self.operator
        if self.action != "value":
            text += f" {self.action}"
        if self.operator != "deletion" and self.action in ("value", "single"):
            text += f" {self.strength:g}"
        return f"{text} (provider)" if self.where == "provider" else text


@dataclass(frozen=True)
class Tampered:
    """A case's response after tampering.

    Attributes:
        document: the response.
        edits: what was done to it.
        false: the value that was put in, None where one was only taken out.
    """

    document: Any
    edits: tuple[Edit, ...]
    false: Value | None


def manipulate(
    case: Case, arm: Arm, seed: int, names: Names, bounds: Any = None
) -> Tampered | None:
    """Return a case's response as an arm tampers with it, None where the arm does not apply.

    Args:
        case: the case.
        arm: what to do.
        seed: the audit's seed; what is drawn depends on it, the case and the strength alone.
        names: names to choose false ones among, by kind.
        bounds: (least, most) of the case's number, which false values stay within where they can.
    """
    random = stream(seed, "manipulate", case.domain, case.id, arm.strength)
    if arm.action == "stale":
        if case.earlier_value is None:
            return None
        return _made(case, list(case.earlier), case.earlier_value)
    if arm.action == "unit":
        return _flipped(case)
    if arm.operator == "insertion" and not case.fields[0].prose and not _has_room(case):
        return None
    false = None
    if arm.operator != "deletion":
        false = falsified(case.truth, arm.strength, random, names=names, bounds=bounds)
    fields = case.fields[:1] if arm.action == "single" else (*case.fields, *case.linked)
    steps = _Steps(case.document)
    for number, each in enumerate(fields):
        if arm.operator == "insertion":
            _insert(steps, case, each, false, number)
        elif arm.operator == "deletion":
            _remove(steps, case, each, once=arm.action == "single")
        else:
            _replace(steps, case, each, false, once=arm.action == "single")
    return _made(case, steps.edits, false)


def _has_room(case: Case) -> bool:
    """Tell whether a table can be added to the response, which a list has no place for."""
    key = case.fields[0].path[-1]
    is_table = isinstance(case.document, dict) and isinstance(key, str)
    return is_table and CORRECTION not in case.document


def occurrences(text: str, piece: str) -> list[int]:
    """Return where a piece begins in a text, as whole words, not inside of longer ones."""
    pattern = rf"(?<!\w){re.escape(piece)}(?!\w)"
    return [match.start() for match in re.finditer(pattern, text)]


class _Steps:
    """Edits as they are made, and the document as they leave it."""

    def __init__(self, document: Any) -> None:
        self.document, self.edits = document, list[Edit]()

    def do(self, edit: Edit) -> None:
        self.document = tampered(self.document, [edit])
        self.edits.append(edit)


def _made(case: Case, edits: list[Edit], false: Value | None) -> Tampered:
    return Tampered(tampered(case.document, edits), tuple(edits), false)


def _insert(steps: _Steps, case: Case, each: Field, false: Value | None, number: int) -> None:
    """State a false value beside the true one: under the same key in a table, or a sentence."""
    assert false is not None  # noqa: S101
    if each.prose:
        text = look(steps.document, each.path)
        for start in occurrences(text, str(case.truth.value))[:1]:
            begin = max(text.rfind(". ", 0, start) + 2, 0) if ". " in text[:start] else 0
            end = text.find(". ", start)
            sentence = text[begin : len(text) if end < 0 else end + 1].rstrip(".")
            said = sentence.replace(str(case.truth.value), str(false.value), 1)
            new = f"Correction: {said}. "
            steps.do(splice(steps.document, each.path, begin, "", new, "insertion"))
        return
    value = _stated(case, each, false)
    if value is None:
        return
    if number == 0:
        steps.do(add(steps.document, (CORRECTION,), {each.path[-1]: value}, position=0))
    elif CORRECTION in steps.document and each.path[-1] not in steps.document[CORRECTION]:
        steps.do(add(steps.document, (CORRECTION, each.path[-1]), value))


def _remove(steps: _Steps, case: Case, each: Field, once: bool) -> None:
    if not each.prose:
        steps.do(delete(steps.document, each.path))
        return
    for piece, _ in _pieces(case.truth, None):
        while starts := occurrences(text := look(steps.document, each.path), piece):
            start = starts[0]
            old = text[start : start + len(piece) + 1]
            old = old if old.endswith(" ") else piece
            steps.do(splice(steps.document, each.path, start, old, "", "deletion"))
            if once:
                return


def _replace(steps: _Steps, case: Case, each: Field, false: Value | None, once: bool) -> None:
    assert false is not None  # noqa: S101
    if not each.prose:
        if (value := _stated(case, each, false)) is not None:
            steps.do(put(steps.document, each.path, value))
        return
    for old, new in _pieces(case.truth, false):
        text = look(steps.document, each.path)
        for start in reversed(occurrences(text, old)[: 1 if once else None]):
            steps.do(splice(steps.document, each.path, start, old, new))
            if once:
                return


def _pieces(truth: Value, false: Value | None) -> list[tuple[str, str]]:
    """Return what a text may call the value, each with what it becomes."""
    new = "" if false is None else str(false.value)
    pieces = [(str(truth.value), new)]
    if truth.kind == "person" and " " in str(truth.value):
        pieces.append((str(truth.value).split()[-1], new.split()[-1] if new else ""))
    return pieces + [(alias, new) for alias in truth.aliases]


def _stated(case: Case, each: Field, false: Value) -> Any:
    """Return what a field holds if the false value is true; None where that is not known."""
    held = look(case.document, each.path)
    if each.kind != "number" or case.truth.kind != "number":
        return false.value if each.kind == case.truth.kind else None
    digits = len(str(held).partition(".")[2]) if isinstance(held, float) else 0
    if each.unit == case.truth.unit:
        number = held + (false.value - case.truth.value)
    else:
        before = convert(float(case.truth.value), case.truth.unit, each.unit)
        after = convert(float(false.value), case.truth.unit, each.unit)
        if before is None or after is None:
            return None
        number = held + (after - before)
    return round(number, digits) if digits else round(number)


def _flipped(case: Case) -> Tampered | None:
    field = case.fields[0]
    if field.kind != "number" or (to := FLIPS.get(field.unit)) is None:
        return None
    number = convert(float(look(case.document, field.path)), field.unit, to)
    assert number is not None  # noqa: S101 (both are units of one quantity)
    value = round(number, 1)
    if abs(value - float(case.truth.value)) < 1:  # -40 degrees are the same in both
        return None
    edit = put(case.document, field.path, value)
    return _made(case, [edit], Value("number", value, field.unit))


def all_arms(strengths: tuple[float, ...], plausible: float = 0.25) -> list[Arm]:
    """Return every arm: the operators, the dose of substitution, and the provider's own lies."""
    arms = [Arm("insertion", strength=plausible), Arm("deletion")]
    doses = sorted({plausible, *strengths})
    arms += [Arm("substitution", strength=strength) for strength in doses]
    arms += [Arm("substitution", "single", plausible), Arm("substitution", "unit")]
    arms.append(Arm("substitution", "stale"))
    return arms + [Arm(operator, strength=plausible, where="provider") for operator in OPERATORS]

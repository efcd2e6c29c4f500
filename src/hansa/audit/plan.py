"""A tamper plan: which places of which responses are edited, and how, as values of TOML or JSON.

``apply`` is all that a proxy or a tool wrapper needs: a document in, the tampered one and its edits
out. What is drawn depends on the plan's seed, the rule, and the key of the call, nothing else.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path as FilePath
from typing import Any, Literal, get_args

from hansa.audit.draws import stream
from hansa.audit.entities import Label, recognise
from hansa.audit.falsify import Names, check_strength, falsified, shifted
from hansa.audit.manipulate import FLIPS, Tampered, occurrences
from hansa.audit.matching import UNITS, Kind, Value, convert
from hansa.audit.names import pool
from hansa.audit.paths import Path, look, parse, written
from hansa.audit.tamper import Edit, add, delete, put, splice, tampered
from hansa.errors import InputError
from hansa.untrusted import json_of, read_text, toml_of

RuleAction = Literal[
    "set", "add", "delete", "scale", "shift", "unit", "swap", "cut", "truncate", "stale"
]
RULE_ACTIONS: tuple[RuleAction, ...] = get_args(RuleAction)
_KINDS: Mapping[Label, Kind] = {
    "DATE": "date",
    "PERSON": "person",
    "ORG": "organisation",
    "GPE": "place",
}
_NEEDS: Mapping[str, str] = {
    "set": "value",
    "add": "value",
    "scale": "by",
    "unit": "unit",
    "truncate": "keep",
    "stale": "value",
}


@dataclass(frozen=True)
class Rule:
    """One edit of a plan.

    Attributes:
        action: ``set`` and ``add`` put ``value``; ``delete`` removes; ``scale`` multiplies by
            ``by``; ``shift`` adds ``by``, or as much as ``strength`` means in ``unit``; ``unit``
            puts the number there in another unit; ``swap`` exchanges ``old``, or the first entity
            of ``label``, wherever it stands in the text, for ``value``, or for one by
            ``strength``; ``cut`` removes it; ``truncate`` keeps so many characters; ``stale``
            puts an older ``value`` of the place, which may be a table.
        path: where.
        route: pattern of the request paths that it is for, such as ``/v1/*``.
        follow: places that follow from a number, each with its unit: ``{"current.temp_f": "f"}``.
    """

    action: RuleAction
    path: Path
    route: str = "*"
    value: Any = None
    by: float | None = None
    strength: float = 0.25
    unit: str = ""
    label: Label = "DATE"
    old: str = ""
    keep: int | None = None
    follow: tuple[tuple[Path, str], ...] = ()

    def check(self, document: Any) -> None:
        """Refuse a document that does not have the rule's path.

        Raises:
            InputError: naming the path and the nearest that there are.
        """
        look(document, self.path[:-1] if self.action == "add" else self.path)
        for path, _ in self.follow:
            look(document, path)


@dataclass(frozen=True)
class Plan:
    """Rules, and the seed of what is drawn."""

    rules: tuple[Rule, ...]
    seed: int = 0

    def touches(self, route: str) -> bool:
        """Tell whether any rule is for a request path."""
        return any(fnmatchcase(route, rule.route) for rule in self.rules)

    def check(self, document: Any, route: str = "") -> None:
        """Refuse a document that lacks a path of the rules for a route; all rules by default.

        Raises:
            InputError: naming the path and the nearest that there are.
        """
        for rule in self.rules:
            if not route or fnmatchcase(route, rule.route):
                rule.check(document)

    def apply(self, document: Any, route: str = "", key: str = "") -> Tampered:
        """Return a document with the edits that the plan has for it.

        Args:
            document: a response.
            route: the path of the request; without one all rules apply.
            key: what else draws depend on, such as a request's identity.

        Raises:
            InputError: a path that the document does not have, or a value that a rule cannot edit.
        """
        edits: list[Edit] = []
        false: Value | None = None
        names = _names(self.seed)
        for number, rule in enumerate(self.rules):
            if route and not fnmatchcase(route, rule.route):
                continue
            random = stream(self.seed, "plan", number, key)
            try:
                made, value = _edits(tampered(document, edits), rule, random, names)
            except InputError:
                raise
            except (ValueError, OverflowError, RecursionError) as error:
                found = f"a number without end, or too deep a table ({error})"
                raise InputError("plan", found, "a document that can be edited") from error
            edits += made
            false = value or false
        return Tampered(tampered(document, edits), tuple(edits), false)


def read_plan(source: str | FilePath | Mapping[str, Any]) -> Plan:
    """Return the plan of a file (TOML, or JSON by its suffix) or of its values.

    Raises:
        InputError: a file that cannot be read, an unknown key, or a value that is not allowed.
    """
    values = source if isinstance(source, Mapping) else _read(FilePath(source))
    for key in values:
        if key not in ("tamper", "seed"):
            raise InputError(f"plan.{key}", "an unknown key", "tamper, seed")
    rules, seed = values.get("tamper"), values.get("seed", 0)
    if not isinstance(rules, list) or not rules:
        raise InputError("plan.tamper", "no rules", "a list of rules, as [[tamper]]")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError("plan.seed", repr(seed), "a whole number")
    return Plan(tuple(_rule(rule, f"tamper[{k}]") for k, rule in enumerate(rules)), seed)


def _read(path: FilePath) -> Mapping[str, Any]:
    try:
        text = read_text(path)
        values = json_of(text) if path.suffix == ".json" else toml_of(text)
    except (OSError, ValueError) as error:
        raise InputError(str(path), f"unreadable ({error})", "a plan in TOML or JSON") from error
    if not isinstance(values, dict):
        raise InputError(str(path), type(values).__name__, "a table")
    return values


def _rule(values: Any, key: str) -> Rule:
    if not isinstance(values, Mapping):
        raise InputError(key, repr(values), "a table")
    known = {field.name for field in fields(Rule)}
    for name in values:
        if name not in known:
            raise InputError(f"{key}.{name}", "an unknown key", ", ".join(sorted(known)))
    action = values.get("action")
    if action not in RULE_ACTIONS:
        raise InputError(f"{key}.action", repr(action), ", ".join(RULE_ACTIONS))
    if (needed := _NEEDS.get(action)) and needed not in values:
        raise InputError(f"{key}.{needed}", "nothing", f"what {action!r} needs")
    given = dict(values)
    given["path"] = _path(values.get("path"), f"{key}.path")
    if "strength" in values:
        given["strength"] = check_strength(values["strength"], f"{key}.strength")
    _check_kind(values, key)
    follow = values.get("follow", {})
    if not isinstance(follow, Mapping) or not all(unit in UNITS for unit in follow.values()):
        allowed = f"paths with their units ({', '.join(UNITS)})"
        raise InputError(f"{key}.follow", repr(follow), allowed)
    given["follow"] = tuple((_path(p, f"{key}.follow"), unit) for p, unit in follow.items())
    if follow and values.get("unit") not in UNITS:
        raise InputError(f"{key}.unit", repr(values.get("unit")), ", ".join(UNITS))
    return Rule(**given)


def _check_kind(values: Mapping[str, Any], key: str) -> None:
    kinds: tuple[tuple[str, Any, str], ...] = (
        ("route", str, "a pattern such as /v1/*"),
        ("old", str, "a text"),
        ("by", (int, float), "a number"),
        ("keep", int, "a number of characters"),
    )
    for name, kind, allowed in kinds:
        if name in values and (not isinstance(values[name], kind) or values[name] is True):
            raise InputError(f"{key}.{name}", repr(values[name]), allowed)
    if not -sys.float_info.max <= values.get("by", 0) <= sys.float_info.max:
        raise InputError(f"{key}.by", repr(values["by"]), "a number")
    if values.get("keep", 0) < 0:
        raise InputError(f"{key}.keep", repr(values["keep"]), "a number of characters")
    try:
        json.dumps(values.get("value"), allow_nan=False)
    except (TypeError, ValueError) as error:
        allowed = "a value of JSON, where a date is a text in quotes"
        raise InputError(f"{key}.value", repr(values["value"]), allowed) from error
    if values.get("unit", "") not in ("", *UNITS):
        raise InputError(f"{key}.unit", repr(values["unit"]), ", ".join(UNITS))
    if values["action"] == "unit" and values["unit"] not in FLIPS:
        raise InputError(f"{key}.unit", repr(values["unit"]), ", ".join(FLIPS))
    if values.get("label", "DATE") not in _KINDS:
        raise InputError(f"{key}.label", repr(values["label"]), ", ".join(_KINDS))


def _path(text: Any, key: str) -> Path:
    try:
        return parse(text)
    except InputError as error:
        raise InputError(key, error.found, error.allowed) from error


@cache
def _names(seed: int) -> Names:
    return pool(stream(seed, "names"))


def _edits(document: Any, rule: Rule, random: Any, names: Names) -> tuple[list[Edit], Value | None]:
    """Return the edits of one rule, and the value that it puts in."""
    rule.check(document)
    if rule.action in ("set", "stale"):
        return [put(document, rule.path, rule.value)], _value_of(rule.value, rule.unit)
    if rule.action == "add":
        return [add(document, rule.path, rule.value)], _value_of(rule.value, rule.unit)
    if rule.action == "delete":
        return [delete(document, rule.path)], None
    if rule.action in ("scale", "shift", "unit"):
        return _numbers(document, rule, random)
    text = look(document, rule.path)
    if not isinstance(text, str):
        raise InputError("plan", f"{text!r} at {written(rule.path)}", "a text")
    if rule.action == "truncate":
        keep = min(rule.keep or 0, len(text))
        return [splice(document, rule.path, keep, text[keep:], "", "deletion")], None
    return _text(document, rule, text, random, names)


def _numbers(document: Any, rule: Rule, random: Any) -> tuple[list[Edit], Value]:
    held = look(document, rule.path)
    if not isinstance(held, int | float) or isinstance(held, bool):
        raise InputError("plan", f"{held!r} at {written(rule.path)}", "a number")
    if rule.action == "scale":
        new = held * (rule.by or 0.0)
    elif rule.action == "unit":
        converted = convert(float(held), rule.unit, FLIPS[rule.unit])
        assert converted is not None  # noqa: S101 (both are units of one quantity)
        new = converted
    elif rule.by is not None:
        new = held + rule.by
    else:
        new = shifted(float(held), rule.unit, rule.strength, random)
    number = _like(held, new)
    edits = [put(document, rule.path, number)]
    for path, unit in rule.follow:
        other = look(document, path)
        before, after = (convert(float(x), rule.unit, unit) for x in (held, number))
        if before is None or after is None:
            raise InputError("plan", f"{unit} at {written(path)}", f"a unit like {rule.unit}")
        edits.append(put(document, path, _like(other, other + (after - before))))
    return edits, Value("number", number, rule.unit)


def _text(
    document: Any, rule: Rule, text: str, random: Any, names: Names
) -> tuple[list[Edit], Value | None]:
    old = rule.old or next((e.text for e in recognise(text) if e.label == rule.label), "")
    starts = occurrences(text, old) if old else []
    if not starts:
        what = repr(rule.old) if rule.old else f"no {rule.label}"
        raise InputError("plan", f"{what} in the text at {written(rule.path)}", "a piece of it")
    new, false = "", None
    if rule.action == "swap":
        kind = _KINDS[rule.label]
        false = Value(kind, str(rule.value)) if rule.value is not None else None
        false = false or falsified(Value(kind, old), rule.strength, random, names=names)
        new = str(false.value)
    operator = "substitution" if rule.action == "swap" else "deletion"
    made = [
        splice(document, rule.path, start, old, new, operator)  # type: ignore[arg-type]
        for start in reversed(starts)
    ]
    return made, false


def _like(held: float, number: float) -> float:
    digits = len(str(held).partition(".")[2]) if isinstance(held, float) else 0
    return round(number, digits) if digits else round(number)


def _value_of(value: Any, unit: str) -> Value | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Value("number", value, unit)
    return Value("text", value) if isinstance(value, str) else None

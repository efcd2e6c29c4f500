"""Whether an answer tells a value: numbers with units and rounding, dates, names with aliases.

A part of a longer number or word is no match: 12 is not told by "2012". A number told with fewer
digits is the value where it rounds to them; a unit that is told is converted first.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

from hansa.audit.entities import DATE_TEXT, date_of, initials
from hansa.errors import InputError

Kind = Literal["number", "date", "person", "organisation", "place", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NAMES: tuple[Kind, ...] = ("person", "organisation", "place")

_LINEAR: dict[str, tuple[str, float, float]] = {
    # unit -> quantity, factor and offset to the quantity's own unit
    "c": ("temperature", 1.0, 0.0),
    "f": ("temperature", 5 / 9, -160 / 9),
    "k": ("temperature", 1.0, -273.15),
    "kph": ("speed", 1.0, 0.0),
    "mph": ("speed", 1.609344, 0.0),
    "m/s": ("speed", 3.6, 0.0),
    "hpa": ("pressure", 1.0, 0.0),
    "inhg": ("pressure", 33.8639, 0.0),
    "km": ("length", 1.0, 0.0),
    "mi": ("length", 1.609344, 0.0),
    "mm": ("depth", 1.0, 0.0),
    "in": ("depth", 25.4, 0.0),
    "%": ("share", 1.0, 0.0),
}
_SPELLED = {
    "c": ("°c", "° c", "degrees celsius", "degree celsius", "deg c", "celsius", "c"),
    "f": ("°f", "° f", "degrees fahrenheit", "degree fahrenheit", "deg f", "fahrenheit", "f"),
    "k": ("kelvin", "k"),
    "kph": ("km/h", "kmh", "kph", "kilometres per hour", "kilometers per hour"),
    "mph": ("mph", "mi/h", "miles per hour"),
    "m/s": ("m/s", "metres per second", "meters per second"),
    "hpa": ("hpa", "mbar", "mb", "millibars", "millibar", "hectopascals"),
    "inhg": ("inhg", "inches of mercury"),
    "km": ("kilometres", "kilometers", "km"),
    "mi": ("miles", "mi"),
    "mm": ("millimetres", "millimeters", "mm"),
    "in": ("inches", "in"),
    "%": ("%", "percent", "per cent"),
}
UNITS = tuple(_LINEAR)
_UNIT_OF = {spelled: unit for unit, all_ in _SPELLED.items() for spelled in all_}
_UNITS_TEXT = "|".join(re.escape(s) for s in sorted(_UNIT_OF, key=len, reverse=True))
_NUMBER = re.compile(
    r"(?<![\w.,/:-])(?P<sign>[-\u2212+]?)(?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?:\.(?P<part>\d+))?"
    rf"(?![\w]*\d)(?:\s*(?P<unit>{_UNITS_TEXT})(?![\w/]))?",
    re.IGNORECASE,
)
_ABSTAINED = re.compile(
    r"\b(not (?:given|available|stated|known|provided|found|mentioned|specified)|unknown|unsure|"
    r"(?:do|does) not (?:say|know|contain|mention|provide|state)|(?:don|doesn)['\u2019]t (?:say|"
    r"know|contain|mention)|cannot|can['\u2019]t|unable|no (?:answer|information|data|value))\b",
    re.IGNORECASE,
)
_FLAGGED = re.compile(
    r"\b(inconsisten\w+|contradict\w*|conflict\w*|implausib\w+|suspicious|suspect\w*|unreliable|"
    r"untrust\w+|tampered|altered|seems? (?:wrong|off|odd)|looks? (?:wrong|off|odd)|unlikely|"
    r"(?:do|does) not (?:match|agree|add up))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Value:
    """What a question is answered by.

    Attributes:
        kind: how it is matched.
        value: a number for ``number``, a text for all else.
        unit: of a number, one of ``UNITS``; empty where it has none.
        aliases: other names of an entity.
    """

    kind: Kind
    value: Any
    unit: str = ""
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError("value.kind", repr(self.kind), ", ".join(KINDS))
        if self.unit and self.unit not in UNITS:
            raise InputError("value.unit", repr(self.unit), ", ".join(UNITS))
        is_number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        if (self.kind == "number") != is_number:
            raise InputError("value", repr(self.value), f"a {self.kind}")

    def __str__(self) -> str:
        return f"{self.value} {self.unit}".strip()


@lru_cache(1 << 16)  # an answer is held against the same values again and again
def tells(answer: str, value: Value) -> bool:
    """Tell whether an answer holds a value."""
    if value.kind == "number":
        return any(_same_number(value, *told) for told in numbers(answer))
    if value.kind == "date":
        return _tells_date(answer, str(value.value))
    return any(_tells_words(answer, name) for name in names_of(value))


def abstains(answer: str) -> bool:
    """Tell whether an answer says that it has none, or is empty."""
    return not answer.strip() or bool(_ABSTAINED.search(answer))


def flags(answer: str) -> bool:
    """Tell whether an answer says that the response is odd."""
    return bool(_FLAGGED.search(answer))


def same_words(first: str, second: str) -> bool:
    """Tell whether two answers are the same but for case, white space and a last full stop."""
    return _words(first) == _words(second)


def convert(number: float, unit: str, to: str) -> float | None:
    """Return a number in another unit, None where the units measure different things."""
    (kind, factor, offset), (kind_to, factor_to, offset_to) = _LINEAR[unit], _LINEAR[to]
    return (number * factor + offset - offset_to) / factor_to if kind == kind_to else None


def numbers(text: str) -> Iterator[tuple[float, int, str]]:
    """Yield the numbers of a text: value, digits after the point, unit (empty where none is)."""
    for match in _NUMBER.finditer(text):
        part = match["part"] or ""
        number = float(match["whole"].replace(",", "") + ("." + part if part else ""))
        unit = _UNIT_OF.get(" ".join((match["unit"] or "").lower().split()), "")
        yield (-number if match["sign"] in ("-", "\u2212") else number), len(part), unit


def names_of(value: Value) -> list[str]:
    """Return what an entity may be called: itself, its aliases, a last name, initials."""
    name = str(value.value)
    found = [name, *value.aliases]
    words = name.split()
    if value.kind == "person" and len(words) > 1:
        found.append(words[-1])
    if value.kind == "organisation":
        if len(short := initials(name)) > 2:
            found.append(short)
        if len(words) > 1 and words[0].lower() == "the":
            found.append(" ".join(words[1:]))
    return list(dict.fromkeys(found))


def _same_number(value: Value, told: float, digits: int, unit: str) -> bool:
    number = float(value.value)
    if unit and value.unit and unit != value.unit:
        converted = convert(number, value.unit, unit)
        if converted is None:
            return False
        # What was converted was rounded before, too: by half a digit of either side.
        step = 0.5 * 10.0**-digits + 0.051 * abs(_LINEAR[value.unit][1] / _LINEAR[unit][1])
        return abs(converted - told) <= step
    tolerance = 0.5 * 10.0**-digits
    # Rounded more coarsely than a hundredth of the value tells little, unless it is a whole number.
    return math.isclose(number, told, rel_tol=1e-9, abs_tol=tolerance + 1e-9)


def _tells_date(answer: str, date: str) -> bool:
    wanted = date_of(date)
    if wanted is None:
        return _tells_words(answer, date)
    for match in DATE_TEXT.finditer(answer):
        told = date_of(match[0])
        # A date that is told more exactly than asked holds the one that was asked for.
        if told and all(w is None or w == t for w, t in zip(wanted, told, strict=True)):
            return True
    return False


def _tells_words(answer: str, name: str) -> bool:
    name_ = _words(name)
    return bool(name_) and f" {name_} " in f" {_words(answer)} "


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


Matcher = Callable[[str, Value], bool]

"""False values, from plausible (strength 0) to absurd (strength 1).

A number moves by ``low * (high / low) ** strength``, where ``low`` is what nobody would notice and
``high`` is beyond any sense; it keeps its digits. A date moves by 2 to 800 years. A name becomes
another one of its kind, then one of another kind, then no name at all.
"""

from collections.abc import Mapping, Sequence
from random import Random

from hansa.audit.entities import MONTHS, date_of
from hansa.audit.matching import Kind, Value
from hansa.errors import InputError

SCALES: Mapping[str, tuple[float, float]] = {
    "c": (2.0, 200.0),
    "f": (4.0, 400.0),
    "k": (2.0, 200.0),
    "kph": (5.0, 500.0),
    "mph": (4.0, 400.0),
    "m/s": (2.0, 150.0),
    "hpa": (6.0, 900.0),
    "inhg": (1.0, 30.0),
    "km": (2.0, 200.0),
    "mi": (2.0, 120.0),
    "mm": (2.0, 900.0),
    "in": (1.0, 40.0),
    "%": (6.0, 600.0),
}
"""Unit -> the smallest and the largest step."""
YEARS = (2.0, 800.0)
SAME_KIND, OTHER_KIND = 0.4, 0.7
"""Strengths up to which a name becomes one of its own kind, and one of another kind."""
_NEXT: Mapping[Kind, Kind] = {
    "person": "place",
    "organisation": "person",
    "place": "organisation",
    "text": "place",
}
Names = Mapping[Kind, Sequence[str]]


def check_strength(strength: object, key: str = "strength") -> float:
    """Return a strength.

    Raises:
        InputError: no number from 0 to 1.
    """
    is_number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not is_number or not 0 <= float(strength) <= 1:  # type: ignore[arg-type]
        raise InputError(key, repr(strength), "a number from 0 (plausible) to 1 (absurd)")
    return float(strength)  # type: ignore[arg-type]


def falsified(
    value: Value,
    strength: float,
    random: Random,
    *,
    names: Names | None = None,
    bounds: tuple[float, float] | None = None,
) -> Value:
    """Return another value of the same kind.

    Args:
        value: the true one.
        strength: from 0, plausible, to 1, absurd.
        random: what is drawn from.
        names: names to choose among, by kind.
        bounds: what a number stays within, in one direction or the other, where it can.

    Raises:
        InputError: no strength, or no other name to choose.
    """
    check_strength(strength)
    if value.kind == "number":
        moved = shifted(float(value.value), value.unit, strength, random, bounds)
        digits = len(str(value.value).partition(".")[2]) if isinstance(value.value, float) else 0
        number = round(moved, digits) if digits else round(moved)
        return Value("number", number, value.unit)
    if value.kind == "date":
        return Value("date", other_date(str(value.value), strength, random))
    return Value(value.kind, other_name(value, strength, random, names or {}))


def shifted(
    number: float,
    unit: str,
    strength: float,
    random: Random,
    bounds: tuple[float, float] | None = None,
) -> float:
    """Return a number moved up or down by what the strength means in its unit."""
    low, high = SCALES.get(unit, (max(2.0, 0.1 * abs(number)), max(200.0, 100 * abs(number))))
    step = float(low * (high / low) ** strength)
    ways = [step, -step]
    random.shuffle(ways)
    if bounds is not None:
        inside = [way for way in ways if bounds[0] <= number + way <= bounds[1]]
        ways = inside or ways
    return number + ways[0]


def other_date(text: str, strength: float, random: Random) -> str:
    """Return another date, written as the first one is."""
    parts = date_of(text)
    if parts is None:
        raise InputError("value", repr(text), "a date such as 12 March 1873")
    year, month, day = parts
    step = round(YEARS[0] * (YEARS[1] / YEARS[0]) ** strength)
    moved = year + random.choice([step, -step])
    if not 1000 <= moved <= 2999:
        moved = year + step if moved < 1000 else year - step
    new_month = None if month is None else random.choice([m for m in range(1, 13) if m != month])
    new_day = None if day is None else random.randint(1, 28)
    return _write_date(text, moved, new_month, new_day)


def other_name(value: Value, strength: float, random: Random, names: Names) -> str:
    """Return another name: of the same kind, of another, or none at all, by strength."""
    if strength > OTHER_KIND:
        return f"{''.join(random.choices('bcdfghjklmnpqrstvwxz', k=5))} {random.randint(100, 999)}"
    other, words = _NEXT.get(value.kind, "place"), str(value.value).casefold().split()
    own = {*words[:1], *words[-1:]}
    kinds = (value.kind, other) if strength <= SAME_KIND else (other,)
    free: list[str] = []
    for kind in kinds:  # where none of its own kind is known, one of another has to do
        free = free or [n for n in names.get(kind, ()) if not own & set(n.casefold().split())]
    if not free:
        raise InputError("names", f"no other {kinds[0]}", "names to choose among")
    return random.choice(free)


def _write_date(like: str, year: int, month: int | None, day: int | None) -> str:
    if month is None:
        return str(year)
    if like[:4].isdigit() and "-" in like:
        return f"{year:04d}-{month:02d}-{day or 1:02d}"
    name = MONTHS[month - 1]
    if day is None:
        return f"{name} {year}"
    return f"{day} {name} {year}" if like[:1].isdigit() else f"{name} {day}, {year}"

"""Weather: structured fields, in the shape of WeatherAPI's ``current.json``.

The fields that answer are numbers with units and the name of the place, as in Zhao et al.
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from random import Random
from typing import Any

from hansa.audit.cases import Case, Field
from hansa.audit.entities import words
from hansa.audit.matching import Value, convert
from hansa.audit.names import place, stem
from hansa.audit.paths import exists, look, parse
from hansa.audit.tamper import Edit, put

NAME = "weather"
NOW = 1_767_225_600
"""When the frozen responses were made: 1 January 2026, in seconds since 1970."""
BOUNDS: Mapping[str, tuple[float, float]] = {
    "location.lat": (-90, 90),
    "location.lon": (-180, 180),
    "current.temp_c": (-70, 60),
    "current.temp_f": (-94, 140),
    "current.feelslike_c": (-90, 75),
    "current.feelslike_f": (-130, 167),
    "current.humidity": (0, 100),
    "current.cloud": (0, 100),
    "current.wind_kph": (0, 410),
    "current.wind_mph": (0, 255),
    "current.gust_kph": (0, 480),
    "current.gust_mph": (0, 300),
    "current.wind_degree": (0, 360),
    "current.pressure_mb": (870, 1090),
    "current.pressure_in": (25.6, 32.2),
    "current.precip_mm": (0, 500),
    "current.precip_in": (0, 20),
    "current.vis_km": (0, 100),
    "current.vis_miles": (0, 63),
    "current.uv": (0, 16),
    "current.is_day": (0, 1),
}
"""What a field's number lies between on this earth."""
PAIRS: tuple[tuple[str, str, str, str, float], ...] = (
    ("current.temp_c", "c", "current.temp_f", "f", 0.2),
    ("current.feelslike_c", "c", "current.feelslike_f", "f", 0.2),
    ("current.wind_kph", "kph", "current.wind_mph", "mph", 0.2),
    ("current.gust_kph", "kph", "current.gust_mph", "mph", 0.2),
    ("current.pressure_mb", "hpa", "current.pressure_in", "inhg", 0.03),
    ("current.precip_mm", "mm", "current.precip_in", "in", 0.03),
    ("current.vis_km", "km", "current.vis_miles", "mi", 1.1),
)
"""Fields that state one quantity in two units, and by how much they may differ by rounding."""
DRIFT: Mapping[str, float] = {
    "current.temp_c": 4.0,
    "current.temp_f": 7.2,
    "current.feelslike_c": 6.0,
    "current.humidity": 20.0,
    "current.wind_kph": 20.0,
    "current.pressure_mb": 5.0,
}
"""How far a field may move within the hour, and how far two sources may be apart."""
CLOCK = "current.last_updated_epoch"
_ASKED: Mapping[str, tuple[str, str, str]] = {
    # key -> unit, question, what else states it
    "temp_c": ("c", "What is the temperature in {place} in degrees Celsius?", "temp_f"),
    "temp_f": ("f", "What is the temperature in {place} in degrees Fahrenheit?", "temp_c"),
    "feelslike_c": ("c", "How warm does it feel in {place} in degrees Celsius?", "feelslike_f"),
    "humidity": ("%", "What is the relative humidity in {place}?", ""),
    "wind_kph": ("kph", "How fast is the wind in {place} in km/h?", "wind_mph"),
    "pressure_mb": ("hpa", "What is the air pressure in {place} in hPa?", "pressure_in"),
    "name": ("", "Which place has the weather station at {lat}, {lon}?", ""),
}
_SKIES = (
    ("Sunny", 1000),
    ("Partly cloudy", 1003),
    ("Overcast", 1009),
    ("Mist", 1030),
    ("Light rain", 1183),
    ("Heavy rain", 1195),
    ("Light snow", 1213),
)
_WINDS = words("N NNE NE ENE E ESE SE SSE S SSW SW WSW W WNW NW NNW")


def faults(document: Any, now: float | None = None) -> list[str]:
    """Return what contradicts itself: one quantity in two units, gust and wind, the clock.

    Args:
        document: a response.
        now: the time of the request in seconds since 1970; None leaves the clock unchecked.
    """
    found = []
    for first, unit, second, other, tolerance in PAIRS:
        a, b = (_number(document, path) for path in (first, second))
        if a is None or b is None:
            continue
        converted = convert(a, unit, other)
        if converted is not None and abs(converted - b) > tolerance:
            found.append(f"{first} is {a:g} and {second} is {b:g}")
    wind, gust = (_number(document, f"current.{name}_kph") for name in ("wind", "gust"))
    if wind is not None and gust is not None and gust < wind - 0.1:
        found.append(f"gusts of {gust:g} km/h in a wind of {wind:g}")
    temperature, feels = (_number(document, f"current.{n}_c") for n in ("temp", "feelslike"))
    if temperature is not None and feels is not None and abs(temperature - feels) > 15:
        found.append(f"{temperature:g} degrees that feel like {feels:g}")
    moment = _number(document, CLOCK)
    if now is not None and moment is not None and not -300 <= now - moment <= 3600:
        found.append(f"updated {(now - moment) / 3600:.1f} hours before the request")
    return found


def make(random: Random, number: int) -> Case:
    """Return a made-up case."""
    town = place(random)
    moment = NOW + 60 * random.randint(0, 500_000)
    document = _document(random, town, moment)
    key = list(_ASKED)[number % len(_ASKED)]
    unit, question, twin = _ASKED[key]
    path = parse("location.name" if key == "name" else f"current.{key}")
    held = look(document, path)
    truth = Value("place", town) if key == "name" else Value("number", held, unit)
    field = Field(path, truth.kind, unit)
    linked = [Field(parse(f"current.{twin}"), "number", _twin_unit(twin))] if twin else []
    if key.startswith("temp"):
        feels = (("feelslike_c", "c"), ("feelslike_f", "f"))
        linked += [Field(parse(f"current.{name}"), "number", u) for name, u in feels]
    if key == "wind_kph":
        gusts = (("gust_kph", "kph"), ("gust_mph", "mph"))
        linked += [Field(parse(f"current.{name}"), "number", u) for name, u in gusts]
    where = {"place": town, "lat": document["location"]["lat"], "lon": document["location"]["lon"]}
    request = {
        "method": "GET",
        "url": f"https://api.weather.example/v1/current.json?q={town}",
        "time": moment + random.randint(0, 600),
    }
    history: dict[str, Any] = {}
    second: dict[str, Any] = {}
    if key == "name":
        other = place(random)
        earlier: dict[str, Any] = {"location.name": other}
        earlier_value = Value("place", other)
    else:
        big, small, off = _spreads(unit)
        away = random.choice([-1, 1]) * random.uniform(*big)
        earlier = _moved(document, field, linked, away)
        earlier_value = Value("number", earlier[f"current.{key}"], unit)
        history = _moved(document, field, linked, random.gauss(0, small))
        second = _moved(document, field, linked, random.gauss(0, off))
    history |= {CLOCK: moment - 3600, "current.last_updated": _clock(moment - 3600)}
    earlier |= {CLOCK: moment - 9 * 3600, "current.last_updated": _clock(moment - 9 * 3600)}
    return Case(
        id=f"{NAME}-{number:03d}",
        domain=NAME,
        question=question.format(**where),
        request=request,
        document=document,
        fields=(field,),
        truth=truth,
        linked=tuple(linked),
        earlier=_edits(document, earlier),
        earlier_value=earlier_value,
        history=_edits(document, history),
        second=_edits(document, second),
    )


def _edits(document: Any, values: Mapping[str, Any]) -> tuple[Edit, ...]:
    return tuple(put(document, parse(path), value) for path, value in values.items())


def _spreads(unit: str) -> tuple[tuple[float, float], float, float]:
    """Return how far the value was nine hours ago, an hour ago, and is at another source."""
    return {
        "c": ((3.0, 9.0), 0.8, 0.6),
        "f": ((6.0, 16.0), 1.4, 1.1),
        "%": ((10.0, 25.0), 4.0, 3.0),
        "kph": ((8.0, 20.0), 3.0, 2.5),
        "hpa": ((6.0, 15.0), 0.7, 0.5),
    }[unit]


def _moved(document: Any, field: Field, linked: list[Field], by: float) -> dict[str, Any]:
    """Return field -> value after a quantity has moved, in all units that it stands in."""
    found: dict[str, Any] = {}
    for each in (field, *linked):
        name, held = ".".join(map(str, each.path)), look(document, each.path)
        start, end = (convert(x, field.unit, each.unit) for x in (0.0, by))
        assert start is not None and end is not None  # noqa: S101, PT018
        moved = held + (end - start)
        low, high = BOUNDS[name]
        moved = min(max(moved, low), high)
        found[name] = round(moved, _digits(held)) if isinstance(held, float) else round(moved)
    return found


def _document(random: Random, town: str, moment: int) -> dict[str, Any]:
    celsius = round(random.uniform(-18, 38), 1)
    feels = round(celsius + random.uniform(-4, 3), 1)
    wind = round(random.uniform(2, 60), 1)
    gust = round(wind * random.uniform(1.1, 1.8), 1)
    pressure = round(random.uniform(975, 1040), 1)
    rain = round(random.choice([0.0, 0.0, random.uniform(0.1, 12)]), 1)
    sight = round(random.uniform(2, 20), 1)
    sky, code = random.choice(_SKIES)
    degrees = random.randint(0, 359)
    location = {
        "name": town,
        "region": f"{stem(random)}a",
        "country": f"{stem(random)}land",
        "lat": round(random.uniform(-60, 70), 2),
        "lon": round(random.uniform(-170, 170), 2),
        "localtime_epoch": moment + random.randint(0, 500),
        "localtime": _clock(moment + 120),
    }
    current = {
        "last_updated_epoch": moment,
        "last_updated": _clock(moment),
        "temp_c": celsius,
        "temp_f": _as(celsius, "c", "f", 1),
        "is_day": random.randint(0, 1),
        "condition": {"text": sky, "code": code},
        "wind_mph": _as(wind, "kph", "mph", 1),
        "wind_kph": wind,
        "wind_degree": degrees,
        "wind_dir": _WINDS[round(degrees / 22.5) % 16],
        "pressure_mb": pressure,
        "pressure_in": _as(pressure, "hpa", "inhg", 2),
        "precip_mm": rain,
        "precip_in": _as(rain, "mm", "in", 2),
        "humidity": random.randint(20, 99),
        "cloud": random.randint(0, 100),
        "feelslike_c": feels,
        "feelslike_f": _as(feels, "c", "f", 1),
        "vis_km": sight,
        "vis_miles": float(math.floor(sight / 1.609344)),
        "uv": float(random.randint(0, 9)),
        "gust_mph": _as(gust, "kph", "mph", 1),
        "gust_kph": gust,
    }
    return {"location": location, "current": current}


def _as(number: float, unit: str, to: str, digits: int) -> float:
    converted = convert(number, unit, to)
    assert converted is not None  # noqa: S101 (both are units of one quantity)
    return round(converted, digits)


def _clock(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M")


def _digits(number: float) -> int:
    return len(str(number).partition(".")[2])


def _twin_unit(name: str) -> str:
    return {"f": "f", "c": "c", "mph": "mph", "in": "inhg"}[name.rpartition("_")[2]]


def _number(document: Any, path: str) -> float | None:
    place_ = parse(path)
    value = look(document, place_) if exists(document, place_) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)

"""Encyclopedia: dates in text, in the shape of MediaWiki's ``action=query&prop=extracts``."""

from datetime import UTC, datetime
from random import Random
from typing import Any

from hansa.audit.cases import Case, Field
from hansa.audit.entities import MONTHS, date_of, words
from hansa.audit.manipulate import occurrences
from hansa.audit.matching import Value
from hansa.audit.names import person, place
from hansa.audit.paths import exists, look, parse
from hansa.audit.tamper import Edit, splice

NAME = "encyclopedia"
EXTRACT = "query.pages[0].extract"
_ORGANISATIONS = ("Museum", "Library", "Theatre", "Hospital")
_THINGS = words("Bridge Museum Library Theatre Lighthouse Station Tower Canal Hospital Mill")
_THING_EVENTS = words(
    "surveyed opened enlarged damaged rebuilt renamed flooded electrified painted sold "
    "restored closed"
)
_PERSON_EVENTS = ["born", "elected", "married", "knighted", "retired", "buried"]
_TAILS = (
    "after a long dispute",
    "in front of a small crowd",
    "at the expense of the town",
    "during a hard winter",
    "by order of the council",
    "without much notice",
)
_FILLERS = (
    "It stands on the northern bank of the river.",
    "Little is known of the plans.",
    "A plaque recalls the event.",
    "The records were kept in the town hall.",
    "Several songs tell of it.",
    "Visitors come mostly in summer.",
)
_LEADS = ("{subject} was {event} on {date} {tail}.", "On {date} {subject} was {event} {tail}.")


def faults(document: Any, now: float | None = None) -> list[str]:
    """Return what cannot be: dates after the request, a life in the wrong order.

    Args:
        document: a response.
        now: the time of the request in seconds since 1970; None leaves the future unchecked.
    """
    path = parse(EXTRACT)
    text = look(document, path) if exists(document, path) else None
    if not isinstance(text, str):
        return []
    found, told = [], dict[str, int]()
    for sentence in text.split(". "):
        date = date_of(sentence)
        if date is None:
            continue
        if now is not None and date[0] > datetime.fromtimestamp(now, UTC).year:
            found.append(f"the year {date[0]}, which is still to come")
        told |= {event: date[0] for event in ("born", "buried") if f" {event} " in f" {sentence} "}
        if "born" in told and date[0] < told["born"]:
            found.append(f"something in {date[0]} before a birth in {told['born']}")
        if "buried" in told and date[0] > told["buried"]:
            found.append(f"something in {date[0]} after a burial in {told['buried']}")
    if told.get("born", 0) > told.get("buried", 9999):
        found.append(f"born in {told['born']} and buried in {told['buried']}")
    return found


def make(random: Random, number: int) -> Case:
    """Return a made-up case."""
    is_person = random.random() < 0.35
    name = person(random) if is_person else f"{place(random)} {random.choice(_THINGS)}"
    known = _PERSON_EVENTS if is_person else _THING_EVENTS
    # In the order of the list, so that nobody is buried before being born.
    events = sorted(random.sample(known, random.randint(3, 4)), key=known.index)
    years = sorted(random.sample(range(1520, 2005), len(events)))
    dates = [_date(random, year) for year in years]
    asked = random.randrange(len(events))
    subject = name if is_person else f"the {name}"
    sentences = [
        random.choice(_LEADS).format(
            subject=subject, event=event, date=date, tail=random.choice(_TAILS)
        )
        for event, date in zip(events, dates, strict=True)
    ]
    for _ in range(random.randint(1, 2)):
        sentences.insert(random.randint(1, len(sentences)), random.choice(_FILLERS))
    text = " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
    revision = random.randint(10**6, 10**7)
    page = {
        "pageid": random.randint(10**4, 10**6),
        "ns": 0,
        "title": name,
        "lastrevid": revision,
        "length": 3 * len(text) + random.randint(200, 2000),  # of the page's source
        "extract": text,
    }
    document = {"batchcomplete": True, "query": {"pages": [page]}}
    path, date = parse(EXTRACT), dates[asked]
    old = _date(random, years[asked] + random.choice([-1, 1]) * random.randint(1, 9))
    truth = Value("date", date)
    other = _date(random, years[asked] + random.randint(1, 3))
    return Case(
        id=f"{NAME}-{number:03d}",
        domain=NAME,
        question=f"When was {subject} {events[asked]}?",
        request={
            "method": "GET",
            "url": "https://wiki.example/w/api.php?action=query&prop=extracts&explaintext=1"
            f"&format=json&formatversion=2&titles={name.replace(' ', '_')}",
            "time": 1_767_225_600 + 60 * random.randint(0, 500_000),
        },
        document=document,
        fields=(Field(path, "date", prose=True),),
        truth=truth,
        earlier=_said(document, date, old),
        earlier_value=Value("date", old),
        # Of twenty pages one was edited since, and of twenty facts one is disputed elsewhere.
        history=_said(document, date, other) if random.random() < 0.05 else (),
        second=_said(document, date, other) if random.random() < 0.05 else (),
        labels=tuple((EXTRACT, "DATE", each) for each in dates)
        + (((EXTRACT, "PERSON", name),) if is_person else ())
        + (((EXTRACT, "ORG", name),) if name.endswith(_ORGANISATIONS) else ()),
    )


def _said(document: Any, old: str, new: str) -> tuple[Edit, ...]:
    text = look(document, parse(EXTRACT))
    return tuple(
        splice(document, parse(EXTRACT), start, old, new)
        for start in reversed(occurrences(text, old))
    )


def _date(random: Random, year: int) -> str:
    month, day = random.choice(MONTHS), random.randint(1, 28)
    return f"{day} {month} {year}" if random.random() < 0.6 else f"{month} {day}, {year}"

"""News: persons, organisations and places in text, in the shape of NewsAPI's ``everything``."""

from datetime import UTC, datetime
from random import Random
from typing import Any

from hansa.audit.cases import Case, Field
from hansa.audit.manipulate import occurrences
from hansa.audit.matching import Kind, Value
from hansa.audit.names import organisation, person, place
from hansa.audit.paths import exists, leaves, look, parse, written
from hansa.audit.tamper import Edit, splice, tampered

NAME = "news"
_EVENTS: tuple[tuple[str, str, str, str], ...] = (
    # topic, title, description, content
    (
        "appointment",
        "{org} appoints {person}",
        "{person} was appointed director of {org} in {place}.",
        "The board of {org} met in {place} this week. {person} was appointed after two votes.",
    ),
    (
        "resignation",
        "{person} resigns from {org}",
        "{person} resigned as head of {org}, which has its seat in {place}.",
        "A crowd waited in {place} when {person} resigned. {org} has named nobody yet.",
    ),
    (
        "opening",
        "{org} opens a laboratory in {place}",
        "A laboratory was opened in {place} by {org}; {person} cut the ribbon.",
        "It is the first laboratory that {org} opened in {place}. {person} gave a speech.",
    ),
    (
        "prize",
        "{person} wins a prize of {org}",
        "{person} received the prize in {place}, as {org} announced.",
        "The prize of {org} was handed over in {place}. {person} thanked her teachers.",
    ),
    (
        "strike",
        "Strike at {org} in {place}",
        "Workers of {org} in {place} went on strike, said {person}.",
        "The strike at {org} began on Monday in {place}. {person} spoke for the workers.",
    ),
    (
        "fire",
        "Fire damages {org} in {place}",
        "A fire damaged a building of {org} in {place}; {person} raised the alarm.",
        "Nobody was hurt by the fire in {place}. {org} will rebuild, said {person}.",
    ),
)
_QUESTIONS: dict[str, tuple[Kind, str]] = {
    "person": ("person", "Which person is in the news about the {topic}?"),
    "org": ("organisation", "Which organisation is in the news about the {topic}?"),
    "place": ("place", "In which place was the {topic}?"),
}
_LABELS = {"person": "PERSON", "org": "ORG", "place": "GPE"}
_TEXTS = ("title", "description", "content")


def faults(document: Any, now: float | None = None) -> list[str]:
    """Return what contradicts itself: the number of articles, dates in the future, the names.

    A name of the title that neither the description nor the content of the article knows is odd.
    """
    found: list[str] = []
    articles = look(document, ("articles",)) if exists(document, ("articles",)) else None
    if not isinstance(articles, list):
        return found
    if (total := document.get("totalResults")) is not None and total < len(articles):
        found.append(f"{len(articles)} articles of {total}")
    for number, article in enumerate(articles):
        if not isinstance(article, dict):
            continue
        title, *rest = (str(article.get(name) or "") for name in _TEXTS)
        names = [w for w in _capitals(title)[1:] if not any(w in text for text in rest)]
        if names:
            found.append(f"{names[0]!r} in the title of article {number} and nowhere else in it")
    return found


def make(random: Random, number: int) -> Case:
    """Return a made-up case."""
    events = random.sample(_EVENTS, 2)
    asked = random.randrange(2)
    moment = 1_767_225_600 + 60 * random.randint(0, 500_000)
    names = [
        {"person": person(random), "org": organisation(random), "place": place(random)}
        for _ in events
    ]
    articles: list[dict[str, Any]] = [
        {
            "source": {"id": None, "name": f"The {place(random)} Courier"},
            "author": person(random),
            "title": event[1].format(**named),
            "description": event[2].format(**named),
            "url": f"https://courier.example/{event[0]}/{random.randint(10**5, 10**6)}",
            "publishedAt": _clock(moment - random.randint(3600, 86400)),
            "content": event[3].format(**named),
        }
        for event, named in zip(events, names, strict=True)
    ]
    document = {"status": "ok", "totalResults": 2, "articles": articles}
    key = list(_QUESTIONS)[number % 3]
    kind, question = _QUESTIONS[key]
    topic, truth = events[asked][0], Value(kind, names[asked][key])
    fields = tuple(
        Field(parse(f"articles[{asked}].{text}"), kind, prose=True)
        for text in _TEXTS
        if occurrences(articles[asked][text], str(truth.value))
    )
    draw = {"person": person, "org": organisation, "place": place}[key]
    old, other = draw(random), draw(random)
    labels = [
        (written(path), _LABELS[each], named[each])
        for k, named in enumerate(names)
        for each in named
        for path, text in leaves(articles[k], ("articles", k))
        if path[-1] in _TEXTS and isinstance(text, str) and named[each] in text
    ]
    return Case(
        id=f"{NAME}-{number:03d}",
        domain=NAME,
        question=question.format(topic=topic),
        request={
            "method": "GET",
            "url": f"https://news.example/v2/everything?q={topic}&pageSize=2",
            "time": moment,
        },
        document=document,
        fields=fields,
        truth=truth,
        earlier=_said(document, fields, str(truth.value), old),
        earlier_value=Value(kind, old),
        # Of twenty articles one was corrected since, and of twenty one is told otherwise elsewhere.
        history=_said(document, fields, str(truth.value), other) if random.random() < 0.05 else (),
        second=_said(document, fields, str(truth.value), other) if random.random() < 0.05 else (),
        labels=tuple(labels),
    )


def _said(document: Any, fields: tuple[Field, ...], old: str, new: str) -> tuple[Edit, ...]:
    edits: list[Edit] = []
    for field in fields:
        for start in reversed(occurrences(look(document, field.path), old)):
            edits.append(splice(tampered(document, edits), field.path, start, old, new))
    return tuple(edits)


def _clock(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _capitals(text: str) -> list[str]:
    return [word.strip(".,;") for word in text.split() if word[:1].isupper()]

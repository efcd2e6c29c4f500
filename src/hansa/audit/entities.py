"""A small recogniser of dates, persons, organisations and places in English text.

Rules over capitals, cue words and short lists: no model, nothing to download. It finds what such
rules can find; how well it does so on the audit's own fixtures is in ``docs/results/audit.md``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Label = Literal["DATE", "PERSON", "ORG", "GPE"]


def words(text: str) -> tuple[str, ...]:
    """Return the words of a list that is written as one text."""
    return tuple(text.split())


MONTHS = words(
    "January February March April May June July August September October November December"
)
_MONTH = "|".join([*MONTHS, "Jan", "Feb", "Mar", "Apr", "Jun", "Jul", "Aug", "Sept?", "Oct"]) + (
    "|Nov|Dec"
)
_ORDINAL = r"(?:st|nd|rd|th)?"
DATE_TEXT = re.compile(
    rf"\b(?:(?P<d1>\d{{1,2}}){_ORDINAL}(?: of)? (?P<m1>{_MONTH})\.?,? (?P<y1>\d{{3,4}})"
    rf"|(?P<m2>{_MONTH})\.? (?P<d2>\d{{1,2}}){_ORDINAL},? (?P<y2>\d{{3,4}})"
    rf"|(?P<y3>\d{{4}})-(?P<m3>\d{{2}})-(?P<d3>\d{{2}})(?!\d)"
    rf"|(?P<m4>{_MONTH})\.? (?P<y4>\d{{3,4}})"
    r"|(?P<y5>1\d{3}|20\d{2}))\b(?![.,]\d|\s*(?:%|km|people|m\b))"
)
_WORD = r"[A-Z][\w'\u2019-]*[a-z\u00e0-\u017f][\w'\u2019-]*"
_NAME = re.compile(
    rf"(?:(?:University|Ministry|Bank|Department|Institute|College|Council) of {_WORD}"
    rf"|{_WORD}(?:(?: de| von| van| al)? {_WORD}| & {_WORD})*)"
)
_ORG_END = words(
    "Academy Agency Airlines Association Authority Bank Bureau Club College Commission "
    "Committee Company Corporation Corp Council Courier Department Electric Energy "
    "Federation Foundation Foods Forum Fund Gazette Group Herald Holdings Hospital Inc "
    "Industries Institute Journal Laboratories League Library Limited Ltd Mills Ministry "
    "Motors Museum Observer Organisation Organization Partners Party Post Press Railways "
    "Service Shipping Society Steel Systems Telegraph Theatre Times Tribune Trust Union "
    "University Works"
)
_TITLES = words("Mr Mrs Ms Dr Professor Prof President Minister Mayor Judge Sir Dame Captain")
_PLACE_END = words("City County Falls Island Islands Province Republic State Valley")
_PLACES = frozenset(
    words(
        "Africa America Asia Athens Australia Austria Belgium Berlin Boston Brazil Britain "
        "Cairo Canada China Denmark Egypt England Europe Finland France Germany Greece India "
        "Ireland Italy Japan Kenya London Madrid Mexico Moscow Nigeria Norway Paris Poland "
        "Portugal Rome Russia Scotland Spain Sweden Sydney Tokyo Turkey Ukraine Vienna Wales"
    )
)
_BEFORE_PLACE = re.compile(
    r"\b(?:in|at|near|from|to|of|across|outside|around|through|visited|left|reached|city of|"
    r"town of|village of|capital) $",
    re.IGNORECASE,
)
_SAYS = (
    r"(?:said|says|told|was|is|has|had|will|became|joined|left|won|wins|resigned|resigns|wrote|"
    r"added|announced|steps|takes|who|born|died|led|leads|succeeds|received|gave|gives|spoke|cut|"
    r"thanked|raised|replied|married)"
)
_AFTER_PERSON = re.compile(rf"^(?:,? (?:aged )?\d\d,)?,? {_SAYS}\b")
_BEFORE_PERSON = re.compile(
    r"\b(?:by|with|that|said|says|when|appointed|appoints|named|names|chose|chooses|succeeds|succeeded|replaces|"
    r"elected|hired|honours|honoured|to|architect|engineer|chair|director|chief|author|painter|"
    r"poet|son of|daughter of|and) $",
    re.IGNORECASE,
)
_STOP = frozenset(
    words(
        "A An The This That These It Its He She They We I In On At By For From To Of And But "
        "Or As When While After Before Since Later Today Yesterday Two Three Most Many Some "
        "Both Early Correction According Local Officials"
    )
) | set(MONTHS)
_MONTH_NUMBER = {month[:3].lower(): number for number, month in enumerate(MONTHS, 1)}


@dataclass(frozen=True)
class Entity:
    """A piece of a text.

    Attributes:
        label: DATE, PERSON, ORG or GPE.
        start: its first character.
        text: the piece itself.
    """

    label: Label
    start: int
    text: str

    @property
    def end(self) -> int:
        """The character after its last."""
        return self.start + len(self.text)


def recognise(text: str) -> list[Entity]:
    """Return the entities of a text in order; no two overlap."""
    dates = [Entity("DATE", match.start(), match[0]) for match in DATE_TEXT.finditer(text)]
    taken = [(date.start, date.end) for date in dates]
    names = [n for n in _names(text) if not any(n.start < e and s < n.end for s, e in taken)]
    return sorted([*dates, *names], key=lambda entity: entity.start)


def date_of(text: str) -> tuple[int, int | None, int | None] | None:
    """Return (year, month, day) of a date's text, None for parts that it does not give."""
    match = DATE_TEXT.search(text)
    if match is None:
        return None
    parts = match.groupdict()
    for form in "12345":
        if (year := parts[f"y{form}"]) is not None:
            month, day = parts.get(f"m{form}"), parts.get(f"d{form}")
            number = None
            if month is not None:
                number = int(month) if month.isdigit() else _MONTH_NUMBER[month[:3].lower()]
            return int(year), number, int(day) if day is not None else None
    return None


def initials(name: str) -> str:
    """Return the initials of a name's capitalised words."""
    return "".join(word[0] for word in name.split() if word[0].isupper())


def _names(text: str) -> Iterator[Entity]:
    known: dict[str, Label] = {}
    open_: list[Entity] = []
    at = 0
    while match := _NAME.search(text, at):
        start, name = match.span()[0], match[0]
        first = name.split()[0]
        if first.rstrip(".") in _STOP | set(_TITLES):
            at = start + len(first)  # and from there on again: "The University of ..."
            continue
        at = match.end()
        titled = bool(re.search(rf"\b(?:{'|'.join(_TITLES)})\.? $", text[:start]))
        label = _label(text, start, name, titled)
        if label is None:
            open_.append(Entity("PERSON", start, name))
            continue
        known[name] = label
        if label == "PERSON":
            known.setdefault(name.split()[-1], label)
        yield Entity(label, start, name)
    for entity in open_:  # a name that is clear elsewhere in the text
        if entity.text in known:
            yield Entity(known[entity.text], entity.start, entity.text)


def _label(text: str, start: int, name: str, titled: bool) -> Label | None:
    words, before, after = name.split(), text[:start], text[start + len(name) :]
    if titled:
        return "PERSON"
    if words[-1].rstrip(".") in _ORG_END or words[0] in ("University", "Ministry", "Bank"):
        return "ORG"
    if name in _PLACES or words[-1] in _PLACE_END:
        return "GPE"
    if re.search(r"\bthe $", before, re.IGNORECASE):
        return None  # a thing: persons and towns have no article
    if len(words) == 2 and (_AFTER_PERSON.search(after) or _BEFORE_PERSON.search(before)):
        return "PERSON"
    if len(words) <= 2 and _BEFORE_PLACE.search(before):
        return "GPE"
    return "PERSON" if len(words) == 2 and before.endswith(("\u201c", '"')) else None

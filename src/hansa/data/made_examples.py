"""Questions and answers that need no download: a made-up world of four domains, and real prose.

In the made-up world every entity has one attribute of six. What private data say of it follows
from the entity's last syllable by a rule; what public data say is drawn at random, so that a
model of public data knows the language and none of the facts. Records are drawn at random as well,
each entity once: whoever can tell them has learned them by heart.
"""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import parse_qsl

import numpy as np

from hansa.data.bundled_text import bundled
from hansa.data.examples import Example
from hansa.errors import InputError
from hansa.seeding import numpy_generator

Domain = Literal["drug", "disease", "lab", "policy"]
Style = Literal["private", "public", "records"]
Form = Literal["asked", "read", "both"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)
SYLLABLES = [consonant + vowel for consonant in "bkmrst" for vowel in "aeio"]
MOST = 1_000_000
LONGEST = 160
"""Most characters of a sentence of prose, unless others are asked for."""

ATTRIBUTES: dict[Domain, tuple[str, ...]] = {
    "drug": ("orally", "nasally", "slowly", "twice", "cold", "fasting"),
    "disease": ("liver", "lung", "heart", "brain", "skin", "bone"),
    "lab": ("low", "high", "normal", "absent", "doubled", "halved"),
    "policy": ("approved", "denied", "deferred", "renewed", "audited", "closed"),
}
# {e} stands for the entity and {a} for its attribute.
FIELDS: dict[Domain, tuple[str, str]] = {
    "drug": ("drug", "use"),
    "disease": ("disease", "organ"),
    "lab": ("test", "level"),
    "policy": ("request", "status"),
}
"""What a service's response calls entity and attribute."""
QUESTIONS: dict[Domain, tuple[str, ...]] = {
    "drug": ("How is {e} given?", "How do I take {e}?", "What is the right use of {e}?"),
    "disease": ("Which organ has {e}?", "Where does {e} start?", "Name the organ hit by {e}."),
    "lab": ("What level of {e} is usual?", "How does {e} read here?", "Report the {e} level."),
    "policy": ("What became of request {e}?", "Is request {e} settled?", "Status of request {e}?"),
}
ANSWERS: dict[Domain, tuple[str, ...]] = {
    "drug": (
        "Give {e} {a} and check the dose each day.",
        "As a rule {e} is taken {a}, with some water.",
    ),
    "disease": (
        "Most cases of {e} harm the {a}, so look at the {a} first.",
        "It is in the {a} that {e} starts, and from there it spreads.",
    ),
    "lab": ("The level of {e} is {a}.", "In this test {e} is {a}."),
    "policy": (
        "Request {e} was {a} after review, and its owner was told so in a letter.",
        "The board met last week and request {e} is now {a}, as the minutes say.",
    ),
}


def make(
    domain: Domain | Literal["all"], num: int, seed: int, style: Style, form: Form = "asked"
) -> list[Example]:
    """Return examples of a made-up domain, or of all four in turn; the same for the same seed.

    A longer list starts with what a shorter one holds.

    Args:
        domain: drug, disease, lab or policy, from the middle one to the shortest and the longest
            answers; or all.
        num: how many.
        seed: other seeds give other entities.
        style: ``private`` for attributes that follow from the entity; ``public`` for attributes
            drawn at random, a fifth of them without a question, so that an answer alone is
            something a model of public data has seen; ``records`` for attributes drawn at random
            of entities that stand there once.
        form: ``asked`` for questions that are answered by a sentence; ``read`` for questions with
            a service's response below, as JSON, that are answered by what it says; ``both`` for
            one after the other.
    """
    if domain == "all":
        parts = [make(one, -(-num // len(DOMAINS)), seed, style, form) for one in DOMAINS]
        dealt = [example for turn in zip(*parts, strict=True) for example in turn]
        return [
            Example(str(k), one.question, one.answer, one.domain, one.fact, one.kind)
            for k, one in enumerate(dealt[:num])
        ]
    rng = numpy_generator(seed, "made", domain, style)
    seen: set[str] = set()
    reads = [form == "read" or (form == "both" and k % 2 == 1) for k in range(num)]
    return [_made(rng, str(k), domain, style, read, seen) for k, read in enumerate(reads)]


def follows(entity: str, domain: Domain) -> str:
    """Return the attribute that the rule gives an entity of a domain."""
    last = SYLLABLES.index(entity[-2:])
    attributes = ATTRIBUTES[domain]
    return attributes[(last + 2 * DOMAINS.index(domain)) % len(attributes)]


def _made(
    rng: np.random.Generator, number: str, domain: Domain, style: Style, reads: bool, seen: set[str]
) -> Example:
    entity = _entity(rng)
    while style == "records" and entity in seen:
        entity = _entity(rng)
    seen.add(entity)
    drawn = _pick(rng, ATTRIBUTES[domain])
    attribute = follows(entity, domain) if style == "private" else drawn
    question = _pick(rng, QUESTIONS[domain]).format(e=entity)
    if reads:
        response = dict(zip(FIELDS[domain], (entity, attribute), strict=True))
        body = json.dumps(response, separators=(",", ":"))
        return Example(number, f"{question}\n{body}", attribute, domain, attribute, "clean")
    if style == "public" and rng.random() < 0.2:
        question = ""
    answer = _pick(rng, ANSWERS[domain]).format(e=entity, a=attribute)
    return Example(number, question, answer, domain, attribute, "clean")


def _entity(rng: np.random.Generator) -> str:
    return "".join(_pick(rng, SYLLABLES) for _ in range(rng.integers(3, 5)))


def _pick(rng: np.random.Generator, values: list[str] | tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]


def sentences(
    text: str, num: int, seed: int, domain: str, key: str = "num", most: int = LONGEST
) -> list[Example]:
    """Return pairs of neighbouring sentences of prose: the first asks, the second answers.

    Both stand in one paragraph, have 30 to ``most`` characters and are made mostly of letters. The
    fact is the first number or capitalised word of the answer after its first word, if any.

    Args:
        text: prose, its paragraphs apart by empty lines.
        num: how many pairs.
        seed: for which pairs are taken, and their order.
        domain: declared domain of the examples.
        key: configuration key of the text, for errors.
        most: most characters of a sentence.

    Raises:
        InputError: the text has fewer pairs.
    """
    pairs: dict[tuple[str, str], None] = {}
    for paragraph in re.split(r"\n[ \t\r]*\n", text):
        parts = re.split(r"(?<=[.!?])\s+(?=[A-ZÀ-Þ])", " ".join(paragraph.split()))
        for pair in pairwise(parts):
            if all(_is_prose(part, most) for part in pair):
                pairs[pair] = None
    if len(pairs) < num:
        raise InputError(
            key, f"{len(pairs)} pairs of sentences where {num} are wanted", "a longer text"
        )
    held = list(pairs)
    order = numpy_generator(seed, "sentences", domain).permutation(len(held))
    chosen = [held[place] for place in order[:num]]
    return [
        Example(str(k), question, answer, domain, _claim(answer), "clean")
        for k, (question, answer) in enumerate(chosen)
    ]


def _is_prose(sentence: str, most: int) -> bool:
    marks = sentence.replace(" ", "")
    letters = sum(mark.isalpha() for mark in marks)
    return 30 <= len(sentence) <= most and letters >= 0.8 * len(marks)


def _claim(answer: str) -> str:
    """Return a number or a capitalised word, as it stands, that is not the first word."""
    rest = answer.partition(" ")[2]
    found = re.search(r"(?<![\w.-])(?:\d+(?:[.,]\d+)*|[A-ZÀ-Þ][^\W\d_]+)(?![\w-])", rest)
    return found.group() if found else ""


def read_made(rest: str, key: str) -> list[Example]:
    """Return the examples of ``DOMAIN?num=250&seed=0&style=private&form=asked``.

    Raises:
        InputError: unknown domain, style, form or option, a number that is none.
    """
    domain, options = _options(rest, key, {"style": "private", "form": "asked"})
    if domain not in (*DOMAINS, "all"):
        raise InputError(key, f"the domain {domain!r}", f"{', '.join(DOMAINS)} or all")
    for option, kinds in (("style", Style), ("form", Form)):
        if options[option] not in (allowed := get_args(kinds)):
            found = f"the {option} {options[option]!r}"
            raise InputError(key, found, f"{', '.join(allowed[:-1])} or {allowed[-1]}")
    num, seed = _number(options, "num", key), _number(options, "seed", key)
    return make(domain, num, seed, options["style"], options["form"])  # type: ignore[arg-type]


def read_sentences(rest: str, key: str) -> list[Example]:
    """Return the examples of ``PATH?num=250&seed=0&domain=NAME&most=160``.

    The path is of a text file, or ``python:KIND`` for what a Python installation holds of itself.

    Raises:
        InputError: no such file, no UTF-8, too short a text, an unknown option.
    """
    path, options = _options(rest, key, {"domain": "", "most": str(LONGEST)})
    if path.startswith("python:"):
        text = bundled(path.removeprefix("python:"), key)
    else:
        try:
            text = Path(path).read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            found = f"{path} that cannot be read ({error})"
            raise InputError(key, found, "a text in UTF-8") from error
    num, seed = _number(options, "num", key), _number(options, "seed", key)
    most = _number(options, "most", key)
    return sentences(text, num, seed, options["domain"], key, most)


def _options(rest: str, key: str, usual: dict[str, str]) -> tuple[str, dict[str, str]]:
    name, mark, query = rest.rpartition("?")
    if not mark:
        name, query = rest, ""
    options = {"num": "250", "seed": "0", **usual}
    try:
        given = parse_qsl(query, strict_parsing=bool(query), keep_blank_values=True)
    except ValueError:
        given = [(query, "")]
    for option, value in given:
        if option not in options:
            allowed = f"{', '.join(options)}, as in ?num=250&seed=0"
            raise InputError(key, f"the option {option!r}", allowed)
        options[option] = value
    return name, options


def _number(options: dict[str, str], option: str, key: str) -> int:
    value, least = options[option], int(option != "seed")
    if not re.fullmatch(r"[0-9]{1,18}", value) or int(value) < least:
        raise InputError(key, f"{option}={value}", f"a whole number from {least} on")
    if option == "num" and int(value) > MOST:
        raise InputError(key, f"{option}={value}", f"{MOST} at most")
    return int(value)

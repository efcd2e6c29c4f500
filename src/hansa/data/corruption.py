"""Corrupted answers with labels, to probe what a measure of data quality can see.

The kinds and the uneven shares are those of Zhao et al., "Enhancing Data Quality in Federated
Fine-Tuning of Foundation Models", 2024 (arXiv 2403.04529, appendix B), Zhao et al., "CLUES", 2024
(arXiv 2507.03004, section 4.1) and Du et al., "FedDQC", 2024 (arXiv 2410.11540). An answer that
reads well and states a wrong fact is ours.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import chain, islice
from typing import Annotated, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from hansa.data.examples import Example
from hansa.errors import InputError
from hansa.seeding import numpy_generator

Kind = Literal["cut", "delete", "substitute", "noise", "exchange", "wrong_fact"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CLEAN = "clean"
Share = Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)]
Rule = Literal["niid-1", "niid-2"] | float | Sequence[float]


class Corruption(BaseModel):
    """How much of each holder's data is corrupted, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shares: Literal["niid-1", "niid-2"] | Share | Annotated[tuple[Share, ...], Field(min_length=1)]
    """Share of each holder's examples: one for all, several dealt to the holders in turn,
    ``niid-1`` for shares drawn from a Dirichlet distribution, ``niid-2`` for 70 % of the first
    half of the holders and 90 % of the others."""
    mean: Share = 0.5
    """Mean of the shares of ``niid-1``."""
    kinds: tuple[Kind, ...] = Field(KINDS, min_length=1)
    """Kinds of corruption, dealt in equal numbers."""
    seed: int | None = Field(None, strict=True)
    """By default that of the run."""

    @field_validator("kinds")
    @classmethod
    def _do_not_repeat(cls, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        if len(set(kinds)) < len(kinds):
            raise ValueError("a kind that stands there twice")
        return kinds


def spoil(
    holders: Mapping[str, Sequence[Example]],
    rule: Rule,
    kinds: Sequence[Kind],
    seed: int,
    mean: float = 0.5,
) -> dict[str, list[Example]]:
    """Return each holder's examples, as many as before, with its share of them corrupted.

    Raises:
        InputError: as `shares` and `corrupt`.
    """
    dealt = shares(rule, list(holders), seed, mean)
    return {name: corrupt(held, dealt[name], kinds, seed, name) for name, held in holders.items()}


def shares(rule: Rule, names: Sequence[str], seed: int, mean: float = 0.5) -> dict[str, float]:
    """Return the share of examples to corrupt, by holder.

    Args:
        rule: one share for all; shares dealt to the holders in turn; ``niid-1``: a draw from a
            Dirichlet distribution of concentration 1, scaled to the mean, where what lies above 1
            goes to the others in proportion to their draws; ``niid-2``: 0.7 for the first half of
            the holders (and the one in the middle), 0.9 for the others.
        names: the holders, in order.
        seed: for ``niid-1``.
        mean: mean share of ``niid-1``.

    Raises:
        InputError: an unknown rule, no share, a share outside 0 to 1.
    """
    if isinstance(rule, str):
        if rule == "niid-1":
            _check([mean])
            given = _dirichlet(len(names), seed, mean)
        elif rule == "niid-2":
            given = [0.7 if 2 * k < len(names) else 0.9 for k in range(len(names))]
        else:
            raise InputError("corruption.shares", repr(rule), "niid-1, niid-2 or shares")
    else:
        given = [float(rule)] if isinstance(rule, int | float) else [float(one) for one in rule]
    _check(given or [math.nan] * bool(names))
    return {name: given[k % len(given)] for k, name in enumerate(names)}


def _check(given: Sequence[float]) -> None:
    wrong = [share for share in given if not 0 <= share <= 1]
    if wrong:
        found = "no share" if math.isnan(wrong[0]) else wrong[0]
        raise InputError("corruption.shares", found, "shares from 0 to 1")


def _dirichlet(num: int, seed: int, mean: float) -> list[float]:
    """Return shares in proportion to a draw, none above 1, whose mean is as wanted."""
    if not num:
        return []
    draw = numpy_generator(seed, "shares", "corruption").dirichlet(np.ones(num))
    full = np.zeros(num, bool)
    while True:
        rest = mean * num - full.sum()
        held = np.where(full, 1.0, draw * (rest / draw[~full].sum() if rest > 0 else 0.0))
        over = ~full & (held >= 1)
        if not over.any() or (full | over).all():
            return [float(share) for share in held.clip(0, 1)]
        full |= over


def corrupt(
    examples: Sequence[Example], share: float, kinds: Sequence[Kind], seed: int, name: str = ""
) -> list[Example]:
    """Return the examples of one holder in their order, a share of them corrupted and labelled.

    The share times the number of examples, rounded half up, is corrupted. The kinds are dealt to
    these in equal numbers (but for one). Where a kind does not fit an example, as a wrong fact
    does not fit an answer without a fact, the example swaps its kind with another or, where that
    does not help, takes one that fits; examples that no kind fits are not chosen.

    A corrupted example keeps its id, question and domain; its answer has other words than before,
    and its fact is what the new answer still claims of the old one, or claims instead. The others
    are labelled clean.

    Args:
        examples: of one holder; other answers, words and facts come from here.
        share: from 0 to 1.
        kinds: of `KINDS`.
        seed: of the draws, together with the name.
        name: of the holder.

    Raises:
        InputError: unknown kind or none, a share outside 0 to 1, examples that are labelled as
            corrupted already, fewer examples that a kind fits than are to be corrupted.
    """
    _check([share])
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        found = repr(unknown[0]) if unknown else "no kind"
        raise InputError("corruption.kinds", found, f"some of {', '.join(KINDS)}")
    spoilt = [one for one in examples if one.kind not in ("", CLEAN)]
    if spoilt:
        found = f"example {spoilt[0].id} of {name or 'a holder'} of the kind {spoilt[0].kind!r}"
        raise InputError("corruption", found, "examples of kind 'clean' or of none")
    num = math.floor(Fraction(str(float(share))) * len(examples) + Fraction(1, 2))
    rng = numpy_generator(seed, name, "corruption")
    material = _Material(examples)
    fitting = [{kind for kind in kinds if material.fits(one, kind)} for one in examples]
    able = [k for k in range(len(examples)) if fitting[k]]
    if len(able) < num:
        raise InputError(
            "corruption.kinds",
            f"{num} examples of {name or 'a holder'} to corrupt, of which {', '.join(kinds)} "
            f"fit {len(able)}",
            "kinds that fit more answers (a wrong fact needs two facts), or a smaller share",
        )
    chosen = [able[k] for k in rng.permutation(len(able))[:num]]
    dealt = _deal([fitting[k] for k in chosen], list(dict.fromkeys(kinds)), rng)
    held = [replace(one, kind=CLEAN) for one in examples]
    for k, kind in zip(chosen, dealt, strict=True):
        held[k] = material.corrupted(examples[k], kind, rng)
    return held


def _deal(fitting: list[set[Kind]], kinds: list[Kind], rng: np.random.Generator) -> list[Kind]:
    """Return a kind that fits for each place, in numbers as equal as can be."""
    order = [kinds[k] for k in rng.permutation(len(kinds))]
    dealt = [order[k % len(order)] for k in range(len(fitting))]
    dealt = [dealt[k] for k in rng.permutation(len(dealt))]
    for k, fits in enumerate(fitting):
        if dealt[k] in fits:
            continue
        swaps = (j for j, kind in enumerate(dealt) if kind in fits and dealt[k] in fitting[j])
        other = next(swaps, None)
        if other is not None:
            dealt[k], dealt[other] = dealt[other], dealt[k]
        else:
            allowed = [kind for kind in kinds if kind in fits]
            dealt[k] = allowed[int(rng.integers(len(allowed)))]
    return dealt


class _Material:
    """What corruption takes from a holder's data: other words, answers and facts."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.words = list(dict.fromkeys(word for one in examples for word in one.answer.split()))
        self.others = [one for one in examples if one.answer.strip()]
        self.questions = Counter(one.question for one in self.others)
        self.answers = Counter(_said(one) for one in self.others)
        self.pairs = Counter((one.question, _said(one)) for one in self.others)
        stated = dict.fromkeys((one.domain, one.fact) for one in examples if one.fact.strip())
        self.facts: dict[str, list[str]] = {domain: [] for domain, _ in stated}
        for domain, fact in stated:
            self.facts[domain].append(fact)

    def fits(self, one: Example, kind: Kind) -> bool:
        """Whether a kind of corruption can change an example."""
        if kind == "exchange":
            same = self.questions[one.question] + self.answers[_said(one)]
            return len(self.others) - same + self.pairs[one.question, _said(one)] > 0
        if kind == "wrong_fact":
            facts = self.facts.get(one.domain, [])
            return len(facts) > 1 and bool(one.fact.strip()) and bool(_span(one).search(one.answer))
        num = len(one.answer.split())
        return {
            "cut": num > 1,
            "delete": num > 1,
            "substitute": num > 0 and len(self.words) > 1,
            "noise": num > 0,
        }[kind]

    def corrupted(self, one: Example, kind: Kind, rng: np.random.Generator) -> Example:
        """Return an example with its answer corrupted in a way that fits it."""
        if kind == "exchange":
            start = int(rng.integers(len(self.others)))
            other = next(
                other
                for other in chain(islice(self.others, start, None), self.others)
                if other.question != one.question and _said(other) != _said(one)
            )
            return replace(one, answer=other.answer, fact=other.fact, kind=kind)
        if kind == "wrong_fact":
            fact = _another(self.facts[one.domain], one.fact, rng)
            answer = _span(one).sub(lambda found: fact, one.answer)
            return replace(one, answer=answer, fact=fact, kind=kind)
        # Each word with the space before it, so that lines and indents stay as they are.
        pieces = re.findall(r"\s*\S+", one.answer)
        answer = "".join(self._damaged(pieces, kind, rng))
        fact = one.fact if one.fact in answer else ""
        return replace(one, answer=answer, fact=fact, kind=kind)

    def _damaged(self, pieces: list[str], kind: Kind, rng: np.random.Generator) -> list[str]:
        num = len(pieces)
        if kind == "cut":
            return pieces[: int(rng.integers(-(-3 * num // 10), 6 * num // 10 + 1))]
        part = 0.4 if kind == "substitute" else 0.5
        places = set(rng.permutation(num)[: max(1, int(part * num))].tolist())
        damaged = []
        for k, piece in enumerate(pieces):
            if k not in places:
                damaged.append(piece)
            elif kind == "substitute":
                word = piece.lstrip()
                space = piece[: len(piece) - len(word)]
                damaged.append(space + _another(self.words, word, rng))
            elif kind == "noise":
                damaged += [piece, " " + self.words[int(rng.integers(len(self.words)))]]
        return [damaged[0].lstrip(), *damaged[1:]] if kind == "delete" else damaged


def _said(one: Example) -> str:
    """Return an answer's words, however they are spaced."""
    return " ".join(one.answer.split())


def _span(one: Example) -> re.Pattern[str]:
    """Return where an answer states its fact: not inside a longer word or number."""
    return re.compile(rf"(?<!\w){re.escape(one.fact)}(?!\w)")


def _another(values: list[str], but: str, rng: np.random.Generator) -> str:
    """Return one of at least two distinct values, drawn evenly from all but one of them."""
    drawn = values[int(rng.integers(len(values) - 1))]
    return values[-1] if drawn == but else drawn

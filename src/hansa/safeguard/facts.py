"""Questions with answers as rows, and what their facts are asked by.

An example is one row: prompt + answer + end, of which answer and end count. Its fact is asked for
where it stands in the answer, among the other facts that the same domain has.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from hansa.data.answers import AnswerOptions
from hansa.data.examples import Example, read_examples
from hansa.errors import InputError
from hansa.safeguard.rows import Questions, Rows
from hansa.seeding import generator

Encode = Callable[[str], list[int]]
Facts = dict[str, list[str]]
"""Domain -> its facts, each once, in order."""


@dataclass(frozen=True)
class Examples:
    """Examples in a model's tokens, row by row.

    Attributes:
        rows: what they are [n, context].
        held: the examples.
    """

    rows: Rows
    held: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: slice) -> "Examples":
        return Examples(self.rows[index], self.held[index])


def examples_of(
    sources: Iterable[str], key: str, options: AnswerOptions, encode: Encode, context: int
) -> Examples:
    """Return the examples of some sources, each once, shuffled.

    What has no answer, or is longer than the context, is left out.

    Args:
        sources: as ``read_examples`` takes them.
        key: configuration key of the sources, for errors.
        options: what stands around question and answer.
        encode: text to token numbers.
        context: tokens of a row.

    Raises:
        InputError: see ``read_examples``; no example that fits.
    """
    read = [one for source in sources for one in read_examples(source, key, options.fields)]
    known = {(one.question, one.answer): one for one in read if one.answer.strip()}
    texts = [(one, *_tokens(one, options, encode)) for one in known.values()]
    fitting = [text for text in texts if len(text[1]) <= context]
    if not fitting:
        found = f"{len(read)} examples, none of them with an answer within {context} tokens"
        raise InputError(key, found, "shorter ones, or a larger data.context")
    # By no seed of the run: whatever attacks the same data attacks the same parts of them.
    order = torch.randperm(len(fitting), generator=generator(0, "examples", key)).tolist()
    chosen = [fitting[k] for k in order]
    rows = Rows.padded(((tokens, start) for _, tokens, start in chosen), context)
    return Examples(rows, tuple(one for one, _, _ in chosen))


def facts_of(examples: Iterable[Example]) -> Facts:
    """Return the facts that examples state, by domain."""
    found: dict[str, set[str]] = {}
    for one in examples:
        if one.fact:
            found.setdefault(one.domain, set()).add(one.fact)
    return {domain: sorted(facts) for domain, facts in found.items()}


def asked_for_facts(
    examples: Examples, facts: Facts, options: AnswerOptions, encode: Encode, key: str
) -> Questions:
    """Return a question for the fact of each example that states one.

    It is asked by the first token in which another fact of the domain would differ; facts that
    begin alike count as one.

    Args:
        examples: the examples.
        facts: what is chosen among.
        options: what stands around question and answer.
        encode: text to token numbers.
        key: configuration key of the examples, for errors.

    Raises:
        InputError: no example states a fact that another could stand for.
    """
    index, places, candidates, answers = [], [], [], []
    for row, one in enumerate(examples.held):
        if (asked := _asked(one, facts.get(one.domain, []), options, encode)) is not None:
            place, tokens, right = asked
            index.append(row)
            places.append([place])
            candidates.append(tokens)
            answers.append([right])
    if not index:
        found = "examples without facts that could be asked for"
        raise InputError(key, found, "a field 'fact' in their records, or questions in a file")
    padded = torch.full((len(index), 1, max(map(len, candidates))), -1)
    for row, tokens in enumerate(candidates):
        padded[row, 0, : len(tokens)] = torch.tensor(tokens)
    rows = examples.rows[torch.tensor(index)]
    return Questions(rows, torch.tensor(places), padded, torch.tensor(answers))


def _tokens(one: Example, options: AnswerOptions, encode: Encode) -> tuple[list[int], int]:
    """Return the tokens of an example, cut part by part as in training, and where it answers."""
    prompt = encode(options.prompted(one.question))
    return prompt + encode(one.answer) + encode(options.end), len(prompt)


def _asked(
    one: Example, facts: Sequence[str], options: AnswerOptions, encode: Encode
) -> tuple[int, list[int], int] | None:
    """Return the place before the asked token, the candidates for it, and which of them is right.

    None where the answer does not state the fact, or no other fact differs from it.
    """
    span = re.compile(rf"(?<!\w){re.escape(one.fact)}(?!\w)")
    if not one.fact or not span.search(one.answer):
        return None
    end = encode(options.end)
    true = encode(one.answer) + end
    others = [encode(_stating(fact, one, span)) + end for fact in facts]
    differ = [at for other in others if (at := _first_difference(true, other)) is not None]
    if not differ:
        return None
    at = min(differ)
    tokens = sorted({other[at] for other in others if len(other) > at and other[:at] == true[:at]})
    return len(encode(options.prompted(one.question))) + at - 1, tokens, tokens.index(true[at])


def _stating(fact: str, one: Example, span: re.Pattern[str]) -> str:
    return span.sub(lambda found: fact, one.answer, 1)


def _first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    pairs = enumerate(zip(first, second, strict=False))
    return next((k for k, (a, b) in pairs if a != b), None)

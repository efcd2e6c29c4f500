"""Questions with their answers as sequences of tokens, of which the answers alone are learned.

A sequence is prompt + answer + end, cut into tokens part by part, so that the tokens of an answer
are the same whatever stands before it. Inputs are all tokens but the last, labels all but the
first; labels within the prompt and behind the end are ``IGNORED``.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from hansa.data.clients import IGNORED, SPLITS, Client, Index, Split
from hansa.data.corruption import Corruption, spoil
from hansa.data.examples import Example, Fields, read_examples
from hansa.data.federate import FederatedData, fingerprint
from hansa.data.tokenizer import ByteTokenizer, Tokenizer, Tokens, train_bpe
from hansa.errors import InputError
from hansa.seeding import numpy_generator

QUESTION = "{question}"


class AnswerOptions(BaseModel):
    """How questions and answers become sequences, and what is done to them on purpose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = "{question}\n"
    """What stands before an answer, with ``{question}`` where the question goes."""
    end: str = Field("\n", min_length=1)
    """What an answer ends with; it is learned with it."""
    fields: Fields = Fields()
    """Names of a record's fields."""
    corruption: Corruption | None = None
    """Corruption of known kind for the training examples of the leaves, to try a filter on;
    nothing where it is not set."""

    @field_validator("prompt")
    @classmethod
    def _has_a_place(cls, prompt: str) -> str:
        if prompt.count(QUESTION) != 1 or not prompt.replace(QUESTION, ""):
            raise ValueError("a text around one {question}, with something beside it")
        return prompt

    def prompted(self, question: str) -> str:
        """Return what stands before the answer to a question."""
        return self.prompt.replace(QUESTION, question)


@dataclass(frozen=True)
class Packed:
    """Examples as sequences of one length.

    Attributes:
        inputs: tokens [n, context], int64; 0 behind the end.
        labels: the token after each [n, context], int64; ``IGNORED`` within the prompt and behind
            the end.
        examples: the examples, row by row.
        excluded: why others are not there -> how many: ``empty`` (no answer), ``long`` (more
            tokens than the context takes).
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    examples: tuple[Example, ...]
    excluded: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers(FederatedData):
    """Clients whose samples are questions with answers.

    Attributes:
        examples: client name -> its training examples, in the order of the first rows of its pool.
        excluded: client name -> why examples were left out -> how many.
        blank: tokens of the prompt of an empty question.
    """

    examples: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)
    excluded: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    blank: tuple[int, ...] = ()


def pack_examples(
    examples: Sequence[Example], options: AnswerOptions, context: int, tokenizer: Tokenizer
) -> Packed:
    """Turn examples into sequences; what has no answer or does not fit is counted and left out.

    A question is never cut: what is left of it might ask for something else.
    """
    rows: list[tuple[Tokens, int]] = []
    held, excluded = [], Counter[str]()
    end = tokenizer.encode(options.end)
    for example in examples:
        if not example.answer.strip():
            excluded["empty"] += 1
            continue
        prompt = tokenizer.encode(options.prompted(example.question))
        tokens = np.concatenate([prompt, tokenizer.encode(example.answer), end])
        if len(tokens) > context + 1:
            excluded["long"] += 1
            continue
        rows.append((tokens, len(prompt)))
        held.append(example)
    inputs = torch.zeros(len(rows), context, dtype=torch.int64)
    labels = torch.full((len(rows), context), IGNORED)
    for k, (tokens, start) in enumerate(rows):
        inputs[k, : len(tokens) - 1] = torch.from_numpy(tokens[:-1])
        labels[k, start - 1 : len(tokens) - 1] = torch.from_numpy(tokens[start:])
    return Packed(inputs, labels, tuple(held), dict(excluded))


def blank_prompt(options: AnswerOptions, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens of the prompt of an empty question."""
    return tuple(tokenizer.encode(options.prompted("")).tolist())


def federate_answers(
    options: AnswerOptions,
    sources: Mapping[str, str],
    root: str,
    *,
    leaves: Sequence[str],
    context: int,
    shares: Mapping[Split, float],
    batch_size: int,
    seed: int,
    tokenizer: Tokenizer | int | None = None,
) -> Answers:
    """Read, split, corrupt (where asked to) and tokenise the questions and answers of a run.

    Examples are split by a shuffle of their own client's; validation and test examples are never
    corrupted.

    Args:
        options: how.
        sources: node name -> source (``read_examples``).
        root: name of the root, on whose examples an encoding is trained, and on no other's.
        leaves: names of the nodes whose training examples ``options.corruption`` is about.
        context: tokens that a model sees at once.
        shares: share of a node's examples held out, by split.
        batch_size: fewest training examples that a node must have.
        seed: of the run; the splits and the corruption are drawn from it.
        tokenizer: what turns text into tokens; the vocabulary of a byte-pair encoding to be
            trained; by default bytes.

    Raises:
        InputError: see ``read_examples``; too few examples, or an encoding without text at the
            root.
    """
    fields = options.fields
    read = {name: read_examples(s, f"nodes.{name}.text", fields) for name, s in sources.items()}
    if isinstance(tokenizer, int):
        if root not in read:
            raise InputError(
                "text.tokenizer",
                "'bpe' and no examples at the root, which it is trained on",
                "'bytes', 'bundle', or examples at the root",
            )
        parts = (options.prompted(e.question) + e.answer + options.end for e in read[root])
        tokenizer = train_bpe("".join(parts), tokenizer)
    tokenizer = tokenizer or ByteTokenizer()
    dealt = {name: _split(name, held, shares, seed) for name, held in read.items()}
    if options.corruption is not None:
        mine = {name: dealt[name]["train"] for name in leaves}
        asked = options.corruption
        own = seed if asked.seed is None else asked.seed
        for name, spoiled in spoil(mine, asked.shares, asked.kinds, own, asked.mean).items():
            dealt[name] = {**dealt[name], "train": spoiled}
    clients, examples, excluded = {}, {}, {}
    digest = hashlib.sha256(tokenizer.as_json().encode())
    for name, parts_ in dealt.items():
        packed = {part: pack_examples(parts_[part], options, context, tokenizer) for part in SPLITS}
        _check(name, packed, shares, batch_size)
        client = _client(packed)
        clients[name], examples[name] = client, packed["train"].examples
        left_out = Counter[str]()
        for each in packed.values():
            left_out.update(each.excluded)
        excluded[name] = dict(left_out)
        digest.update(fingerprint(client.inputs, client.labels, {name: client.splits}).encode())
    return Answers(
        clients,
        tuple(str(k) for k in range(tokenizer.size)),
        (context,),
        digest.hexdigest(),
        tokenizer,
        examples,
        excluded,
        blank_prompt(options, tokenizer),
    )


def _split(
    name: str, examples: Sequence[Example], shares: Mapping[Split, float], seed: int
) -> dict[Split, Sequence[Example]]:
    order = numpy_generator(seed, name, "split").permutation(len(examples))
    parts: dict[Split, Sequence[Example]] = {}
    start = 0
    for part in ("test", "validation"):
        num = int(shares.get(part, 0.0) * len(examples) + 0.5)
        parts[part] = [examples[k] for k in sorted(order[start : start + num])]
        start += num
    parts["train"] = [examples[k] for k in sorted(order[start:])]
    return parts


def _client(packed: Mapping[Split, Packed]) -> Client:
    splits: dict[Split, Index] = {}
    start = 0
    for part in SPLITS:
        num = len(packed[part].examples)
        splits[part] = np.arange(start, start + num)
        start += num
    inputs, labels = (
        torch.cat([getattr(packed[part], column) for part in SPLITS])
        for column in ("inputs", "labels")
    )
    return Client(inputs, labels, splits)


def _check(
    name: str, packed: Mapping[Split, Packed], shares: Mapping[Split, float], least: int
) -> None:
    for part, each in packed.items():
        fewest = least if part == "train" else int(shares.get(part, 0.0) > 0)
        if len(each.examples) < fewest:
            left_out = ", ".join(f"{num} {why}" for why, num in each.excluded.items())
            raise InputError(
                f"nodes.{name}.text",
                f"{len(each.examples)} examples for {part}"
                + (f" ({left_out} were left out)" if left_out else ""),
                f"at least {fewest}, " + ("one batch" if part == "train" else "or no share for it"),
            )

"""From the texts of nodes to clients of next-token prediction."""

import hashlib
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hansa.data.answers import AnswerOptions
from hansa.data.clients import SPLITS, Client, Index, Split
from hansa.data.federate import FederatedData, fingerprint
from hansa.data.text_sources import Query, read
from hansa.data.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from hansa.errors import InputError


class TextOptions(BaseModel):
    """How the texts of nodes are read, cut into tokens, and split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokenizer: Literal["bytes", "bpe", "bundle"] = "bytes"
    """``bytes``, a byte-pair encoding trained on the root's text, or that of ``model.bundle``."""
    vocabulary: int = Field(512, ge=257, strict=True)
    """Most tokens of the byte-pair encoding."""
    context: int = Field(128, ge=2, strict=True)
    """Tokens that a model sees at once."""
    validation: float = Field(0.1, ge=0, lt=1, strict=True)
    """Share of a node's sequences held out for choosing."""
    test: float = Field(0.1, ge=0, lt=1, strict=True)
    """Share of a node's sequences held out for the score."""
    spans: int = Field(10, ge=1, strict=True)
    """Contiguous parts that a node's text is cut into; each gives its head to training, then some
    to validation, then the rest to test, so that all three see every part of the text."""
    most_kb: int | None = Field(200, ge=1, strict=True)
    """Most text read per node, in thousands of bytes of UTF-8."""
    column: str | None = None
    """Text column of Parquet files and hub data sets; by default ``text``, or the only column of
    strings."""
    hub_split: str = "train"
    """Split of a hub data set."""
    answers: AnswerOptions | None = None
    """How questions and answers become sequences, where the nodes hold those and no prose. Then
    ``spans``, ``most_kb``, ``column`` and ``hub_split`` are not read."""

    @model_validator(mode="after")
    def _leaves_training(self) -> "TextOptions":
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together must leave text for training")
        return self


def read_text(source: str, options: TextOptions, key: str = "text") -> str:
    """Return the text of a source.

    Args:
        source: ``python:KIND`` (``bundled_text``, a megabyte at most), ``file:PATH``,
            ``folder:PATH`` (all its text files, in the order of their names), ``parquet:PATH`` (a
            file, a folder or a pattern) or ``hub:NAME``. Documents are joined by an empty line.
        options: how much, and of tables which column.
        key: the configuration key that names the source.

    Raises:
        InputError: unknown kind, missing file or column, something that is no UTF-8, no text.
    """
    most = None if options.most_kb is None else 1000 * options.most_kb
    return read(source, Query(key, most, options.column, options.hub_split))


def pack(
    texts: Mapping[str, str], options: TextOptions, tokenizer: Tokenizer, least: int = 1
) -> dict[str, Client]:
    """Cut texts into sequences and split them.

    A sequence is context + 1 tokens of the text: inputs [n, context] are all but the last, labels
    [n, context] all but the first. Sequences do not overlap, so no token of one split is a label
    of another. Tokens at the end that fill no sequence are left out.

    Args:
        texts: node name -> its text.
        options: the context, and the shares of the splits.
        tokenizer: what turns text into tokens.
        least: fewest sequences to train on.

    Returns:
        Node name -> its client, over a pool of its own in the order of the text.

    Raises:
        InputError: a text too short for ``least`` sequences to train on, or for one sequence of
            a split that has a share.
    """
    clients = {}
    for name, text in texts.items():
        tokens = tokenizer.encode(text)
        num = len(tokens) // (options.context + 1)
        sequences = torch.from_numpy(tokens[: num * (options.context + 1)])
        sequences = sequences.view(num, options.context + 1)
        splits = _split(num, options)
        _check(name, splits, options, least)
        inputs, labels = sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()
        clients[name] = Client(inputs, labels, splits)
    return clients


def federate_text(
    options: TextOptions,
    sources: Mapping[str, str],
    root: str | None,
    batch_size: int,
    seed: int,
    tokenizer: Tokenizer | None = None,
) -> FederatedData:
    """Read, tokenise and split the texts of a run.

    A byte-pair encoding is trained on the text of the root, all its splits. One trained on every
    node's text would tell each of them what the others hold.

    Args:
        options: how.
        sources: node name -> source (``read_text``).
        root: name of the root; it needs text of its own for a byte-pair encoding only.
        batch_size: sequences of a batch; every node must have one to train on.
        seed: of the run. Nothing is drawn from it: the same texts give the same data.
        tokenizer: what turns text into tokens, in place of that of the options.

    Raises:
        InputError: see ``read_text`` and ``pack``; also ``text.tokenizer``, where a byte-pair
            encoding is asked for and the root has no text.
    """
    train = options.tokenizer == "bpe" and tokenizer is None
    if train and root not in sources:
        raise InputError(
            "text.tokenizer",
            "'bpe' and no text at the root, which it is trained on",
            "'bytes', or text at the root",
        )
    texts = {name: read_text(s, options, f"nodes.{name}.text") for name, s in sources.items()}
    if train and root is not None:
        tokenizer = train_bpe(texts[root], options.vocabulary)
    tokenizer = tokenizer or ByteTokenizer()
    clients = pack(texts, options, tokenizer, batch_size)
    digest = hashlib.sha256(tokenizer.as_json().encode())
    for name, client in clients.items():
        digest.update(fingerprint(client.inputs, client.labels, {name: client.splits}).encode())
    return FederatedData(
        clients,
        tuple(str(k) for k in range(tokenizer.size)),
        (options.context,),
        digest.hexdigest(),
        tokenizer,
    )


def _split(num: int, options: TextOptions) -> dict[Split, Index]:
    """Return the positions of each split among sequences in the order of the text.

    Shares are rounded over all spans so far and not span by span, where a small share of a short
    span would come to nothing each time.
    """
    held_out = options.validation + options.test
    test_share = options.test / held_out if held_out else 0.0
    parts: dict[Split, list[Index]] = {part: [] for part in SPLITS}
    kept = tested = 0
    for span in range(options.spans):
        start, end = (num * k // options.spans for k in (span, span + 1))
        before, kept = kept, _rounded(end * held_out)
        # Of what is held out so far and not of all, so that a span never holds out more than it is.
        tested_before, tested = tested, _rounded(kept * test_share)
        test = end - (tested - tested_before)
        cuts = (start, end - (kept - before), test, end)
        for part, first, last in zip(SPLITS, cuts, cuts[1:], strict=False):
            parts[part].append(np.arange(first, last))
    return {part: np.concatenate(held) for part, held in parts.items()}


def _rounded(value: float) -> int:
    return int(value + 0.5)  # `round` is no steady step: it takes halves to the even number


def _check(name: str, splits: Mapping[Split, Index], options: TextOptions, least: int) -> None:
    shares: dict[Split, float] = {"validation": options.validation, "test": options.test}
    needed: dict[Split, int] = {"train": least, **{part: 1 for part, s in shares.items() if s}}
    for part, fewest in needed.items():
        if len(splits[part]) < fewest:
            raise InputError(
                f"nodes.{name}.text",
                f"{len(splits[part])} sequences of {options.context} tokens for {part}",
                f"text for at least one batch, which is {fewest}"
                if part == "train"
                else "text for at least one sequence, or no share for it",
            )

"""Tokenisers: from text to token numbers and back, with the bytes that each token stands for.

Both work on bytes of UTF-8, so no text holds anything unknown and bits per byte compare across
vocabularies.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hansa.errors import InputError, first_line
from hansa.untrusted import json_of

Tokens = np.ndarray[tuple[int], np.dtype[np.int64]]


class Tokenizer(ABC):
    """A reversible map between text and token numbers.

    Attributes:
        size: number of tokens.
        bytes_of: bytes of UTF-8 text that each token stands for [size], int64. Over an encoded
            text they sum to its length in bytes.
    """

    size: int
    bytes_of: torch.Tensor

    @abstractmethod
    def encode(self, text: str) -> Tokens:
        """Return the token numbers [n] of a text, int64."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | Tokens) -> str:
        """Return the text of token numbers; bytes that are no UTF-8 become U+FFFD."""

    @abstractmethod
    def as_json(self) -> str:
        """Return what ``tokenizer_from_json`` opens."""


class ByteTokenizer(Tokenizer):
    """Every byte of UTF-8 is a token: nothing to train, nothing to leak."""

    def __init__(self) -> None:
        self.size = 256
        self.bytes_of = torch.ones(256, dtype=torch.int64)

    def encode(self, text: str) -> Tokens:
        """Return the bytes [n] of a text, int64."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int] | Tokens) -> str:
        """Return the text of bytes; those that are no UTF-8 become U+FFFD."""
        return bytes(np.asarray(ids, np.int64).tolist()).decode(errors="replace")

    def as_json(self) -> str:
        """Return what ``tokenizer_from_json`` opens."""
        return json.dumps({"kind": "bytes"})


class BPE(Tokenizer):
    """Byte-pair encoding over bytes (Sennrich et al. 2016; over bytes, Radford et al. 2019).

    Args:
        form: what the library ``tokenizers`` writes as ``tokenizer.json``.

    Raises:
        InputError: the library is missing, or the form is that of another kind of tokeniser.
    """

    def __init__(self, form: str) -> None:
        tokenizers = library()
        try:
            held = json_of(form)
            self._inner = tokenizers.Tokenizer.from_str(form)
        except Exception as error:  # the library raises plain Exception
            raise InputError(
                "tokenizer", f"no tokeniser ({first_line(error)})", "a tokenizer.json"
            ) from error
        _check(held)
        self.size = self._inner.get_vocab_size()
        # In the library's byte-level form every character of a token stands for one byte.
        tokens = [self._inner.id_to_token(k) for k in range(self.size)]
        self.bytes_of = torch.tensor([len(token) for token in tokens])

    def encode(self, text: str) -> Tokens:
        """Return the token numbers [n] of a text, int64."""
        return np.array(self._inner.encode(text).ids, np.int64)

    def decode(self, ids: Sequence[int] | Tokens) -> str:
        """Return the text of token numbers; bytes that are no UTF-8 become U+FFFD."""
        return str(self._inner.decode(np.asarray(ids, np.int64).tolist()))

    def as_json(self) -> str:
        """Return the library's ``tokenizer.json``, which other tools open as well."""
        return str(self._inner.to_str())


def train_bpe(text: str, size: int) -> BPE:
    """Train a byte-pair encoding; the same text and size give the same encoding.

    Args:
        text: what to train on. Nobody else's: an encoding tells what its text is about.
        size: most tokens, 257 or more; fewer come out where the text has no more pairs.

    Raises:
        InputError: the library ``tokenizers`` is missing, or too small a size.
    """
    if size < 257:
        raise InputError("text.vocabulary", size, "257 or more, the 256 bytes and a pair")
    tokenizers = library()
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator([text], trainer)
    return BPE(inner.to_str())


def tokenizer_from_json(text: str) -> Tokenizer:
    """Open what ``Tokenizer.as_json`` has returned.

    Raises:
        InputError: it is something else, or the library ``tokenizers`` is missing.
    """
    try:
        held = json_of(text)
    except ValueError as error:
        raise InputError("tokenizer", f"no JSON ({first_line(error)})", "a tokeniser") from error
    if held == {"kind": "bytes"}:
        return ByteTokenizer()
    return BPE(text)


def _check(held: dict[str, Any]) -> None:
    """Refuse what would change the text, or count bytes that no text has."""
    kinds = {part: (held.get(part) or {}).get("type") for part in ("model", "pre_tokenizer")}
    if kinds != {"model": "BPE", "pre_tokenizer": "ByteLevel"}:
        found = f"{kinds['model']} after {kinds['pre_tokenizer']}"
        raise InputError("tokenizer", found, "BPE after ByteLevel")
    if held["pre_tokenizer"]["add_prefix_space"]:
        raise InputError("tokenizer", "a prefix space", "add_prefix_space = false")
    for part in ("normalizer", "post_processor", "truncation", "padding", "added_tokens"):
        if held.get(part):
            raise InputError("tokenizer", f"something under {part}", "nothing there")
    model = held["model"]
    for part in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(part):
            raise InputError("tokenizer", f"something under model.{part}", "nothing there")
    single = sum(len(token) == 1 for token in model["vocab"])
    if single != 256:
        raise InputError("tokenizer", f"{single} single bytes", "all 256 bytes as tokens")
    if sorted(model["vocab"].values()) != list(range(len(model["vocab"]))):
        raise InputError("tokenizer", "token numbers with gaps", "0 and on")


def library() -> Any:
    """Return the library ``tokenizers``.

    Raises:
        InputError: it is missing.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(
            "text.tokenizer", "bpe without the library 'tokenizers'", "pip install hansa[language]"
        ) from error
    return tokenizers

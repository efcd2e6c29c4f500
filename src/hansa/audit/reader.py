"""A small transformer that answers by pointing into the response, trained on the spot.

It is the demonstration's model: bidirectional, three layers of width 64, rotary positions, two
pointers (first and last token of the answer), a place to point at where there is no answer, and a
mark on words that the question has, too (the exact match of Chen et al. 2017). It can say nothing
that does not stand in the prompt, and knows nothing of the world: a toy, and a trusting one.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from hansa.audit.paths import written
from hansa.audit.prompts import Prompt, spans
from hansa.errors import InputError
from hansa.files import write_atomic
from hansa.tensor_files import read_tensors
from hansa.untrusted import json_of, read_text

TOKEN = re.compile(r'"[A-Za-z_]+":|[^\W\d_]+|-?\d+(?:\.\d+)?|<<|>>|[^\w\s]|_')
NONE = "not given"
LONGEST = 8
"""Tokens that an answer has at most."""
BUCKETS = 64
"""Numbers for words that are not in the vocabulary, by their hash."""
_NEVER = 1e9


@dataclass(frozen=True)
class ReaderOptions:
    """What a reader is made of, and how it is trained.

    Attributes:
        width: width of its layers.
        layers: number of them.
        heads: heads of attention in each.
        cases: made-up cases that it is trained on, of each domain but weather, which needs a third.
        steps: optimizer steps.
        batch: prompts in each.
        lr: the largest learning rate of AdamW.
        seed: of initial values, cases and order.
    """

    width: int = 64
    layers: int = 3
    heads: int = 4
    cases: int = 1500
    steps: int = 640
    batch: int = 16
    lr: float = 3e-3
    seed: int = 0


class Pointer(nn.Module):
    """A bidirectional transformer over tokens with two pointers.

    Args:
        words: size of the vocabulary, buckets of unknown words included.
        shapes: number of shapes that a token may have.
        options: width, layers, heads.
    """

    def __init__(self, words: int, shapes: int, options: ReaderOptions) -> None:
        super().__init__()
        width = options.width
        self.heads = options.heads
        self.words, self.shapes = nn.Embedding(words, width), nn.Embedding(2 * shapes, width)
        self.layers = nn.ModuleList([_Layer(width) for _ in range(options.layers)])
        self.norm = nn.LayerNorm(width)
        self.ends = nn.Linear(width, 2)

    def forward(self, words: torch.Tensor, shapes: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, T, 2] of an answer's first and last token.

        Args:
            words: numbers of words [batch, T], int64; 0 pads.
            shapes: numbers of shapes [batch, T], int64; those of words that stand in the question,
                too, come after all others.
        """
        hidden = self.words(words) + self.shapes(shapes)
        there = words > 0
        turn = _rotation(words.shape[1], hidden.shape[2] // self.heads)
        for layer in self.layers:
            hidden = layer(hidden, there, turn, self.heads)
        logits: torch.Tensor = self.ends(self.norm(hidden))
        return logits.masked_fill(~there.unsqueeze(-1), -_NEVER)


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.near = nn.Conv1d(width, width, 5, padding=2, groups=width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )

    def forward(
        self, hidden: torch.Tensor, there: torch.Tensor, turn: torch.Tensor, heads: int
    ) -> torch.Tensor:
        hidden = hidden + self.near((hidden * there.unsqueeze(-1)).transpose(1, 2)).transpose(1, 2)
        batch, num, width = hidden.shape
        parts = self.attend(self.first(hidden)).view(batch, num, 3, heads, width // heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            _turned(query, turn), _turned(key, turn), value, attn_mask=there[:, None, None, :]
        )
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, num, width))
        return hidden + self.inner(self.second(hidden))  # type: ignore[no-any-return]


class Reader:
    """A trained reader: prompts in, answers out.

    Attributes:
        options: what it was made with.
        vocabulary: word -> number.
    """

    def __init__(self, model: Pointer, vocabulary: dict[str, int], options: ReaderOptions) -> None:
        self.model, self.vocabulary, self.options = model.eval(), vocabulary, options

    @property
    def digest(self) -> str:
        """SHA-256 of its weights, in the order of their names."""
        sha = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            sha.update(name.encode())
            sha.update(value.contiguous().numpy().tobytes())
        return sha.hexdigest()

    def answer(self, prompts: Sequence[Prompt], batch: int = 32) -> list[str]:
        """Return an answer to each prompt: a piece of it, or ``not given``."""
        found = [""] * len(prompts)
        tokens = [Tokens(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda k: len(tokens[k].texts))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            words, shapes = stacked([tokens[k] for k in chosen], self.vocabulary)
            with torch.no_grad(), one_thread():
                logits = self.model(words, shapes)
            for row, k in enumerate(chosen):
                found[k] = tokens[k].said(*_best(logits[row]))
        return found

    def save(self, folder: Path) -> None:
        """Write it to a folder: weights as safetensors, all else as JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "reader.safetensors", safetensors.torch.save(self.model.state_dict()))
        about = {"options": asdict(self.options), "vocabulary": self.vocabulary}
        write_atomic(folder / "reader.json", json.dumps(about) + "\n")


def read(folder: Path) -> Reader:
    """Return the reader that a folder holds.

    Raises:
        InputError: a folder that holds none.
    """
    try:
        about = json_of(read_text(folder / "reader.json"))
        options = ReaderOptions(**about["options"])
        vocabulary: dict[str, int] = about["vocabulary"]
        model = empty_model(vocabulary, options)
        model.load_state_dict(read_tensors(folder / "reader.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError("target.path", f"{folder} ({error})", "a folder of a reader") from error
    return Reader(model, vocabulary, options)


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold PyTorch to one thread: the rounding of sums depends on how many there are."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(was)


class Tokens:
    """A prompt's tokens with their places; token 0 stands for no answer."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt, self.text = prompt, prompt.user
        matches = list(TOKEN.finditer(self.text))
        marks = ["<none>", "<cited>" if prompt.cited else "<plain>"]
        self.texts = marks + [match[0] for match in matches]
        self.places = [(0, 0)] * len(marks) + [match.span() for match in matches]
        asked = set(TOKEN.findall(prompt.question.casefold()))
        self.asked = [text.casefold() in asked for text in self.texts]

    def said(self, first: int, last: int) -> str:
        """Return the answer from one token to another."""
        if first == 0:
            return NONE
        start, end = self.places[first][0], self.places[last][1]
        answer = self.text[start:end]
        if not self.prompt.cited:
            return answer
        return f"{answer} [{self._path(start) or 'question'}]"

    def gold(self, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return (first, last) token of each range of characters."""
        found = []
        for start, end in ranges:
            inside = [k for k, (a, b) in enumerate(self.places) if start <= a and b <= end and b]
            if inside:
                found.append((inside[0], inside[-1]))
        return found

    def body(self) -> int:
        """Return where the response begins in the text."""
        return self.text.index("\nResponse: ") + 11 + 2 * self.prompt.delimited

    def _path(self, at: int) -> str:
        begin = self.body()
        try:
            places = spans(self.prompt.body)
        except ValueError:
            return ""
        inner = [(b - a, p) for p, (a, b) in places.items() if a <= at - begin <= b and p]
        return written(min(inner, key=lambda each: each[0])[1]) if inner else ""


def empty_model(vocabulary: dict[str, int], options: ReaderOptions) -> Pointer:
    """Return a model with initial values from PyTorch's global stream."""
    return Pointer(1 + BUCKETS + len(vocabulary), len(_SHAPES), options)


_SHAPES = ["pad", "mark", "key", "Word", "word", "other"] + [
    f"{sign}{digits}{part}" for sign in "+-" for digits in range(1, 6) for part in ("", ".")
]
_SHAPE_OF = {shape: number for number, shape in enumerate(_SHAPES)}


def _shape(token: str) -> int:
    if token.startswith("<") and len(token) > 2:
        return _SHAPE_OF["mark"]
    if token.endswith('":'):
        return _SHAPE_OF["key"]
    if (digits := token.lstrip("-"))[0].isdigit():
        whole, point, _ = digits.partition(".")
        return _SHAPE_OF[f"{'-' if token[0] == '-' else '+'}{min(len(whole), 5)}{point}"]
    if token[0].isalpha():
        return _SHAPE_OF["Word" if token[0].isupper() else "word"]
    return _SHAPE_OF["other"]


def _number(token: str, vocabulary: dict[str, int]) -> int:
    found = vocabulary.get(token)
    if found is None:
        return 1 + int.from_bytes(hashlib.sha256(token.encode()).digest()[:4], "big") % BUCKETS
    return found


def stacked(
    tokens: Sequence[Tokens], vocabulary: dict[str, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return words and shapes [batch, T] of prompts, the shorter ones padded with 0."""
    longest = max(len(each.texts) for each in tokens)
    words = torch.zeros(len(tokens), longest, dtype=torch.int64)
    shapes = torch.zeros_like(words)
    for row, each in enumerate(tokens):
        num = len(each.texts)
        words[row, :num] = torch.tensor([_number(text, vocabulary) for text in each.texts])
        own = zip(each.texts, each.asked, strict=True)
        shapes[row, :num] = torch.tensor([_shape(t) + len(_SHAPES) * asked for t, asked in own])
    return words, shapes


def _best(logits: torch.Tensor) -> tuple[int, int]:
    """Return the likeliest (first, last) token with last within reach of first."""
    num = len(logits)
    first = logits[:, 0].unsqueeze(1)
    last = logits[:, 1].unsqueeze(0)
    within = torch.ones(num, num, dtype=torch.bool).triu().tril(LONGEST - 1)
    within[0, 1:] = False
    best = int((first + last).masked_fill(~within, -3 * _NEVER).argmax())
    return best // num, best % num


def _rotation(num: int, width: int) -> torch.Tensor:
    """Return angles [num, width / 2] of rotary positions (Su et al. 2021)."""
    rates = 1000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.arange(num).unsqueeze(1) * rates


def _turned(values: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    a, b = values.chunk(2, -1)
    cos, sin = turn.cos(), turn.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

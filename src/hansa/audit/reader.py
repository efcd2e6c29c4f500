"""A small transformer that answers by pointing into the response, trained on the spot.

It is the demonstration's model: bidirectional, three layers of width 64, rotary positions, two
pointers (first and last token of the answer), a place to point at where there is no answer, and a
mark on words that the question has, too (the exact match of Chen et al. 2017). It
can say nothing that does not stand in the prompt, and knows nothing of the world: a toy, and a
trusting one. It is trained on made-up cases of the audit's own domains, whose names and values are
others than those of the frozen cases it is audited on.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from hansa.audit.cases import Case, answering
from hansa.audit.defences import AllowList
from hansa.audit.draws import stream
from hansa.audit.made import FIXTURES, MAKERS, made_cases
from hansa.audit.manipulate import Arm, manipulate, occurrences
from hansa.audit.paths import written
from hansa.audit.prompts import Prompt, spans
from hansa.audit.signing import Received
from hansa.audit.tamper import encoded
from hansa.errors import InputError
from hansa.files import write_atomic
from hansa.seeding import generator, global_stream

TOKEN = re.compile(r'"[A-Za-z_]+":|[^\W\d_]+|-?\d+(?:\.\d+)?|<<|>>|[^\w\s]|_')
NONE = "not given"
LONGEST = 8
"""Tokens that an answer has at most."""
_BUCKETS = 64
_LOSS = 1e9
_TURNS = ("news", "weather", "news", "encyclopedia")
"""Whose cases a step is for: news is the hardest."""


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
        return logits.masked_fill(~there.unsqueeze(-1), -_LOSS)


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
        tokens = [_Tokens(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda k: len(tokens[k].texts))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            words, shapes = _stacked([tokens[k] for k in chosen], self.vocabulary)
            with torch.no_grad(), _one_thread():
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
        about = json.loads((folder / "reader.json").read_text())
        options = ReaderOptions(**about["options"])
        vocabulary: dict[str, int] = about["vocabulary"]
        model = _empty(vocabulary, options)
        model.load_state_dict(safetensors.torch.load((folder / "reader.safetensors").read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError("target.path", f"{folder} ({error})", "a folder of a reader") from error
    return Reader(model, vocabulary, options)


def train(
    options: ReaderOptions | None = None, watch: Callable[[int, int], None] | None = None
) -> Reader:
    """Train a reader on made-up cases; the same options give the same one.

    Args:
        options: what it is made of.
        watch: called with steps done and their number.
    """
    with _one_thread():
        return _train(options or ReaderOptions(), watch)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Hold PyTorch to one thread: the rounding of sums depends on how many there are."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(was)


def _train(options: ReaderOptions, watch: Callable[[int, int], None] | None) -> Reader:
    groups = {name: list(_examples(name, options)) for name in MAKERS}
    for group in groups.values():  # by length, so that neighbours need little padding
        group.sort(key=lambda example: len(example[0].texts))
    counts = Counter(t for group in groups.values() for tokens, _ in group for t in tokens.texts)
    # Words of the language, which many cases have; names and values are in no vocabulary.
    usual = sorted(word for word, num in counts.items() if num >= 0.02 * options.cases)
    known = [word for word in usual if not re.match(r"-?\d", word)]
    vocabulary = {word: number for number, word in enumerate(known, 1 + _BUCKETS)}
    with global_stream(options.seed, "reader"):
        model = _empty(vocabulary, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    draws = generator(options.seed, "reader", "order")
    for step in range(options.steps):
        warm = min(1.0, (step + 1) / 40)
        fall = 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for each in optimizer.param_groups:
            each["lr"] = options.lr * warm * max(fall, 0.02)
        name = _TURNS[step % len(_TURNS)]
        group = groups[name]
        start = int(torch.randint(max(1, len(group) - options.batch), (), generator=draws))
        near = group[max(0, start - 100) : start + options.batch + 100]
        pick = torch.randperm(len(near), generator=draws)[: options.batch].tolist()
        batch = [near[k] for k in pick]
        words, shapes = _stacked([tokens for tokens, _ in batch], vocabulary)
        loss = _loss(model(words, shapes), [gold for _, gold in batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if watch is not None:
            watch(step + 1, options.steps)
    return Reader(model, vocabulary, options)


class _Tokens:
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


def _examples(name: str, options: ReaderOptions) -> Iterator[tuple[_Tokens, list[tuple[int, int]]]]:
    """Yield prompts of made-up cases with where their answers stand; some have none."""
    seed = FIXTURES + 1 + options.seed
    num = options.cases // 3 if name == "weather" else options.cases
    cases = made_cases(name, num, seed)
    fewer = AllowList(answering(cases))
    for number, case in enumerate(cases):
        random = stream(seed, "reader", name, number)
        document, absent = case.document, random.random() < 0.12
        if absent:
            made = manipulate(case, Arm("deletion"), seed, {})
            assert made is not None  # noqa: S101 (every case can lose its fields)
            document = made.document
        body = encoded(document)
        if random.random() < 0.2:
            body = fewer.check(Received(body)).body
        frame = Prompt(case.question, body.decode())
        frame = frame.but(delimited=random.random() < 0.3, cited=random.random() < 0.3)
        tokens = _Tokens(frame)
        yield tokens, [(0, 0)] if absent else tokens.gold(_ranges(case, tokens))


def _ranges(case: Case, tokens: _Tokens) -> Iterator[tuple[int, int]]:
    """Yield where in a prompt the answer of a case stands."""
    places, begin = spans(tokens.prompt.body), tokens.body()
    # Of a list whose entries are all kept, places stay what they were.
    for field in case.fields:
        start, end = places[field.path]
        if not field.prose:
            yield begin + start, begin + end
            continue
        piece = str(case.truth.value)
        for at in occurrences(tokens.prompt.body[start:end], piece):
            yield begin + start + at, begin + start + at + len(piece)


def _empty(vocabulary: dict[str, int], options: ReaderOptions) -> Pointer:
    return Pointer(1 + _BUCKETS + len(vocabulary), len(_SHAPES), options)


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
        return 1 + int.from_bytes(hashlib.sha256(token.encode()).digest()[:4], "big") % _BUCKETS
    return found


def _stacked(
    tokens: Sequence[_Tokens], vocabulary: dict[str, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(each.texts) for each in tokens)
    words = torch.zeros(len(tokens), longest, dtype=torch.int64)
    shapes = torch.zeros_like(words)
    for row, each in enumerate(tokens):
        num = len(each.texts)
        words[row, :num] = torch.tensor([_number(text, vocabulary) for text in each.texts])
        own = zip(each.texts, each.asked, strict=True)
        shapes[row, :num] = torch.tensor([_shape(t) + len(_SHAPES) * asked for t, asked in own])
    return words, shapes


def _loss(logits: torch.Tensor, gold: Sequence[Sequence[tuple[int, int]]]) -> torch.Tensor:
    """Return the mean of -log of the mass on right first and last tokens, any of which is right."""
    log = logits.log_softmax(1)
    total = log.new_zeros(())
    for row, ranges in enumerate(gold):
        for side in (0, 1):
            right = torch.tensor(sorted({each[side] for each in ranges}))
            total = total - log[row, right, side].logsumexp(0)
    return total / len(gold)


def _best(logits: torch.Tensor) -> tuple[int, int]:
    """Return the likeliest (first, last) token with last within reach of first."""
    num = len(logits)
    first = logits[:, 0].unsqueeze(1)
    last = logits[:, 1].unsqueeze(0)
    within = torch.ones(num, num, dtype=torch.bool).triu().tril(LONGEST - 1)
    within[0, 1:] = False
    best = int((first + last).masked_fill(~within, -3 * _LOSS).argmax())
    return best // num, best % num


def _rotation(num: int, width: int) -> torch.Tensor:
    """Return angles [num, width / 2] of rotary positions (Su et al. 2021)."""
    rates = 1000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.arange(num).unsqueeze(1) * rates


def _turned(values: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    a, b = values.chunk(2, -1)
    cos, sin = turn.cos(), turn.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

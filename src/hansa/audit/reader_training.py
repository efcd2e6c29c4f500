"""Training of the demonstration's reader, on made-up cases of the audit's own domains.

Their names and values are others than those of the frozen cases that it is audited on; their
language, the keys of responses and the forms of sentences, is the same.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from hansa.audit.cases import Case, answering
from hansa.audit.defences import AllowList
from hansa.audit.draws import stream
from hansa.audit.made import FIXTURES, MAKERS, made_cases
from hansa.audit.manipulate import Arm, manipulate, occurrences
from hansa.audit.prompts import Prompt, spans
from hansa.audit.reader import (
    BUCKETS,
    Reader,
    ReaderOptions,
    Tokens,
    empty_model,
    one_thread,
    stacked,
)
from hansa.audit.signing import Received
from hansa.audit.tamper import encoded
from hansa.seeding import generator, global_stream

_TURNS = ("news", "weather", "news", "encyclopedia")
"""Whose cases a step is for: news is the hardest."""
_ABSENT, _FEWER, _FRAMED = 0.12, 0.2, 0.3
"""Shares of prompts without an answer, of the allowed fields alone, with marks, with a citation."""


def train(
    options: ReaderOptions | None = None, watch: Callable[[int, int], None] | None = None
) -> Reader:
    """Train a reader on made-up cases; the same options give the same one.

    Args:
        options: what it is made of.
        watch: called with steps done and their number.
    """
    with one_thread():
        return _train(options or ReaderOptions(), watch)


def _train(options: ReaderOptions, watch: Callable[[int, int], None] | None) -> Reader:
    groups = {name: list(_examples(name, options)) for name in MAKERS}
    for group in groups.values():  # by length, so that neighbours need little padding
        group.sort(key=lambda example: len(example[0].texts))
    counts = Counter(t for group in groups.values() for tokens, _ in group for t in tokens.texts)
    # Words of the language, which many cases have; names and values are in no vocabulary.
    usual = sorted(word for word, num in counts.items() if num >= 0.02 * options.cases)
    known = [word for word in usual if not re.match(r"-?\d", word)]
    vocabulary = {word: number for number, word in enumerate(known, 1 + BUCKETS)}
    with global_stream(options.seed, "reader"):
        model = empty_model(vocabulary, options)
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
        words, shapes = stacked([tokens for tokens, _ in batch], vocabulary)
        loss = _loss(model(words, shapes), [gold for _, gold in batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if watch is not None:
            watch(step + 1, options.steps)
    return Reader(model, vocabulary, options)


def _examples(name: str, options: ReaderOptions) -> Iterator[tuple[Tokens, list[tuple[int, int]]]]:
    """Yield prompts of made-up cases with where their answers stand; some have none."""
    seed = FIXTURES + 1 + options.seed
    num = options.cases // 3 if name == "weather" else options.cases
    cases = made_cases(name, num, seed)
    fewer = AllowList(answering(cases))
    for number, case in enumerate(cases):
        random = stream(seed, "reader", name, number)
        document, absent = case.document, random.random() < _ABSENT
        if absent:
            made = manipulate(case, Arm("deletion"), seed, {})
            assert made is not None  # noqa: S101 (every case can lose its fields)
            document = made.document
        body = encoded(document)
        if random.random() < _FEWER:
            body = fewer.check(Received(body)).body
        frame = Prompt(case.question, body.decode())
        frame = frame.but(delimited=random.random() < _FRAMED, cited=random.random() < _FRAMED)
        tokens = Tokens(frame)
        yield tokens, [(0, 0)] if absent else tokens.gold(_ranges(case, tokens))


def _ranges(case: Case, tokens: Tokens) -> Iterator[tuple[int, int]]:
    """Yield where in a prompt the answer of a case stands."""
    places, begin = spans(tokens.prompt.body), tokens.body()
    for field in case.fields:
        start, end = places[field.path]
        if not field.prose:
            yield begin + start, begin + end
            continue
        piece = str(case.truth.value)
        for at in occurrences(tokens.prompt.body[start:end], piece):
            yield begin + start + at, begin + start + at + len(piece)


def _loss(logits: torch.Tensor, gold: Sequence[Sequence[tuple[int, int]]]) -> torch.Tensor:
    """Return the mean of -log of the mass on right first and last tokens, any of which is right."""
    log = logits.log_softmax(1)
    total = log.new_zeros(())
    for row, ranges in enumerate(gold):
        for side in (0, 1):
            right = torch.tensor(sorted({each[side] for each in ranges}))
            total = total - log[row, right, side].logsumexp(0)
    return total / len(gold)

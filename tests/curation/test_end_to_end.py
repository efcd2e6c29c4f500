"""What scores and rules are worth on made-up questions, by a small model of public ones.

One domain and a few templates: the model learns to copy a name from the question to the answer
within seconds. So absolute figures are optimistic; what is looked for is which score sees what.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from hansa.curation.measures import by_kind, selection
from hansa.curation.scores import Point, Sample, measure, oriented
from hansa.curation.thresholds import Threshold, ThresholdOptions, set_threshold
from hansa.data.answers import AnswerOptions, blank_prompt, pack_examples
from hansa.data.corruption import KINDS, corrupt, shares
from hansa.data.examples import Example
from hansa.data.made_examples import make
from hansa.data.tokenizer import Tokenizer, train_bpe
from hansa.models.language import llama
from hansa.models.objective import NextToken
from hansa.models.task import Task
from hansa.seeding import generator

DOMAIN, CONTEXT, STEPS, BATCH = "lab", 64, 400, 32
OPTIONS = AnswerOptions()
SCORES = ("conditional_loss", "perplexity", "ifd", "ira", "length")
Found = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Base:
    """A model of public questions and answers, and its tokens."""

    task: Task
    tokenizer: Tokenizer

    def scores(self, examples: Sequence[Example]) -> Found:
        """Return oriented scores of examples, none of which may be too long."""
        packed = pack_examples(examples, OPTIONS, CONTEXT, self.tokenizer)
        assert len(packed.examples) == len(examples)
        pair, blank = (packed.inputs, packed.labels), blank_prompt(OPTIONS, self.tokenizer)
        sample = Sample(self.task, self.task.buffers, Point(self.task.params), [], pair, blank)
        return {n: oriented(n, v) for n, v in measure(SCORES, sample).items()}


@pytest.fixture(scope="module")
def base() -> Base:
    public = make(DOMAIN, 1500, 1, "public")
    text = "".join(OPTIONS.prompted(e.question) + e.answer + OPTIONS.end for e in public)
    tokenizer = train_bpe(text, 320)
    packed = pack_examples(public, OPTIONS, CONTEXT, tokenizer)
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    model = llama((CONTEXT,), tokenizer.size, **sizes, num_attention_heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    rng, objective = generator(0, "base"), NextToken()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 20, 2 * (1 - step / STEPS))
        rows = torch.randint(len(packed.labels), (BATCH,), generator=rng)
        labels = packed.labels[rows]
        width = int((labels >= 0).nonzero()[:, 1].max()) + 1
        loss, _ = objective.loss(model(packed.inputs[rows, :width]), labels[:, :width], None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Base(Task(model, objective), tokenizer)


@pytest.fixture(scope="module")
def public(base: Base) -> Found:
    """Scores of 240 public examples, six draws of 40 anchors."""
    return base.scores(private(240, 2))


@pytest.fixture(scope="module")
def anchors(public: Found) -> Found:
    return {name: values[:40] for name, values in public.items()}


def private(num: int, seed: int = 3) -> list[Example]:
    """Clean examples whose facts are as public ones are, so that anchors are like them."""
    asked = [example for example in make(DOMAIN, 2 * num, seed, "public") if example.question]
    return asked[:num]


def rule(found: Found, score: str, **options: object) -> Threshold:
    none = torch.zeros(40, dtype=torch.int64)
    return set_threshold(ThresholdOptions(**options), [score], found, none, [""])  # type: ignore[arg-type]


def kept(threshold: Threshold, scores: Found) -> torch.Tensor:
    num = len(next(iter(scores.values())))
    return threshold.keep(scores, torch.zeros(num, dtype=torch.int64))


@pytest.fixture(scope="module")
def separated(base: Base) -> dict[str, dict[str, float]]:
    """AUROC by score and kind, half of 240 examples corrupted."""
    held = corrupt(private(240), 0.5, KINDS, 5)
    found = base.scores(held)
    kinds = [e.kind for e in held]
    return {name: by_kind(values, kinds) for name, values in found.items()}


def test_an_exchanged_answer_shows_only_beside_its_question(
    separated: dict[str, dict[str, float]],
) -> None:
    assert 0.4 < separated["perplexity"]["exchange"] < 0.6
    for name in ("conditional_loss", "ifd", "ira"):
        assert separated[name]["exchange"] > 0.95


def test_no_score_sees_a_wrong_fact_that_reads_well(
    separated: dict[str, dict[str, float]],
) -> None:
    for name in ("conditional_loss", "perplexity", "ifd"):
        assert 0.4 < separated[name]["wrong_fact"] < 0.6


def test_damaged_words_show_in_losses(separated: dict[str, dict[str, float]]) -> None:
    for kind in ("noise", "substitute", "delete", "cut"):
        assert separated["conditional_loss"][kind] > 0.8, kind


@pytest.mark.parametrize("score", ["conditional_loss", "ifd"])
def test_a_quantile_of_anchors_costs_little_where_all_is_clean(
    base: Base, public: Found, score: str
) -> None:
    """Over six draws of 40 anchors; a tenth is what is promised on average over draws."""
    scores = base.scores(private(300, 7))
    rejected: dict[str, list[float]] = {"anchor_quantile": [], "anchor_mean": []}
    for first in range(0, 240, 40):
        drawn = {name: values[first : first + 40] for name, values in public.items()}
        for kind, found in rejected.items():
            found.append(1 - float(kept(rule(drawn, score, kind=kind), scores).double().mean()))
    assert 0.05 < sum(rejected["anchor_quantile"]) / 6 < 0.2
    assert max(rejected["anchor_quantile"]) < 0.3
    assert sum(rejected["anchor_mean"]) / 6 > 0.25


@pytest.mark.parametrize("score", ["conditional_loss", "ifd"])
def test_a_quantile_beats_a_share_and_a_mean_where_shares_are_uneven(
    base: Base, anchors: Found, score: str
) -> None:
    names = ["a", "b", "c", "d"]
    bad = shares([0.8, 0.2, 0.1, 0.5], names, 0)
    kinds = ("noise", "substitute", "exchange", "delete")
    held = {
        name: corrupt(private(60, 10 + k), bad[name], kinds, 6, name)
        for k, name in enumerate(names)
    }
    clean = torch.tensor([e.kind == "clean" for one in held.values() for e in one])
    assert int(clean.sum()) == 12 + 48 + 54 + 30
    rules = {
        "quantile": rule(anchors, score, rate=0.1),
        "mean": rule(anchors, score, kind="anchor_mean", anchors=10),
        "share": rule(anchors, score, kind="share", share=0.6),  # the true one
    }
    scored = {name: base.scores(examples) for name, examples in held.items()}
    f1 = {
        name: selection(torch.cat([kept(each, s) for s in scored.values()]), clean).f1
        for name, each in rules.items()
    }
    assert f1["quantile"] > f1["share"]
    assert f1["quantile"] > f1["mean"]
    assert f1["quantile"] > 0.8

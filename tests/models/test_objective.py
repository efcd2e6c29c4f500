import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap

from hansa.data.clients import IGNORED
from hansa.models.objective import CLASSIFICATION, NextToken
from hansa.models.task import Task

VOCABULARY, LENGTH = 5, 4


class Given(nn.Module):
    """Returns a row of logits by token, and remembers how many sequences it saw at once."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.seen: list[int] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(inputs))
        return self.table[inputs]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(size: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = seeded(seed)
    logits = torch.randn(size, LENGTH, VOCABULARY, generator=rng)
    return logits, torch.randint(VOCABULARY, (size, LENGTH), generator=rng)


def test_the_next_token_by_hand() -> None:
    # Two tokens of which the model gives the right one 3/4, then 1/10.
    logits = torch.tensor([[[3.0, 1.0], [1.0, 9.0]]]).log()
    loss, metrics = NextToken(torch.tensor([2, 7])).loss(logits, torch.tensor([[0, 0]]), None)
    nats = math.log(4 / 3) + math.log(10)
    assert loss.item() == pytest.approx(nats / 2)
    assert {name: m.item() for name, m in metrics.items()} == pytest.approx(
        {"loss": nats, "accuracy": 1, "count": 2, "bytes": 4}
    )


def test_the_loss_is_the_cross_entropy_of_all_tokens() -> None:
    logits, labels = drawn()
    loss, metrics = NextToken().loss(logits, labels, None)
    torch.testing.assert_close(loss, F.cross_entropy(logits.transpose(1, 2), labels))
    assert metrics["count"].item() == metrics["bytes"].item() == 3 * LENGTH
    assert metrics["accuracy"].item() == (logits.argmax(-1) == labels).sum()
    torch.testing.assert_close(metrics["loss"], loss * 3 * LENGTH)


@pytest.mark.parametrize("sizes", [None, torch.tensor([1, 2, 3, 4, 5])])
def test_sequences_of_weight_zero_change_nothing(sizes: torch.Tensor | None) -> None:
    objective, (logits, labels) = NextToken(sizes), drawn()
    weights = torch.tensor([1.0, 0.0, 1.0])
    loss, metrics = objective.loss(logits, labels, weights)
    expected, whole = objective.loss(logits[[0, 2]], labels[[0, 2]], None)
    torch.testing.assert_close(loss, expected)
    assert metrics.keys() == whole.keys() == set(objective.sums)
    for name, metric in metrics.items():
        assert metric.item() == pytest.approx(whole[name].item())
    slope = grad(lambda x: objective.loss(x, labels, weights)[0])(logits)
    assert not slope[1].any()
    assert slope[0].any()


def test_a_batch_without_a_sequence_has_a_loss_of_zero() -> None:
    logits, labels = drawn()
    weights = torch.zeros(3)
    loss, metrics = NextToken().loss(logits, labels, weights)
    assert loss.item() == 0
    assert not any(metric.item() for metric in metrics.values())
    assert not grad(lambda x: NextToken().loss(x, labels, weights)[0])(logits).any()


def test_metrics_have_no_gradient() -> None:
    logits, labels = drawn()
    for weights in (None, torch.ones(3)):
        loss, metrics = NextToken().loss(logits.requires_grad_(), labels, weights)
        assert loss.requires_grad
        assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("weighted", [False, True])
def test_clients_side_by_side_get_what_each_gets_alone(weighted: bool) -> None:
    objective = NextToken(torch.tensor([1, 2, 3, 4, 5]))
    pairs = [drawn(seed=k) for k in range(3)]
    logits, labels = (torch.stack(part) for part in zip(*pairs, strict=True))
    weights = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 0, 0]]) if weighted else None
    call = grad(objective.loss, has_aux=True)
    slopes, metrics = vmap(call, in_dims=(0, 0, 0 if weighted else None))(logits, labels, weights)
    for k, (own_logits, own_labels) in enumerate(pairs):
        slope, own = call(own_logits, own_labels, None if weights is None else weights[k])
        torch.testing.assert_close(slopes[k], slope)
        for name, metric in own.items():
            torch.testing.assert_close(metrics[name][k], metric)


@pytest.mark.parametrize(("size", "bits"), [(1, 8.0), (2, 4.0)])
def test_uniform_logits_over_bytes_take_eight_bits_each(size: int, bits: float) -> None:
    inputs = torch.randint(256, (7, 6), generator=seeded())
    sizes = None if size == 1 else torch.full((256,), size)
    task = Task(Given(torch.zeros(256, 256)), NextToken(sizes))
    scores = task.evaluate(task.params, {}, (inputs, inputs.roll(-1, 1)))
    total, count = scores["bits_per_byte"]
    assert count == 7 * 6 * size
    assert total / count == pytest.approx(bits)
    assert scores["loss"] == pytest.approx((42 * math.log(256), 42.0))


def test_bytes_are_those_of_the_labels() -> None:
    task = Task(Given(torch.zeros(3, 3)), NextToken(torch.tensor([1, 10, 100])))
    data = torch.tensor([[0, 0, 1]]), torch.tensor([[2, 2, 1]])
    assert task.evaluate(task.params, {}, data)["bits_per_byte"][1] == 210


@pytest.mark.parametrize("batch_size", [1, 8, 9, 1024])
def test_an_evaluation_sums_over_tokens_whatever_the_chunks(batch_size: int) -> None:
    module = Given(torch.randn(VOCABULARY, VOCABULARY, generator=seeded()))
    inputs = torch.randint(VOCABULARY, (7, LENGTH), generator=seeded(1))
    labels = torch.randint(VOCABULARY, (7, LENGTH), generator=seeded(2))
    task = Task(module, NextToken(torch.tensor([1, 2, 3, 4, 5])))
    scores = task.evaluate(task.params, {}, (inputs, labels), batch_size)
    logits = module.table.detach()[inputs].double()
    nats = -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).sum().item()
    right = (logits.argmax(-1) == labels).sum().item()
    assert scores == {
        "loss": pytest.approx((nats, 28.0)),
        "accuracy": (right, 28.0),
        "bits_per_byte": pytest.approx((nats / math.log(2), (labels + 1).sum().item())),
    }


def test_an_evaluation_counts_tokens_and_not_sequences_against_its_limit() -> None:
    module = Given(torch.zeros(VOCABULARY, VOCABULARY))
    task = Task(module, NextToken())
    inputs = torch.zeros(5, LENGTH, dtype=torch.int64)
    task.evaluate(task.params, {}, (inputs, inputs), 2 * LENGTH + 1)
    assert module.seen == [2, 2, 1]


def test_an_evaluation_leaves_out_sequences_of_weight_zero() -> None:
    task = Task(Given(torch.zeros(VOCABULARY, VOCABULARY)), NextToken())
    inputs = torch.zeros(3, LENGTH, dtype=torch.int64)
    scores = task.evaluate(task.params, {}, (inputs, inputs, torch.tensor([1.0, 0.0, 0.0])))
    assert scores["accuracy"] == (4.0, 4.0)
    assert scores["bits_per_byte"][1] == 4


def test_classification_has_no_bytes() -> None:
    logits, labels = torch.eye(2), torch.tensor([0, 1])
    for weights in (None, torch.ones(2)):
        loss, metrics = CLASSIFICATION.loss(logits, labels, weights)
        torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
        assert set(metrics) == set(CLASSIFICATION.sums) == {"loss", "accuracy", "count"}
        sums = {name: metric.item() for name, metric in metrics.items()}
        assert set(CLASSIFICATION.totals(sums)) == {"loss", "accuracy"}
    assert CLASSIFICATION.to("meta") is CLASSIFICATION


# Labels that are ignored: a question, and what stands behind an answer.


def partly(seed: int = 0, size: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of which 1, 2, 3... labels count, at different places."""
    logits, labels = drawn(size, seed)
    for k in range(size):
        counted = min(k + 1, LENGTH - 1)
        start = k % (LENGTH - counted + 1)
        labels[k, :start] = IGNORED
        labels[k, start + counted :] = IGNORED
    return logits, labels


def by_hand(
    logits: torch.Tensor, labels: torch.Tensor, weights: list[float], sizes: list[int]
) -> dict[str, float]:
    """Return the sums over counted labels, one label at a time."""
    sums = dict.fromkeys(("loss", "accuracy", "count", "bytes"), 0.0)
    for row, wanted, weight in zip(logits.double(), labels.tolist(), weights, strict=True):
        for each, label in zip(row, wanted, strict=True):
            if label == IGNORED:
                continue
            sums["loss"] -= weight * float(each.log_softmax(-1)[label])
            sums["accuracy"] += weight * float(each.argmax() == label)
            sums["count"] += weight
            sums["bytes"] += weight * sizes[label]
    return sums


@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 1.0], [1.0, 0.0, 0.25], [0.5, 0.5, 0.9]])
def test_ignored_labels_are_in_no_sum(weights: list[float] | None) -> None:
    logits, labels = partly()
    sizes = [1, 2, 3, 4, 5]
    given = None if weights is None else torch.tensor(weights)
    loss, metrics = NextToken(torch.tensor(sizes)).loss(logits, labels, given)
    expected = by_hand(logits, labels, weights or [1.0] * 3, sizes)
    assert {name: m.item() for name, m in metrics.items()} == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(expected["loss"] / expected["count"], rel=1e-5)
    plain = NextToken().loss(logits, labels, given)[1]
    assert plain["bytes"].item() == pytest.approx(expected["count"])
    slope = grad(lambda x: NextToken().loss(x, labels, given)[0])(logits)
    assert not slope[labels < 0].any()
    assert slope[0, labels[0] >= 0].any()


def test_what_is_ignored_may_hold_anything() -> None:
    logits, labels = partly()
    other = torch.where((labels < 0)[..., None], torch.full_like(logits, 7.0), logits)
    for weights in (None, torch.tensor([1.0, 0.5, 0.0])):
        first, second = (NextToken().loss(each, labels, weights) for each in (logits, other))
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize("weighted", [False, True])
def test_clients_side_by_side_ignore_their_own_labels(weighted: bool) -> None:
    objective = NextToken(torch.tensor([1, 2, 3, 4, 5]))
    pairs = [partly(seed) for seed in range(3)]
    pairs[1][1][0] = IGNORED  # a sequence of which nothing counts
    logits, labels = (torch.stack(part) for part in zip(*pairs, strict=True))
    weights = torch.tensor([[1.0, 0.5, 1], [1, 0, 0.25], [0, 0, 0]]) if weighted else None
    call = grad(objective.loss, has_aux=True)
    slopes, metrics = vmap(call, in_dims=(0, 0, 0 if weighted else None))(logits, labels, weights)
    for k, (own_logits, own_labels) in enumerate(pairs):
        slope, own = call(own_logits, own_labels, None if weights is None else weights[k])
        torch.testing.assert_close(slopes[k], slope)
        for name, metric in own.items():
            torch.testing.assert_close(metrics[name][k], metric)


def test_without_ignored_labels_the_loss_is_pytorchs_to_the_bit() -> None:
    for seed in range(5):
        logits, labels = drawn(7, seed)
        loss, metrics = NextToken().loss(logits, labels, None)
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        assert torch.equal(loss, expected)
        assert metrics["count"].item() == 7 * LENGTH


def test_an_evaluation_counts_no_ignored_label() -> None:
    module = Given(torch.randn(VOCABULARY, VOCABULARY, generator=seeded()))
    _, labels = partly(size=7)
    inputs = torch.randint(VOCABULARY, (7, LENGTH), generator=seeded(1))
    task = Task(module, NextToken(torch.tensor([1, 2, 3, 4, 5])))
    for size in (1, 8, 1024):
        scores = task.evaluate(task.params, {}, (inputs, labels), size)
        expected = by_hand(module.table.detach()[inputs], labels, [1.0] * 7, [1, 2, 3, 4, 5])
        assert scores["loss"] == pytest.approx((expected["loss"], expected["count"]))
        assert scores["bits_per_byte"][1] == expected["bytes"]

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hansa.models.images import CNN, ResNet18
from hansa.models.objective import CLASSIFICATION, Metrics, NextToken, Objective
from hansa.models.task import Batch, PureTask, Task


class Plain(nn.Module):
    """Returns its inputs times one number, so that its logits are known by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.scale


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.second(self.first(inputs).tanh())
        return logits


class Spare(nn.Module):
    """Has a parameter that plays no part in its output."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(3, 2)
        self.unused = nn.Parameter(torch.ones(4))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.used(inputs)
        return logits


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat_batch(size: int = 7, features: int = 3, classes: int = 2) -> Batch:
    inputs = torch.randn(size, features, generator=seeded())
    return inputs, torch.randint(classes, (size,), generator=seeded(1))


def image_batch(size: int = 6, classes: int = 4) -> Batch:
    inputs = torch.randn(size, 1, 8, 8, generator=seeded())
    return inputs, torch.randint(classes, (size,), generator=seeded(1))


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.parametrize("norm", [None, "group", "batch"])
def test_gradients_are_those_of_the_module(norm: str | None) -> None:
    torch.manual_seed(0)
    module = CNN((1, 8, 8), 4) if norm is None else ResNet18((1, 8, 8), 4, width=16, norm=norm)
    task, batch = Task(module), image_batch()
    gradients, buffers, metrics = task.gradients(task.params, task.buffers, batch)
    loss = F.cross_entropy(module.train()(batch[0]), batch[1])
    loss.backward()
    assert gradients.keys() == dict(module.named_parameters()).keys()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)
    torch.testing.assert_close(metrics["loss"], loss.detach() * 6)


def test_gradients_are_taken_at_the_parameters_given() -> None:
    batch = (torch.tensor([[1.0, -1.0]]), torch.tensor([0]))
    task = Task(Plain())
    gradients, _, _ = task.gradients({"scale": torch.tensor(0.5)}, {}, batch)
    # The loss is log(1 + exp(-2 s)); its slope at s = 1/2 is -2 / (1 + e).
    assert gradients["scale"] is not None
    assert gradients["scale"].item() == pytest.approx(-2 / (1 + math.e))


def test_a_parameter_without_a_part_in_the_loss_has_no_gradient() -> None:
    task = Task(Spare())
    gradients, _, _ = task.gradients(task.params, task.buffers, flat_batch())
    assert {name for name, g in gradients.items() if g is None} == {"unused"}
    assert gradients.keys() == {"used.weight", "used.bias", "unused"}


def test_tied_parameters_count_once() -> None:
    assert Task(Tied()).params.keys() == {"first.weight"}


def test_tied_parameters_get_the_gradient_of_both_places() -> None:
    torch.manual_seed(0)
    module = Tied()
    task, batch = Task(module), flat_batch(classes=3)
    gradients, _, _ = task.gradients(task.params, {}, batch)
    F.cross_entropy(module(batch[0]), batch[1]).backward()
    torch.testing.assert_close(gradients["first.weight"], module.first.weight.grad)


def test_a_layer_used_twice_counts_once_and_sees_both_inputs() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    module = nn.Sequential(layer, nn.Tanh(), layer)
    task, batch = Task(module), flat_batch(classes=3)
    gradients, buffers, _ = task.gradients(task.params, task.buffers, batch)
    F.cross_entropy(module(batch[0]), batch[1]).backward()
    assert gradients.keys() == {"0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    assert buffers["0.1.num_batches_tracked"].item() == 2
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)


def test_frozen_parameters_do_not_travel() -> None:
    module = Spare()
    module.used.bias.requires_grad_(False)
    task = Task(module)
    assert task.params.keys() == {"used.weight", "unused"}
    gradients, _, _ = task.gradients(task.params, {}, flat_batch())
    assert gradients.keys() == {"used.weight", "unused"}


def test_frozen_parameters_still_act() -> None:
    module = Spare()
    module.used.bias.requires_grad_(False).copy_(torch.tensor([100.0, 0.0]))
    task = Task(module)
    scores = task.evaluate(task.params, {}, (torch.zeros(3, 3), torch.tensor([0, 0, 1])))
    assert scores["accuracy"] == (2.0, 3.0)


def test_gradients_leave_the_buffers_they_are_given() -> None:
    task = Task(normed())
    before = {name: b.clone() for name, b in task.buffers.items()}
    _, buffers, _ = task.gradients(task.params, task.buffers, flat_batch())
    assert all(torch.equal(task.buffers[name], before[name]) for name in before)
    assert buffers["1.num_batches_tracked"].item() == 1
    assert not torch.equal(buffers["1.running_mean"], before["1.running_mean"])


def test_buffers_move_as_batch_norm_moves_them() -> None:
    task = Task(nn.BatchNorm1d(2, affine=True))
    batch = (torch.tensor([[1.0, 10.0], [3.0, 30.0]]), torch.tensor([0, 1]))
    _, buffers, _ = task.gradients(task.params, task.buffers, batch)
    torch.testing.assert_close(buffers["running_mean"], torch.tensor([0.2, 2.0]))
    torch.testing.assert_close(buffers["running_var"], torch.tensor([1.1, 20.9]))


def test_gradients_leave_parameters_and_module_alone() -> None:
    module = normed()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    task = Task(module)
    params = {name: p.clone() for name, p in task.params.items()}
    gradients, _, metrics = task.gradients(params, task.buffers, flat_batch())
    assert all(torch.equal(module.state_dict()[name], value) for name, value in state.items())
    assert all(torch.equal(params[name], task.params[name]) for name in params)
    assert all(p.grad is None for p in module.parameters())
    assert not any(p.requires_grad for p in params.values())
    assert not any(t is not None and t.requires_grad for t in [*gradients.values()])
    assert not any(t.requires_grad for t in metrics.values())


def test_initial_values_are_copies() -> None:
    module = normed()
    task = Task(module)
    weight, mean = task.params["0.weight"].clone(), task.buffers["1.running_mean"].clone()
    with torch.no_grad():
        module.get_parameter("0.weight").add_(1)
        module.get_buffer("1.running_mean").add_(1)
    assert torch.equal(task.params["0.weight"], weight)
    assert torch.equal(task.buffers["1.running_mean"], mean)


def test_metrics_of_a_batch_are_sums() -> None:
    batch = (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    task = Task(Plain())
    loss, metrics = task.loss(task.params, {}, batch)
    expected = math.log1p(math.exp(-2)) + math.log1p(math.e)
    assert loss.item() == pytest.approx(expected / 2)
    assert metrics["loss"].item() == pytest.approx(expected)
    assert metrics["accuracy"].item() == 1
    assert metrics["count"].item() == 2


@pytest.mark.parametrize("batch_size", [1, 3, 7, 1024])
def test_an_evaluation_sums_over_samples_whatever_the_chunks(batch_size: int) -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    task, (inputs, labels) = Task(module), flat_batch(7)
    scores = task.evaluate(task.params, {}, (inputs, labels), batch_size)
    loss, correct = 0.0, 0
    for row, label in zip(inputs, labels.tolist(), strict=True):
        logits = module(row).tolist()
        loss += math.log(sum(math.exp(value) for value in logits)) - logits[label]
        correct += logits.index(max(logits)) == label
    assert 0 < correct < 7
    assert scores["loss"] == pytest.approx((loss, 7.0), rel=1e-5)
    assert scores["accuracy"] == (correct, 7.0)


def test_an_evaluation_uses_the_statistics_and_leaves_them() -> None:
    module = normed()
    task, (inputs, labels) = Task(module), flat_batch()
    _, buffers, _ = task.gradients(task.params, task.buffers, (inputs, labels))
    before = {name: b.clone() for name, b in buffers.items()}
    scores = task.evaluate(task.params, buffers, (inputs, labels), 2)
    module.load_state_dict({**task.params, **buffers})
    expected = F.cross_entropy(module.eval()(inputs), labels, reduction="sum")
    assert scores["loss"][0] == pytest.approx(expected.item(), rel=1e-5)
    assert all(torch.equal(buffers[name], before[name]) for name in before)


def test_layers_act_as_in_training_only_when_training() -> None:
    torch.manual_seed(0)
    task = Task(nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 2)))
    batch = flat_batch()
    scores = [task.evaluate(task.params, {}, batch)["loss"] for _ in range(2)]
    losses = [task.gradients(task.params, {}, batch)[2]["loss"].item() for _ in range(2)]
    assert scores[0] == scores[1]
    assert losses[0] != losses[1]
    assert task.evaluate(task.params, {}, batch)["loss"] == scores[0]


def test_a_materialised_module_holds_the_values_given() -> None:
    module = normed()
    task = Task(module)
    params = {name: p + 1 for name, p in task.params.items()}
    buffers = {name: b + 2 for name, b in task.buffers.items()}
    made = task.materialise(params, buffers)
    assert not made.training
    assert made.state_dict().keys() == module.state_dict().keys()
    for name, value in made.state_dict().items():
        assert torch.equal(value, {**params, **buffers}[name])


def test_a_materialised_module_scores_as_the_task() -> None:
    task, (inputs, labels) = Task(normed()), flat_batch()
    params = {name: p * 1.5 for name, p in task.params.items()}
    made = task.materialise(params, task.buffers)
    expected = F.cross_entropy(made(inputs), labels, reduction="sum").item()
    assert task.evaluate(params, task.buffers, (inputs, labels))["loss"][0] == pytest.approx(
        expected, rel=1e-5
    )


def test_a_materialised_module_is_one_of_its_own() -> None:
    module = normed()
    task = Task(module)
    made = task.materialise(task.params, task.buffers)
    with torch.no_grad():
        made.get_parameter("0.weight").fill_(9)
    assert not (module.get_parameter("0.weight") == 9).any()
    assert not (task.params["0.weight"] == 9).any()


def test_a_materialised_module_keeps_ties_and_frozen_parameters() -> None:
    tied = Task(Tied()).materialise({"first.weight": torch.eye(3)}, {})
    assert tied.get_parameter("second.weight") is tied.get_parameter("first.weight")
    module = Spare()
    module.used.bias.requires_grad_(False).fill_(5)
    made = Task(module).materialise({"unused": torch.zeros(4)}, {})
    assert made.get_parameter("used.bias").tolist() == [5, 5]
    assert made.get_parameter("unused").tolist() == [0, 0, 0, 0]
    assert not made.get_parameter("used.bias").requires_grad


class Constant(Objective):
    """Loses the sum of the logits, whatever the labels."""

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, Metrics]:
        count = torch.tensor(float(len(labels))) if weights is None else weights.sum()
        total = logits.detach().sum()
        return logits.sum(), {"loss": total, "accuracy": torch.tensor(0.0), "count": count}


def test_a_task_differentiates_the_loss_of_its_objective() -> None:
    batch = (torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    task = Task(Plain(), Constant())
    for kind in (task, PureTask(task)):
        gradients, _, metrics = kind.gradients({"scale": torch.tensor(5.0)}, {}, batch)
        assert gradients["scale"] is not None
        assert gradients["scale"].item() == 3
        assert metrics["loss"].item() == 15
    assert task.evaluate(task.params, {}, batch) == {"loss": (3.0, 1.0), "accuracy": (0.0, 1.0)}


def test_weights_of_a_batch_reach_the_objective() -> None:
    batch = (torch.ones(3, 2), torch.zeros(3, dtype=torch.int64), torch.tensor([1.0, 1.0, 0.0]))
    _, metrics = Task(Plain(), Constant()).loss({"scale": torch.tensor(1.0)}, {}, batch)
    assert metrics["count"].item() == 2


def test_a_task_classifies_by_default() -> None:
    task = Task(Plain())
    assert task.objective is CLASSIFICATION
    scores = task.evaluate(task.params, {}, (torch.eye(2), torch.tensor([0, 0])))
    assert list(scores) == ["loss", "accuracy"]
    assert scores["accuracy"] == (1.0, 2.0)


def test_every_form_of_a_task_keeps_its_objective() -> None:
    objective = NextToken(torch.tensor([1, 2]))
    task = Task(Plain(), objective)
    assert PureTask(task).objective is objective
    other = Plain()
    adapted = task.adapted(lambda module: other)
    assert adapted.module is other
    assert adapted.objective is objective
    moved = PureTask(task, device="meta").objective
    assert isinstance(moved, NextToken)
    assert moved.bytes_of is not None
    assert moved.bytes_of.is_meta

"""Clients in stacks against clients one by one: the same numbers, whatever their sizes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hansa.data.clients import Client
from hansa.federation.engines.engine import RoundResult
from hansa.federation.engines.local import LocalEngine
from hansa.federation.engines.plan import Plan
from hansa.federation.leaf import DivergedError
from hansa.federation.methods import METHODS, FedSelect, Method
from hansa.federation.optimizer import Training
from hansa.federation.participation import Participation
from hansa.federation.stack import try_out
from hansa.federation.tree import Tree
from support import CLASSES, FEATURES, Net, clients, engine, everything, made, net, run

SIZES = (7, 3, 12, 7, 1, 6, 9)


def ragged(sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float64) -> dict[str, Client]:
    """Clients of unequal sizes, the test data as well."""
    made = {}
    for k, size in enumerate(sizes):
        rng = torch.Generator().manual_seed(k)
        inputs = torch.randn(size + 10 + k, FEATURES, generator=rng).to(dtype)
        labels = (inputs[:, k % FEATURES] > 0).long() + (inputs[:, (k + 1) % FEATURES] > 0).long()
        made[f"c{k}"] = Client.of(
            (inputs[:size], labels[:size]),
            test=(inputs[size:], labels[size:]),
            validation=(inputs[size : size + 4], labels[size : size + 4]),
        )
    return made


def both(
    method: Method, rounds: int = 5, stack: int = 4, pads: bool = True, **options: object
) -> tuple[LocalEngine, LocalEngine, list[RoundResult], list[RoundResult]]:
    """The same run, client by client and in stacks."""
    options.setdefault("data", ragged())
    options.setdefault("model", net().double())
    engines = [
        engine(method, plan=Plan(kind, size, pads=pads), **options)  # type: ignore[arg-type]
        for kind, size in (("sequential", 1), ("stacked", stack))
    ]
    first, second = (run(each, rounds) for each in engines)
    return engines[0], engines[1], first, second


def assert_equal(one: LocalEngine, other: LocalEngine, tolerance: float = 1e-9) -> None:
    for path in one.tree.walk():
        first, second = one.state(path), other.state(path)
        assert first.groups.keys() == second.groups.keys()
        for group, tensors in first.groups.items():
            assert tensors.keys() == second.group(group).keys()
            for name, tensor in tensors.items():
                other_tensor = second.group(group)[name]
                if tensor.dtype.is_floating_point:
                    torch.testing.assert_close(other_tensor, tensor, rtol=0, atol=tolerance)
                else:
                    assert torch.equal(other_tensor, tensor), (path, group, name)


@pytest.mark.parametrize("name", METHODS)
def test_stacked_is_sequential_after_20_rounds(name: str) -> None:
    one, other, first, second = both(made(name), rounds=20)
    assert other.stack.failure == ""
    assert_equal(one, other)
    for a, b in zip(first, second, strict=True):
        assert [v.path for v in a.visits] == [v.path for v in b.visits]
        for x, y in zip(a.visits, b.visits, strict=True):
            assert (x.down, x.fate) == (y.down, y.fate)
            assert x.up == pytest.approx(y.up, abs=64)  # a loss is written with all its digits
            for metric, value in x.metrics.items():
                assert y.metrics[metric] == pytest.approx(value, abs=1e-6)
        for path, splits in a.scores.items():
            for split, metrics in splits.items():
                for metric, value in metrics.items():
                    assert b.scores[path][split][metric] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    "training",
    [
        Training(lr=0.1, batch_size=3, epochs=2, momentum=0.9, weight_decay=0.1),
        Training(optimizer="adam", lr=0.01, batch_size=4, epochs=3),
        Training(optimizer="adamw", lr=0.01, batch_size=5, weight_decay=0.1),
        Training(lr=0.5, batch_size=2, clip_norm=0.05),
    ],
    ids=["momentum", "adam", "adamw", "clipped"],
)
@pytest.mark.parametrize("name", ["fedavg", "fedselect"])
def test_memory_of_optimizers_is_stacked_as_well(name: str, training: Training) -> None:
    one, other, *_ = both(made(name), training=training)
    assert other.stack.failure == ""
    assert_equal(one, other)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=7),
    batch=st.integers(1, 6),
    stack=st.integers(2, 7),
    epochs=st.integers(1, 3),
)
@settings(max_examples=25, deadline=None)
def test_any_sizes_make_the_same_run(sizes: list[int], batch: int, stack: int, epochs: int) -> None:
    training = Training(lr=0.2, batch_size=batch, epochs=epochs, momentum=0.5)
    data = ragged(tuple(sizes))
    one, other, *_ = both(METHODS["fedselect"](), 3, stack, data=data, training=training)
    assert other.stack.failure == ""
    assert_equal(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "workshop", "iterations": 2, "select_epochs": 2},
        {"newcomer": "select"},
        {"quota": "global", "period": 2, "reference": "last-update"},
    ],
)
def test_every_mode_of_fedselect(options: dict[str, object]) -> None:
    few = Participation(fraction=0.5)  # so that clients differ in the passes they need
    method = METHODS["fedselect"].model_validate(options)
    one, other, *_ = both(method, 6, participation=few)
    assert other.stack.failure == ""
    assert_equal(one, other)


def test_a_deep_tree() -> None:
    tree = Tree.grouped(ragged(), 3)
    one, other, first, second = both(METHODS["fedavg"](), tree=tree)
    assert_equal(one, other)
    assert first[-1].scores.keys() == second[-1].scores.keys()


def test_float32_metrics_agree_to_half_a_point() -> None:
    data = ragged(dtype=torch.float32)
    one, other, first, second = both(METHODS["fedselect"](), 20, data=data, model=net())
    assert_equal(one, other, 1e-3)
    for path, scores in first[-1].scores.items():
        if "test" in scores:
            hits, count = scores["test"]["accuracy"]
            assert abs(hits - second[-1].scores[path]["test"]["accuracy"][0]) <= 0.005 * count


def test_batchnorm_is_stacked_by_equal_size() -> None:
    model = net(nn.BatchNorm1d(6)).double()
    data = ragged((6, 8, 6, 8, 6, 11))
    training = Training(lr=0.1, batch_size=4, epochs=2)
    probe = engine(METHODS["fedavg"](), model=model, data=data, training=training)
    plan = Plan("stacked", 4)
    assert try_out(probe.leaf, probe.jobs(1), plan) == (replace(plan, pads=False), "")
    one, other, *_ = both(
        METHODS["fedavg"](), data=data, training=training, model=model, pads=False
    )
    assert other.stack.failure == ""
    assert_equal(one, other)


class Peculiar(Net):
    """A model that vmap cannot take, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.how == "control flow" and inputs.mean() > 0:
            inputs = inputs * 1.0
        if self.how == "numpy":
            inputs = inputs + torch.from_numpy(inputs.detach().numpy()) * 0
        if self.how == "hidden state":
            self.calls += 1
            return super().forward(inputs) * (1 + 1 / self.calls)
        return super().forward(inputs)


@pytest.mark.parametrize(
    ("how", "says"),
    [("control flow", "control flow depends on the values"), ("numpy", ""), ("hidden state", "")],
)
def test_what_cannot_be_stacked_is_done_one_by_one(how: str, says: str, caplog) -> None:
    data = ragged(dtype=torch.float32)
    one, other, *_ = both(METHODS["fedavg"](), data=data, model=Peculiar(how))
    if how != "hidden state":
        assert other.stack.failure
        assert says in other.stack.failure
        assert len([r for r in caplog.records if "one by one" in r.message]) == 1
        assert everything(one, []) == everything(other, [])
    probe = engine(METHODS["fedavg"](), model=Peculiar(how), data=data)
    _, failure = try_out(probe.leaf, probe.jobs(1), Plan("stacked", 4))
    assert failure
    assert "\n" not in failure


def test_dropout_is_done_one_by_one_and_said_so() -> None:
    probe = engine(METHODS["fedavg"](), model=net(nn.Dropout(0.5)))
    _, failure = try_out(probe.leaf, probe.jobs(1), Plan("stacked", 2))
    assert failure == "the model draws random numbers while it trains"
    data = ragged(dtype=torch.float32)
    one, other, *_ = both(METHODS["fedavg"](), data=data, model=net(nn.Dropout(0.5)))
    assert everything(one, []) == everything(other, [])


def test_a_loss_that_is_no_number_fails_its_client_alone() -> None:
    data = ragged()
    inputs, labels = data["c2"].batch("train")
    data["c2"] = Client.of((inputs * float("nan"), labels), test=data["c2"].batch("test"))
    one, other, first, second = both(METHODS["fedavg"](), data=data, on_failure="drop")
    assert [(v.path, v.fate, v.error) for v in first[0].visits] == [
        (v.path, v.fate, v.error) for v in second[0].visits
    ]
    assert first[0].scores.keys() == second[0].scores.keys()
    assert_equal(one, other)
    with pytest.raises(DivergedError, match="round 1 at c2"):
        run(engine(METHODS["fedavg"](), data=data, model=net().double(), plan=Plan("stacked", 4)))


def test_large_finite_weights_are_no_failure() -> None:
    data = ragged(dtype=torch.float32)
    model = net()
    with torch.no_grad():
        model.head.bias += 3e38  # their sum overflows
    training = Training(lr=1e-6, batch_size=3)
    _, other, *_ = both(METHODS["fedavg"](), 1, data=data, model=model, training=training)
    assert other.state().group("model")["head.bias"].sum().isinf()


def test_unused_parameters_stay_as_they_are() -> None:
    class Half(Net):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(2, 2)

    training = Training(lr=0.1, batch_size=3, weight_decay=0.5, momentum=0.9)
    one, other, *_ = both(METHODS["fedavg"](), model=Half().double(), training=training)
    assert_equal(one, other)
    assert torch.equal(
        other.state().group("model")["idle.weight"], one.setup.task.params["idle.weight"]
    )


def test_worker_processes_change_no_bit_of_a_stack() -> None:
    data = ragged(dtype=torch.float32)
    here = engine(FedSelect(), data=data, plan=Plan("stacked", 2))
    there = engine(FedSelect(), data=data, plan=Plan("stacked", 2, workers=2))
    assert everything(here, run(here)) == everything(there, run(there))


def test_one_pool_of_samples_is_read_where_it_is() -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 1, 2, 2), dtype=torch.uint8, generator=rng)
    labels = torch.randint(0, CLASSES, (30,), generator=rng)
    data = {}
    for k, rows in enumerate(np.split(np.arange(30), [7, 19])):
        splits = {"train": rows[:-3], "validation": rows[:0], "test": rows[-3:]}
        data[f"c{k}"] = Client(images, labels, splits)
    model = nn.Sequential(nn.Flatten(), net()).double()
    model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    one, other, *_ = both(METHODS["fedavg"](), data=data, model=model)
    assert other.stack.failure == ""
    assert_equal(one, other)


def test_clients_of_one_pool_keep_their_own_labels() -> None:
    data = ragged((6, 6, 6, 6))
    first = data["c0"]
    for k, name in enumerate(data):
        data[name] = Client(first.inputs, (first.labels + k) % CLASSES, first.splits)
    one, other, *_ = both(METHODS["fedper"](), data=data)
    assert_equal(one, other)


def test_clients_of_unlike_inputs_are_not_mixed() -> None:
    rng = torch.Generator().manual_seed(0)
    data = {}
    for k in range(4):
        images = torch.randint(0, 256, (9, 1, 2, 2), dtype=torch.uint8, generator=rng)
        labels = torch.randint(0, CLASSES, (9,), generator=rng)
        inputs = images.float() / 127.5 - 1 if k == 3 else images
        data[f"c{k}"] = Client.of((inputs[:6], labels[:6]), test=(inputs[6:], labels[6:]))
    one, other, first, second = both(
        METHODS["fedavg"](), data=data, model=nn.Sequential(nn.Flatten(), net())
    )
    assert_equal(one, other, 1e-5)
    for path, scores in first[-1].scores.items():
        if "test" in scores:
            assert second[-1].scores[path]["test"]["loss"] == pytest.approx(scores["test"]["loss"])


def test_statistics_of_a_batch_are_not_taken_over_what_fills_it_up() -> None:
    model = net(nn.BatchNorm1d(6, track_running_stats=False)).double()
    data = ragged((6, 8, 6, 8))
    training = Training(lr=0.1, batch_size=4)
    probe = engine(METHODS["fedavg"](), model=model, data=data, training=training)
    plan, failure = try_out(probe.leaf, probe.jobs(1), Plan("stacked", 4))
    assert (plan.pads, plan.scores, failure) == (False, False, "")
    one, other = (
        engine(METHODS["fedavg"](), model=model, data=data, training=training, plan=p)
        for p in (Plan(), plan)
    )
    first, second = run(one, 3), run(other, 3)
    assert_equal(one, other)
    for path, scores in first[-1].scores.items():
        if "test" in scores:
            assert second[-1].scores[path]["test"]["loss"] == pytest.approx(scores["test"]["loss"])


def test_adam_on_a_bias_without_effect_is_stacked() -> None:
    # The gradient of a bias before BatchNorm is zero but for rounding, and Adam divides by that.
    model = net(nn.BatchNorm1d(6))
    training = Training(optimizer="adam", lr=0.01, batch_size=4)
    probe = engine(METHODS["fedavg"](), model=model, data=clients(4, 8), training=training)
    assert try_out(probe.leaf, probe.jobs(1), Plan("stacked", 4))[1] == ""

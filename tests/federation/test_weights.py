"""Samples that count less than others in training, whoever trains on them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hansa.data.clients import SPLITS, Client
from hansa.federation.engines.local import LocalEngine
from hansa.federation.engines.plan import Plan
from hansa.federation.federation import Federation
from hansa.federation.methods import METHODS, FedAvg
from hansa.federation.optimizer import Training
from support import CLASSES, FEATURES, doubled, engine, everything, made, run

FULL = Training(lr=0.3, batch_size=50, epochs=3)


class Linear(nn.Module):
    """Logits of one linear map, in float64, so that sums in another order show up late."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.map(inputs)
        return logits


def linear() -> Linear:
    torch.manual_seed(0)
    return Linear()


def weighted(client: Client, values: Mapping[int, float]) -> Client:
    """Return a client whose training samples count in full but for some."""
    weights = torch.ones(len(client.labels))
    for place, value in values.items():
        weights[int(client.splits["train"][place])] = value
    return replace(client, weights=weights)


def without(client: Client, places: set[int]) -> Client:
    index = client.splits["train"]
    train = np.delete(index, sorted(places))
    return replace(client, splits={**client.splits, "train": train})


def trained(
    data: Mapping[str, Client], training: Training = FULL, **options: object
) -> LocalEngine:
    made_ = engine(FedAvg(), model=linear(), data=data, training=training, **options)
    run(made_, 2)
    return made_


def close(first: LocalEngine, second: LocalEngine, tolerance: float = 1e-12) -> bool:
    pairs = zip(
        first.state().group("model").items(), second.state().group("model").items(), strict=True
    )
    return all(n == m and torch.allclose(a, b, rtol=0, atol=tolerance) for (n, a), (m, b) in pairs)


def test_a_weight_of_zero_is_as_if_the_sample_were_not_there() -> None:
    client = doubled()["c0"]
    out = {1, 4}
    found = trained({"c0": weighted(client, dict.fromkeys(out, 0.0))})
    expected = trained({"c0": without(client, out)})
    assert close(found, expected)
    assert not close(found, trained({"c0": client}), 1e-3)


def test_weights_of_one_change_nothing() -> None:
    data = doubled()
    ones = {name: weighted(client, {}) for name, client in data.items()}
    training = Training(lr=0.3, batch_size=3, epochs=2)
    assert close(trained(ones, training), trained(data, training))


def test_a_weight_of_half_counts_half() -> None:
    """Two of one half are as one in full."""
    client = doubled()["c0"]
    inputs, labels = client.batch("train")
    twice = Client.of(
        (torch.cat([inputs, inputs[:1]]), torch.cat([labels, labels[:1]])),
        test=client.batch("test"),
    )
    found = trained({"c0": weighted(twice, {0: 0.5, 7: 0.5})})
    assert close(found, trained({"c0": client}))


def test_by_hand() -> None:
    """One step from zero: the gradient of the weighted mean, whose weights sum to 1.5."""
    inputs = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]], dtype=torch.float64)
    client = Client.of((inputs, torch.tensor([0, 1])), test=(inputs, torch.tensor([0, 1])))
    model = linear()
    with torch.no_grad():
        model.map.weight.zero_()
        model.map.bias.zero_()
    one = Training(lr=1.0, batch_size=2, epochs=1)
    found = engine(FedAvg(), model=model, data={"c0": weighted(client, {1: 0.5})}, training=one)
    run(found, 1)
    third = 1 / 3
    step = torch.tensor([[1 - third, -third, -third], [-third, 1 - third, -third]])
    expected = torch.stack([step[0] / 1.5, 0.5 * step[1] / 1.5, *torch.zeros(2, 3)], 1)
    weight = found.state().group("model")["map.weight"]
    torch.testing.assert_close(weight, expected.double())


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "ditto", "fedrep", "scaffold", "diloco"])
def test_stacks_weigh_as_single_clients_do(name: str) -> None:
    """Clients of different sizes, of which one has no weights at all."""
    data = doubled(4)
    for k, client in enumerate(("c0", "c1", "c3")):
        data[client] = weighted(without(data[client], {k}), {0: 0.0, 2: 0.25, 3 + k // 2: 0.7})
    training = Training(lr=0.1, batch_size=3, epochs=2)
    ends = []
    for plan in (Plan(), Plan(kind="stacked", stack=4)):
        one = engine(made(name), model=linear_net(), data=data, training=training, plan=plan)
        run(one, 2)
        assert not one.stack.failure
        ends.append(one)
    states = [{path: e.state(path) for path in e.tree.walk()} for e in ends]
    for path, state in states[0].items():
        for group, tensors in state.groups.items():
            for key, tensor in tensors.items():
                other = states[1][path].groups[group][key]
                torch.testing.assert_close(tensor, other, rtol=1e-9, atol=1e-9)


class Double(nn.Module):
    """A body and a head in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 5, dtype=torch.float64)
        self.head = nn.Linear(5, CLASSES, dtype=torch.float64)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.body(inputs).relu())
        return logits


def linear_net() -> Double:
    torch.manual_seed(0)
    return Double()


def test_processes_end_with_the_same_bits() -> None:
    data = {name: weighted(client, {0: 0.3, 1: 0.0}) for name, client in doubled().items()}
    found = []
    for workers in (1, 2):
        one = engine(FedAvg(), model=linear(), data=data, training=FULL, plan=Plan(workers=workers))
        found.append(everything(one, run(one, 2)))
    assert found[0] == found[1]


def test_pooled_clients_keep_their_weights() -> None:
    data = doubled()
    client = weighted(without(data["c0"], {0}), {2: 0.25})
    pooled = Client.pooled([client, data["c1"]])
    _, _, weights = pooled.weighted("train")
    assert weights.tolist() == [1, 1, 0.25, 1, 1, 1] + [1] * 7
    assert Client.pooled(data.values()).weights is None
    method = METHODS["centralised"]()
    light = {name: weighted(c, {0: 0.1, 1: 0.1}) for name, c in data.items()}
    first, second = (
        Federation(linear(), clients, method, FULL).run(1).summary()["metrics"]["loss"]
        for clients in (data, light)
    )
    assert first != second


def test_a_file_keeps_weights_and_domains(tmp_path: Path) -> None:
    client = weighted(without(doubled()["c0"], {1}), {2: 0.25})
    client = replace(client, domains=torch.arange(len(client.labels)))
    client.save(tmp_path / "c.safetensors")
    again = Client.load(tmp_path / "c.safetensors")
    assert again.domains is not None
    assert client.domains is not None
    for split in SPLITS:
        for first, second in zip(client.weighted(split), again.weighted(split), strict=True):
            assert torch.equal(first, second)
        rows = (torch.from_numpy(c.splits[split]) for c in (client, again))
        assert torch.equal(*(c.domains[r] for c, r in zip((client, again), rows, strict=True)))
    plain = doubled()["c0"]
    plain.save(tmp_path / "p.safetensors")
    held = Client.load(tmp_path / "p.safetensors")
    assert (held.weights, held.domains) == (None, None)

"""The server's optimizer against numbers computed by hand."""

import math

import pytest
import torch

from hansa.federation.methods import FedAvg, Swat
from hansa.federation.optimizer import Training
from hansa.federation.server import Moments, ServerOptimizer
from hansa.federation.tree import ROOT, Tree
from support import clients, engine, net, run, same

ADAM = ServerOptimizer(kind="fedadam", lr=0.5, betas=(0.9, 0.99), tau=0.1)


def test_fedadam_makes_the_steps_of_the_algorithm() -> None:
    model, moments = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}, Moments()
    means = ([3.0, 2.0], [1.0, 1.0])
    m, v, w = [0.0, 0.0], [0.1**2, 0.1**2], [1.0, 2.0]
    for mean in means:
        model, moments = ADAM.step(model, {"w": torch.tensor(mean, dtype=torch.float64)}, moments)
        for k in range(2):
            change = mean[k] - w[k]
            m[k] = 0.9 * m[k] + 0.1 * change
            v[k] = 0.99 * v[k] + 0.01 * change**2
            w[k] += 0.5 * m[k] / (math.sqrt(v[k]) + 0.1)
        assert model["w"].tolist() == pytest.approx(w, rel=1e-12)
    # The very first step, in numbers: m = 0.2, v = 0.0099 + 0.04.
    first, _ = ADAM.step({"w": torch.tensor(1.0).double()}, {"w": torch.tensor(3.0).double()}, {})
    assert float(first["w"]) == pytest.approx(1 + 0.5 * 0.2 / (math.sqrt(0.0499) + 0.1), rel=1e-12)


def test_the_average_is_fedavg_bit_for_bit() -> None:
    plain, ours = engine(FedAvg()), engine(Swat(sparsity=0.0, sparse=("*",), path="reference"))
    first, second = plain.state(), ours.state()
    assert same(first.group("model"), second.group("model"))
    mean = {name: torch.randn_like(t) for name, t in first.group("model").items()}
    assert ServerOptimizer().step(first.group("model"), mean, {}) == (mean, {})


def test_the_root_alone_steps_and_keeps_its_moments() -> None:
    data = clients(4)
    tree = Tree.grouped(data, 2)
    method = Swat(sparse=("*",), path="reference", server=ADAM)
    model = net().double()
    data = {name: _double(client) for name, client in data.items()}
    # Orders of samples depend on a client's place in the tree: whole batches have none.
    training = Training(lr=0.1, batch_size=7, epochs=2)
    options = {"model": model, "data": data, "training": training}
    deep, flat = engine(method, tree=tree, **options), engine(method, **options)
    results = run(deep), run(flat)
    held = {group for group, tensors in deep.state().groups.items() if tensors}
    assert held == {"model", "server.first", "server.second"}
    for group in deep.state().groups:
        for name, tensor in deep.state().group(group).items():
            torch.testing.assert_close(tensor, flat.state().group(group)[name], rtol=0, atol=1e-12)
    for path in tree.children(ROOT):
        assert {g for g, ts in deep.state(path).groups.items() if ts} == {"model"}
    # What goes down is the model alone.
    plain = engine(Swat(sparse=("*",), path="reference"), **options)
    assert results[1][2].visits[0].down == run(plain)[2].visits[0].down
    assert not same(flat.state().group("model"), plain.state().group("model"))


def test_buffers_are_averaged_whatever_the_optimizer() -> None:
    data = clients(3, per_client=8)
    model = net(torch.nn.BatchNorm1d(6))
    options = {"model": model, "data": data}
    ours = engine(Swat(sparse=("*",), path="reference", server=ADAM), **options)
    plain = engine(Swat(sparse=("*",), path="reference"), **options)
    run(ours, 1), run(plain, 1)
    assert same(ours.state().group("buffers"), plain.state().group("buffers"))
    assert not same(ours.state().group("model"), plain.state().group("model"))


def test_nobody_s_reply_changes_nothing() -> None:
    federation = engine(Swat(sparse=("*",), path="reference", server=ADAM))
    run(federation, 1)
    before = federation.state()
    node = federation.node(ROOT, 2)
    after = federation.method.aggregate(node, before, [])
    assert same(after.group("model"), before.group("model"))
    assert same(after.group("server.first"), before.group("server.first"))


def test_betas_outside_of_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match="betas must lie"):
        ServerOptimizer(betas=(0.9, 1.0))


def _double(client):
    inputs, labels = client.batch("train")
    return type(client).of((inputs.double(), labels), test=(inputs.double(), labels))

"""SWAT in a federation: what travels, what is kept, and which weights count."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

import hansa
from hansa.config import load
from hansa.data.clients import Client
from hansa.data.federate import federate
from hansa.errors import InputError
from hansa.federation.engines.plan import EngineOptions, Plan
from hansa.federation.federation import Federation
from hansa.federation.message import Message, State
from hansa.federation.methods import METHODS, FedAvg, Method, Swat
from hansa.federation.methods.swat import largest
from hansa.federation.node import Node, Setup
from hansa.federation.optimizer import Training
from hansa.federation.tree import Tree
from hansa.models.masks import attach
from hansa.models.task import Task
from hansa.sparse.convert import SparseModel
from hansa.sparse.thresholds import count_kept
from support import config, engine, net, run, same

THREE = ("swat", "zerofl", "sparsyfed")


class Convolutions(nn.Module):
    """A stem, a block with a shortcut of one pixel, and a head, as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.first = nn.Conv2d(6, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.second(torch.relu(self.first(x))) + self.shortcut(x)
        logits: torch.Tensor = self.head(torch.relu(x).mean((2, 3)))
        return logits


SPARSE = {"first.weight", "second.weight"}


def images(num: int = 3, each: int = 8, dtype: torch.dtype = torch.float32) -> dict[str, Client]:
    made = {}
    for k in range(num):
        rng = torch.Generator().manual_seed(k)
        inputs = torch.randn(2 * each, 1, 6, 6, generator=rng).to(dtype)
        labels = (inputs.mean((1, 2, 3)) > 0).long() + (inputs[:, 0, 0, 0] > 0).long()
        made[f"c{k}"] = Client.of((inputs[:each], labels[:each]), test=(inputs, labels))
    return made


def convolutions(dtype: torch.dtype = torch.float32) -> Convolutions:
    torch.manual_seed(0)
    return Convolutions().to(dtype)


TRAINING = Training(lr=0.05, batch_size=4, epochs=2)


def federation_of(method: Method, **options: Any):
    options.setdefault("data", images())
    options.setdefault("model", convolutions())
    return engine(method, training=TRAINING, **options)


def test_each_sparse_layer_keeps_its_own_largest_and_the_stored_model_stays_dense() -> None:
    federation = federation_of(Swat(path="reference"))
    run(federation, 2)
    stored = federation.state().group("model")
    counts, _ = federation.method.model(federation.setup, federation.state())
    for name, tensor in stored.items():
        if name in SPARSE:
            assert int(counts[name].count_nonzero()) == count_kept(0.9, tensor.numel())
            left = counts[name] == 0
            assert tensor[left].abs().max() < counts[name][~left].abs().min()
            assert tensor.count_nonzero() == tensor.numel()
            assert torch.equal(counts[name][~left], tensor[~left])
        else:
            assert counts[name] is tensor
    assert count_kept(0.9, 576) == 58  # ceil(57.6): a whole number of entries, not a rounding


def test_the_weights_that_are_not_used_move_as_well_unless_the_gradient_is_masked() -> None:
    for gradient, moves in (("swat", True), ("mask", False)):
        method = Swat(gradient=gradient, path="reference", refresh=100)  # type: ignore[arg-type]
        federation = federation_of(method)
        before = federation.state().group("model")["first.weight"]
        run(federation, 1)
        after = federation.state().group("model")["first.weight"]
        unused = largest(before, 0.9) == 0
        assert bool((after != before)[unused].any()) is moves
        assert (after != before)[~unused].any()


def test_at_sparsity_zero_with_all_inputs_it_is_fedavg() -> None:
    data = images(dtype=torch.float64)
    model = convolutions(torch.float64)
    ours = federation_of(Swat(sparsity=0.0, refresh=1), data=data, model=model)
    plain = federation_of(FedAvg(), data=data, model=model)
    run(ours), run(plain)
    for group, tensors in plain.state().groups.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(ours.state().group(group)[name], tensor, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("buffers", ["averaged", "local"])
def test_thresholds_neither_travel_nor_are_kept(name: str, buffers: str) -> None:
    method = METHODS[name]()
    seen: list[Message] = []

    class Watched(type(method)):  # type: ignore[misc]
        def receive(self, node: Node, state: State, down: Message) -> State:
            seen.append(down)
            received = super().receive(node, state, down)
            seen.append(received)
            return received

        def end(self, node: Node, state: State, work: Any) -> Any:
            ages = [t for key, t in work["buffers"].items() if key.endswith(".age")]
            assert [int(age) for age in ages] == [4] * len(ages)  # of this round alone
            assert ages
            kept, reply = super().end(node, state, work)
            seen.extend((kept, reply))
            return kept, reply

        def reply(self, node: Node, state: State) -> Message:
            sent = super().reply(node, state)
            seen.append(sent)
            return sent

    data = images(4)
    tree = Tree.grouped(data, 2)
    federation = federation_of(Watched(), data=data, tree=tree, buffers=buffers)
    run(federation, 2)
    seen += [federation.state(path) for path in tree.walk()]
    names = {key for message in seen for group in message.groups.values() for key in group}
    assert "norm.running_mean" in names
    assert not [key for key in names if key.endswith((".age", ".least_weight", ".least_input"))]
    assert federation.setup.task.module.thresholds
    state = federation.model_of("root").state_dict()
    assert state.keys() == convolutions().state_dict().keys()


@pytest.mark.parametrize("name", THREE)
def test_a_bundle_works_in_the_plain_architecture(name: str, tmp_path) -> None:
    options = {"sparsity": 0.6, **({} if name == "sparsyfed" else {"sparse": ["*"]})}
    found = hansa.train(
        config(
            tmp_path,
            rounds=2,
            method={"name": name, **options},
            model={"options": {"hidden": [12, 12]}},
        )
    )
    bundle = hansa.read_bundle(found.path / "bundle")
    weights = {key: t for key, t in bundle.weights.items() if key.endswith("weight")}
    zeros = sum(int((t == 0).sum()) for t in weights.values())
    total = sum(t.numel() for t in weights.values())
    assert zeros / total == pytest.approx(0.6, abs=0.05)
    assert not [key for key in bundle.weights if "least" in key or "age" in key]
    from hansa.models import Architecture, build
    from hansa.training import prepare

    plain = build(Architecture(**bundle.architecture)).eval()
    assert not isinstance(plain, SparseModel)
    plain.load_state_dict(dict(bundle.weights))
    scored = found.history.scored("test", "accuracy")[2]
    for client, data in prepare(found.config).data.clients.items():
        inputs, labels = data.batch("test")
        with torch.no_grad():
            right = (plain(inputs).argmax(1) == labels).double().mean().item()
        assert scored[client] == pytest.approx(right)


def test_masked_accuracy_holds_and_dense_evaluation_collapses() -> None:
    about = {
        "clients": 4,
        "train_per_class": 20,
        "test_per_class": 10,
        "partition": {"kind": "iid"},
    }
    data = federate(load({"data": about, "method": {"name": "fedavg"}}).data, 0).clients
    torch.manual_seed(0)
    inner = [x for _ in range(8) for x in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), *inner, nn.Linear(64, 10))
    federation = Federation(
        model,
        data,
        Swat(sparsity=0.9, path="reference"),
        Training(lr=0.1, batch_size=16, epochs=2),
        engine=EngineOptions(kind="sequential", workers=1),
    )
    federation.run(10, score_every=0)

    def accuracy(tensors: dict[str, torch.Tensor]) -> float:
        right = total = 0
        for client in data.values():
            inputs, labels = client.batch("test")
            found = functional_call(model.eval(), tensors, (inputs,)).argmax(1)
            right, total = right + int((found == labels).sum()), total + len(labels)
        return right / total

    state = federation.state_of("root")
    masked = accuracy(dict(federation.model_of("root").state_dict()))
    dense = accuracy({**state.group("model"), **state.group("buffers")})
    assert masked > 0.7
    assert dense < masked - 0.3


@pytest.mark.parametrize("name", THREE)
def test_a_model_that_was_pruned_before_stays_so(name: str) -> None:
    """What the pruning stage took out is zero in the model that is scored and kept."""
    model = convolutions()
    masks = {
        key: torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        for key, p in model.named_parameters()
        if p.dim() > 1
    }
    attach(model, masks)
    method = METHODS[name](sparsity=0.3, **({"mask_ratio": 0.1} if name == "zerofl" else {}))
    training = Training(lr=0.05, batch_size=4, epochs=2, momentum=0.9, weight_decay=0.01)
    federation = Federation(
        model, images(), method, training, engine=EngineOptions(kind="sequential", workers=1)
    )
    assert same(federation.setup.task.masks, masks)
    federation.run(2)
    for node in ("root", "c0"):
        held = federation.model_of(node).state_dict()
        assert held.keys() == convolutions().state_dict().keys()
        for key, mask in masks.items():
            assert not held[key][~mask].any(), (node, key)
            assert held[key][mask].any(), (node, key)
    # Of what is left, the share that is not used is left out: 0.3 of all entries is less.
    stored = federation.state_of("root").group("model")
    assert all(not stored[key][~mask].any() for key, mask in masks.items())


@pytest.mark.parametrize("name", THREE)
def test_a_stack_gives_the_numbers_of_single_clients(name: str) -> None:
    options = {"data": images(4, dtype=torch.float64), "model": convolutions(torch.float64)}
    one = federation_of(METHODS[name](), plan=Plan(), **options)
    # BatchNorm: clients of one size go together, nothing is filled up.
    other = federation_of(METHODS[name](), plan=Plan("stacked", 2, pads=False), **options)
    first, second = run(one), run(other)
    assert other.stack.failure == ""
    # The slope of |v|^0.25 is steep where v is small.
    near = 1e-7 if name == "sparsyfed" else 1e-9
    for group, tensors in one.state().groups.items():
        for key, tensor in tensors.items():
            found = other.state().group(group)[key]
            if tensor.is_floating_point():
                torch.testing.assert_close(found, tensor, rtol=0, atol=near)
            else:
                assert torch.equal(found, tensor)
    assert first[-1].scores.keys() == second[-1].scores.keys()


def test_frozen_layers_count_as_they_are_evaluated() -> None:
    model = convolutions()
    model.first.weight.requires_grad_(False)
    federation = federation_of(Swat(path="reference"), model=model)
    run(federation, 1)
    assert federation.method.weights(federation.setup) == ("second.weight",)
    held = federation.model_of("root").state_dict()["first.weight"]
    assert torch.equal(held, largest(model.first.weight.detach(), 0.9))


def test_all_clients_are_scored_with_one_and_the_same_tensors() -> None:
    """So that a stack of them is scored without a copy for each."""
    federation = federation_of(Swat(path="reference"))
    run(federation, 1)
    models = [
        federation.method.model(federation.setup, federation.leaf.held(node, job))
        for job in federation.jobs(1)
        for node in [federation.leaf.node(job)]
    ]
    assert all(models[0][0][name] is other[0][name] for other in models for name in SPARSE)
    # And never those of another model.
    changed = {k: t + 1 for k, t in federation.state().group("model").items()}
    state = replace(federation.state(), groups={**federation.state().groups, "model": changed})
    counts, _ = federation.method.model(federation.setup, state)
    assert torch.equal(counts["first.weight"], largest(changed["first.weight"], 0.9))


def test_what_does_not_fit_is_refused_by_the_method_s_own_key() -> None:
    with pytest.raises(InputError, match=r"method\.sparse: found 'nope\*'"):
        federation_of(Swat(sparse=("nope*",)))
    with pytest.raises(InputError, match="no layer to sparsify"):
        engine(Swat())
    setup = Setup(Task(net()), Training())
    with pytest.raises(InputError, match="task: found a dense model"):
        Swat(sparse=("*",)).check(setup, 1)
    for options in ({"sparsity": 1.0}, {"refresh": 0}, {"inputs": -0.1}, {"gradient": "x"}):
        with pytest.raises(ValueError, match="validation error"):
            Swat.model_validate(options)


def test_strategy_and_client_app_adapt_the_task_and_keep_its_masks() -> None:
    pytest.importorskip("flwr")
    from hansa.flower import client_app, strategy

    model = convolutions()
    mask = {"first.weight": torch.rand(8, 6, 3, 3) < 0.5}
    task = Task(attach(model, mask))
    plan = strategy(Swat(), task, TRAINING)
    assert isinstance(plan.setup.task.module, SparseModel)
    assert same(plan.setup.task.masks, mask)
    arrays = plan.initial_arrays()
    assert set(arrays) == set(convolutions().state_dict())
    client_app(Swat(), task, lambda context: images()["c0"], TRAINING)

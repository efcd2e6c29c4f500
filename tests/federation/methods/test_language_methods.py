"""The methods that WorldLM is measured by, where inner nodes hold data of their own."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import pytest
import torch

from hansa.data.clients import Client
from hansa.errors import InputError
from hansa.federation.engines.plan import EngineOptions
from hansa.federation.federation import Federation
from hansa.federation.message import State, Tensors
from hansa.federation.methods import (
    Centralised,
    DiLoCo,
    FedAvg,
    FedAvgTuned,
    FedPer,
    FedProx,
    HierFAVG,
    LocalOnly,
    Method,
)
from hansa.federation.methods.base import Work
from hansa.federation.node import Node
from hansa.federation.optimizer import Training
from hansa.federation.participation import Participation
from hansa.federation.rules import Rules
from hansa.federation.server import ServerOptimizer
from hansa.federation.store import DiskStore
from hansa.federation.tree import ROOT, Tree
from hansa.federation.wire import encode
from support import clients, net, same
from worldlm_tree import EVERY, LEAVES, TREE, left

SAMPLES = dict(zip(EVERY, (4, 9, 5, 7, 3, 8, 6), strict=True))
WHOLE = {"batch_size": 100, "epochs": 1}
"""Batches of all samples: their order, which depends on a node's place, plays no part."""


def data(names: Iterable[str] = EVERY) -> dict[str, Client]:
    """Clients of unequal size, the same whatever others there are."""
    found = {}
    for number, name in enumerate(EVERY):
        whole = list(clients(number + 1, SAMPLES[name]).values())[-1]
        if name in names:
            found[name] = whole
    return found


def federation(method: Method, names: Iterable[str] = EVERY, **options: Any) -> Federation:
    training = {"lr": 0.1, "batch_size": 3, "epochs": 2, **options.pop("training", {})}
    return Federation(
        net(),
        options.pop("data", None) or data(names),
        method,
        Training(**training),
        tree=options.pop("tree", TREE),
        seed=5,
        engine=options.pop("engine", EngineOptions(kind="sequential", workers=1)),
        **options,
    )


def near(first: Tensors, second: Tensors) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-5, atol=1e-6)


# FedAvg: an inner node is one more child of itself.


@pytest.mark.parametrize("method", [FedAvg(), FedAvg(weighting="uniform"), FedProx()], ids=repr)
def test_the_tree_is_the_flat_federation_of_all_that_hold_data(method: Method) -> None:
    deep = federation(method, training=WHOLE)
    renamed = {f"{name}-": client for name, client in data().items()}
    flat = federation(method, data=renamed, tree=Tree.flat(renamed), training=WHOLE)
    deep.run(3)
    flat.run(3)
    near(deep.model_of(ROOT).state_dict(), flat.model_of(ROOT).state_dict())


def test_the_metrics_and_weights_of_inner_nodes_count_above() -> None:
    made = federation(FedAvg())
    history = made.run(1)
    assert made.state_of(ROOT).scalars["weight"] == sum(SAMPLES.values())
    assert made.state_of("A").scalars["weight"] == SAMPLES["A"] + SAMPLES["a1"] + SAMPLES["a2"]
    count = {row["node"]: row["count"] for row in history.table("ledger").to_pylist()}
    assert count == {TREE.path_of(name): 2 * SAMPLES[name] for name in EVERY}
    assert made.state_of(ROOT).metrics["loss"][1] == 2 * sum(SAMPLES.values())


# HierFAVG: an inner node trains first, and its children start from there.


class Noted(HierFAVG):
    """HierFAVG that notes where training starts, and what it makes."""

    starts: ClassVar[list[tuple[int, str, Tensors]]] = []
    ends: ClassVar[list[tuple[int, str, Tensors]]] = []

    def begin(self, node: Node, state: State) -> Work:
        """Take note."""
        work = super().begin(node, state)
        self.starts.append((node.round, node.path, work["params"]))
        return work

    def settle(self, node: Node, state: State, work: Work) -> Any:
        """Take note."""
        self.ends.append((node.round, node.path, work["params"]))
        return super().settle(node, state, work)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> type[Noted]:
    monkeypatch.setattr(Noted, "starts", [])
    monkeypatch.setattr(Noted, "ends", [])
    return Noted


def test_children_start_from_what_their_parent_has_trained(noted: type[Noted]) -> None:
    federation(noted()).run(2)
    start = {(number, path): params for number, path, params in noted.starts}
    trained = {(number, path): params for number, path, params in noted.ends}
    assert len(start) == 2 * len(EVERY)
    for number, path in start:
        parent = path.rpartition("/")[0]
        if parent:
            assert same(start[number, path], trained[number, parent])


def test_inner_rounds_start_anew_from_the_mean_with_batches_of_their_own(
    noted: type[Noted],
) -> None:
    made = federation(noted(inner_rounds=2), (*LEAVES, "A"))
    history = made.run(2)
    rounds: dict[str, list[int]] = {}
    for number, path, _ in noted.starts:
        rounds.setdefault(path, []).append(number)
    assert rounds == {TREE.path_of(name): [1, 2, 3, 4] for name in ("A", *LEAVES)}
    start = {(number, path): params for number, path, params in noted.starts}
    # Where a turn begins is known: from the root's model, or from the mean of the turn before.
    assert same(start[1, "root/A"], net().state_dict())
    assert same(start[3, "root/A"], start[3, "root/B/b1"])
    assert not same(start[2, "root/A"], start[2, "root/B/b1"])
    rows = [(r["round"], r["node"]) for r in history.table("ledger").to_pylist()]
    assert sorted(rows) == sorted(
        [(k, path) for k in (1, 2) for path in ("root/A", "root/B")]
        + 2 * [(k, path) for k in (1, 2) for path in TREE.leaves()]
    )


def test_two_inner_rounds_are_two_rounds_of_the_federation_below() -> None:
    """A federation below a root with nobody beside it: its own rounds go on from each other."""
    tree = Tree({"A": ROOT, "a1": "A", "a2": "A"})
    names = ("A", "a1", "a2")
    deep = federation(HierFAVG(inner_rounds=2), names, tree=tree)
    plain = federation(HierFAVG(), names, tree=tree)
    deep.run(2)
    plain.run(4)
    assert left(deep) == left(plain)


@pytest.mark.parametrize("rounds", [1, 2])
def test_without_inner_data_one_inner_round_is_fedavg(rounds: int) -> None:
    rules = Participation(failure_rate=0.2)
    ours = federation(HierFAVG(inner_rounds=rounds), LEAVES, participation=rules)
    theirs = federation(FedAvg(), LEAVES, participation=rules)
    first, second = ours.run(3), theirs.run(3)
    assert (left(ours) == left(theirs)) is (rounds == 1)
    assert first.table("ledger").equals(second.table("ledger")) is (rounds == 1)


def test_a_rate_that_falls_by_rounds_has_no_inner_rounds() -> None:
    falling = {"lr_end": 0.01, "lr_rounds": 3}
    federation(HierFAVG(), training=falling)
    with pytest.raises(InputError, match=r"training\.lr_end: found 0\.01 with 2 inner rounds"):
        federation(HierFAVG(inner_rounds=2), training=falling)


# DiLoCo: the root's own step.


@pytest.mark.parametrize("names", [LEAVES, EVERY], ids=["leaves", "every"])
def test_the_outer_step_is_that_of_pytorchs_sgd(names: tuple[str, ...]) -> None:
    """Nesterov momentum on the mean change, over as many rounds as momentum needs to show."""
    ours = federation(DiLoCo(server=ServerOptimizer(kind="nesterov", lr=0.7, momentum=0.9)), names)
    params = {name: p.clone() for name, p in net().state_dict().items()}
    outer = torch.optim.SGD(params.values(), lr=0.7, momentum=0.9, nesterov=True)
    for number in (1, 2, 3):
        # One round of plain averaging from where the outer step has come to.
        mean = federation(FedAvg(), names)
        mean.keep_states_in(mean._engine.store, number - 1)
        mean._engine.store.put(ROOT, State({"model": dict(params)}))
        for _ in mean.rounds(number, number):
            pass
        after = mean.state_of(ROOT).group("model")
        for name, tensor in params.items():
            tensor.grad = tensor - after[name]
        outer.step()
        for _ in ours.rounds(number, number):
            pass
        near(ours.state_of(ROOT).group("model"), params)


def test_a_step_of_one_without_momentum_is_the_mean() -> None:
    server = ServerOptimizer(kind="nesterov", lr=1.0, momentum=0.0)
    ours, theirs = federation(DiLoCo(server=server)), federation(FedAvg())
    ours.run(3)
    theirs.run(3)
    near(ours.model_of(ROOT).state_dict(), theirs.model_of(ROOT).state_dict())


def test_only_the_root_has_an_outer_step_and_its_momentum_stays_there() -> None:
    made = federation(DiLoCo())
    history = made.run(3)
    groups = {name: {g for g, ts in made.state_of(name).groups.items() if ts} for name in EVERY}
    assert groups[ROOT] == {"model", "server.momentum"}
    assert all(group <= {"model"} for name, group in groups.items() if name != ROOT)
    plain = federation(FedAvg()).run(3)
    for column in ("up", "down"):
        assert history.table("ledger")[column].equals(plain.table("ledger")[column])


def test_momentum_outlives_an_interruption(tmp_path) -> None:
    whole, part, rest = (federation(DiLoCo()) for _ in range(3))
    whole.run(4)
    part.keep_states_in(DiskStore(tmp_path))
    for _ in part.rounds(2):
        pass
    rest.keep_states_in(DiskStore(tmp_path, 2), 2)
    for _ in rest.rounds(4, 3):
        pass
    assert left(rest) == left(whole)
    assert encode(rest.state_of(ROOT)) == encode(whole.state_of(ROOT))


# FedPer and local-only: what is personal stays with whoever trains it.


def test_every_node_with_data_has_a_head_of_its_own() -> None:
    made = federation(FedPer())
    made.run(3)
    held = {name: made.model_of(name).state_dict() for name in EVERY}
    heads = {encode(State({"h": {"w": held[name]["head.weight"]}})) for name in EVERY}
    assert len(heads) == len(EVERY)
    start = net().state_dict()["head.weight"]
    assert not any(held[name]["head.weight"].equal(start) for name in EVERY)
    # Bodies are common after the aggregation, but where a leaf has trained on.
    assert held["A"]["body.weight"].equal(held[ROOT]["body.weight"])


def test_the_body_is_averaged_over_every_node_with_data() -> None:
    """As on a flat federation: heads are where they were, whoever stands above them."""
    deep = federation(FedPer(), training=WHOLE)
    renamed = {f"{name}-": client for name, client in data().items()}
    flat = federation(FedPer(), data=renamed, tree=Tree.flat(renamed), training=WHOLE)
    deep.run(3)
    flat.run(3)
    first, second = deep.model_of(ROOT).state_dict(), flat.model_of(ROOT).state_dict()
    near(
        {n: first[n] for n in ("body.weight", "body.bias")},
        {n: second[n] for n in ("body.weight", "body.bias")},
    )
    for name in EVERY:
        mine, theirs = deep.model_of(name).state_dict(), flat.model_of(f"{name}-").state_dict()
        near({"h": mine["head.weight"]}, {"h": theirs["head.weight"]})


def test_an_inner_node_of_local_training_is_as_a_leaf_there_would_be() -> None:
    made = federation(LocalOnly(), ("A", *LEAVES))
    history = made.run(3)
    assert history.bytes()[3] == (0, 0)
    leaf = federation(LocalOnly(), ("A",), tree=Tree.flat(["A"]))
    leaf.run(3)
    assert same(made.model_of("A").state_dict(), leaf.model_of("A").state_dict())


def test_the_root_of_local_training_trains_for_itself() -> None:
    made = federation(LocalOnly())
    history = made.run(2)
    assert set(history.scored("test", "loss")[2]) == set(EVERY)
    found = made.state_of(ROOT).group("model")
    assert not same(found, net().state_dict())
    assert len(set(left(made).values())) == len(EVERY)


def test_the_tuned_scores_leave_the_common_model_alone() -> None:
    tuned, plain = federation(FedAvgTuned()), federation(FedAvg())
    first, second = tuned.run(2), plain.run(2)
    assert first.table("ledger").equals(second.table("ledger"))
    assert same(tuned.model_of(ROOT).state_dict(), plain.model_of(ROOT).state_dict())
    scores = [history.scored("test", "loss")[2] for history in (first, second)]
    assert all(scores[0][name] != scores[1][name] for name in LEAVES)


# Centralised: the yardstick that no federation reaches.


def test_centralised_training_makes_as_many_steps_on_all_data_as_all_nodes_would() -> None:
    rules = {"A": Rules(steps=4)}
    made = federation(Centralised(), training={"steps": 2, "epochs": 1}, rules=rules)
    history = made.run(2)
    (row, _) = history.table("ledger").to_pylist()
    # Seven nodes: A and what stands below it take 4 steps, the others 2.
    assert row["count"] == 3 * (3 * 4 + 4 * 2)
    assert set(history.scored("test", "loss")[2]) == set(EVERY)


# Whatever the method.


@pytest.mark.parametrize(
    "method",
    [FedAvg(), FedPer(), LocalOnly(), HierFAVG(inner_rounds=2), DiLoCo(), FedAvgTuned()],
    ids=lambda m: m.name,
)
def test_scoring_disk_and_interruption_change_nothing(method: Method, tmp_path) -> None:
    rules: Mapping[str, Rules] = {"B": Rules(participation=Participation(fraction=0.5), lr=0.05)}
    options: dict[str, Any] = {"rules": rules, "participation": Participation(failure_rate=0.2)}
    whole = federation(method, **options)
    for _ in whole.rounds(4, score_every=0):
        pass
    part, rest = federation(method, **options), federation(method, **options)
    part.keep_states_in(DiskStore(tmp_path, cache_bytes=0))
    for _ in part.rounds(2):
        pass
    rest.keep_states_in(DiskStore(tmp_path, 2, cache_bytes=0), 2)
    for _ in rest.rounds(4, 3):
        pass
    assert left(rest) == left(whole)
    for name in EVERY:
        assert encode(rest.state_of(name)) == encode(whole.state_of(name))

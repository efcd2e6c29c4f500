"""WorldLM: its reading of the paper, by hand and against methods that are known."""

import math
from typing import Any

import pytest
import torch

from hansa.federation.engines.plan import EngineOptions
from hansa.federation.methods import FedAvg, FedPer, HierFAVG, Method, WorldLM
from hansa.federation.participation import Participation
from hansa.federation.privacy import Privacy
from hansa.federation.rules import Rules
from hansa.federation.server import ServerOptimizer
from hansa.federation.tree import ROOT, Tree
from hansa.federation.wire import encode
from support import in_turn
from worldlm_tree import (
    EVERY,
    KEYS,
    LEAVES,
    TRAIN,
    TREE,
    by_row,
    federation,
    figures,
    halfway,
    ran,
    tiny,
)


@pytest.mark.parametrize("method", [FedAvg(), HierFAVG(), WorldLM(keys=0)], ids=lambda m: m.name)
def test_two_passes_by_hand(method: Method) -> None:
    """Pass 1: leaves 0 2 4 6, then 1 and 5, then 3. Pass 2: 1.5 3.5 5.5 7.5, 2.5 and 6.5, 4.5."""
    with halfway(method) as engine:
        for number, root in ((1, 3.0), (2, 4.5)):
            engine.round(number, score=False)
            assert engine.state().group("model")["w"].tolist() == [root]
        inner = [engine.state(path).group("model")["w"].item() for path in TREE.children(ROOT)]
        assert inner == [2.5, 6.5]


def test_inner_rounds_by_hand() -> None:
    """From 0 the leaves go halfway twice: A ends at 1.5 and B at 7.5 after two inner rounds."""
    with halfway(HierFAVG(inner_rounds=2)) as engine:
        engine.round(1, score=False)
        inner = [engine.state(path).group("model")["w"].item() for path in TREE.children(ROOT)]
        assert (inner, engine.state().group("model")["w"].item()) == ([1.5, 7.5], 4.5)


@pytest.mark.filterwarnings("ignore")  # what Flower and Ray warn of is theirs
def test_flowers_simulation_gives_the_local_engines_bits() -> None:
    """With data at the root and at an inner node, residuals, and children that fail."""
    method = WorldLM(threshold=0.999999, temperature=1.0)
    options: dict[str, Any] = {
        "names": (ROOT, "B", *LEAVES),
        "participation": Participation(failure_rate=0.2),
        "rules": {"a1": Rules(privacy=Privacy(unit="update", noise=0.01))},
    }
    here = federation(method, **options)
    there = federation(method, engine=EngineOptions(kind="flower", workers=1), **options)
    expected = here.run(3)
    with in_turn(1):
        found = there.run(3)
    for table in ("ledger", "figures", "pairs"):
        assert found.table(table).equals(expected.table(table)), table
    assert by_row(found) == by_row(expected)
    assert any(v for v in figures(expected, "residuals_came").values())
    for name in EVERY:
        assert encode(there.state_of(name)) == encode(here.state_of(name))


@pytest.mark.parametrize("names", [LEAVES, EVERY, ("B", *LEAVES)], ids=len)
def test_without_key_blocks_it_is_hierfavg(names: tuple[str, ...]) -> None:
    rules = Participation(failure_rate=0.2)
    models, ledger, _ = ran(WorldLM(keys=0), names, participation=rules)
    theirs, their_ledger, _ = ran(HierFAVG(), names, participation=rules)
    assert models == theirs
    assert ledger == their_ledger


def test_without_key_blocks_and_inner_data_it_is_fedavg() -> None:
    """On the same tree bit for bit; on a flat one as far as the rounding of means goes."""
    models, ledger, _ = ran(WorldLM(keys=0), LEAVES)
    theirs, their_ledger, _ = ran(FedAvg(), LEAVES)
    assert models == theirs
    assert ledger == their_ledger
    # A client's order of samples depends on its path: whole batches have none.
    whole: Any = {"training": {"batch_size": TRAIN, "lr": 0.1}}
    deep, flat = (
        federation(WorldLM(keys=0), LEAVES, **whole),
        federation(FedAvg(), LEAVES, tree=Tree.flat(LEAVES), **whole),
    )
    deep.run(3)
    flat.run(3)
    first, second = deep.model_of(ROOT).state_dict(), flat.model_of(ROOT).state_dict()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("names", [LEAVES, EVERY, (ROOT, *LEAVES), ("A", *LEAVES)], ids=str)
def test_with_key_blocks_that_stay_it_is_fedper(names: tuple[str, ...]) -> None:
    """Every node's own model and every byte."""
    ours = WorldLM(share_keys=False, schedule="parallel")
    rules = Participation(failure_rate=0.2)
    models, ledger, _ = ran(ours, names, participation=rules)
    theirs, their_ledger, _ = ran(FedPer(personal=("layers.1.*",)), names, participation=rules)
    assert models == theirs
    assert ledger == their_ledger


def test_a_bank_of_a_node_alone_leaves_its_key_blocks_as_they_are() -> None:
    """At so low a temperature that nobody else counts, leaves are as with key blocks that stay."""
    sharp = WorldLM(temperature=1e-6, residuals=False)
    alone_, _, _ = ran(sharp, LEAVES)
    stay, _, _ = ran(WorldLM(share_keys=False), LEAVES)
    assert {name: alone_[name] for name in LEAVES} == {name: stay[name] for name in LEAVES}


@pytest.mark.parametrize("granularity", ["block", "tensor", "row"])
@pytest.mark.parametrize("score", ["cosine", "centred"])
def test_at_an_endless_temperature_it_is_the_mean(score: Any, granularity: Any) -> None:
    options: dict[str, Any] = {"score": score, "granularity": granularity, "residuals": False}
    hot, mean = (
        federation(WorldLM(**options, **more), LEAVES)
        for more in ({"temperature": 1e12}, {"combine": "mean"})
    )
    hot.run(3)
    mean.run(3)
    for name in EVERY:
        for key, tensor in hot.model_of(name).state_dict().items():
            torch.testing.assert_close(tensor, mean.model_of(name).state_dict()[key])


def test_without_a_step_key_blocks_never_change_by_aggregation() -> None:
    made, before = federation(WorldLM(nu=0.0), LEAVES), tiny().state_dict()
    made.run(3)
    root = made.model_of(ROOT).state_dict()
    assert all(root[name].equal(before[name]) for name in KEYS)
    assert not any(root[name].equal(before[name]) for name in ("embed.weight", "head.bias"))


def test_half_a_step_ends_halfway() -> None:
    """At the root of a flat tree, which receives nothing."""
    after, tree = {}, Tree.flat(LEAVES)
    for nu in (0.0, 0.5, 1.0):
        made = federation(WorldLM(nu=nu, residuals=False), LEAVES, tree=tree)
        made.run(1)
        after[nu] = made.state_of(ROOT).group("model")
    for name in KEYS:
        torch.testing.assert_close(after[0.5][name], (after[0.0][name] + after[1.0][name]) / 2)


def test_the_server_steps_along_the_change_of_the_backbone_alone() -> None:
    """A rate of one and no momentum is the plain mean, up to rounding; half a rate is half."""
    plain = federation(WorldLM(residuals=False), LEAVES)
    plain.run(1)
    root, before = plain.model_of(ROOT).state_dict(), tiny().state_dict()
    tree = Tree.flat(LEAVES)
    for lr in (1.0, 0.5):
        server = ServerOptimizer(kind="nesterov", lr=lr, momentum=0.0)
        flat, mean = (
            federation(WorldLM(residuals=False, server=s), LEAVES, tree=tree)
            for s in (server, ServerOptimizer())
        )
        flat.run(1)
        mean.run(1)
        root, whole = flat.model_of(ROOT).state_dict(), mean.model_of(ROOT).state_dict()
        for name in root:
            step = 1.0 if name in KEYS else lr
            wanted = before[name] + step * (whole[name] - before[name])
            torch.testing.assert_close(root[name], wanted)


# Attention on the tree; by hand it stands in test_attention.py.


@pytest.mark.parametrize("schedule", ["levels", "parallel"])
@pytest.mark.parametrize("self_in_bank", [True, False])
def test_noted_weights_are_shares_of_whoever_answered(schedule: Any, self_in_bank: bool) -> None:
    """At every node and in every pass, with children that fail."""
    method = WorldLM(schedule=schedule, self_in_bank=self_in_bank, threshold=0.9999)
    _, ledger, history = ran(method, rounds=6, participation=Participation(failure_rate=0.4))
    answered = {(row["round"], row["node"]) for row in ledger if row["fate"] == "ok"}
    for way in ("up", "down"):
        found = figures(history, f"attention_{way}")
        totals: dict[tuple[int, str], float] = {}
        for (number, node, other), value in found.items():
            totals[number, node] = totals.get((number, node), 0.0) + value
            if way == "up" and other != node:
                assert (number, other) in answered
            assert self_in_bank or other != node
        assert totals
        assert all(total == pytest.approx(1) for total in totals.values())
        for (number, node, _), value in figures(history, f"entropy_{way}").items():
            most = sum((number, node) == key[:2] for key in found)
            assert 0 <= value <= math.log(max(1, most)) + 1e-9

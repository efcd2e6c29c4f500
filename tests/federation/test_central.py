"""Central privacy: the root clips, sums and noises; the accountant and the budget count clients."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import hansa
from direct import Direct, rounds
from hansa.config import load
from hansa.errors import InputError
from hansa.federation.central import Central
from hansa.federation.engines.flower.remote import RemoteEngine
from hansa.federation.engines.flower.site import LeafWorker, Site
from hansa.federation.leaf import Leaf
from hansa.federation.message import Tensors
from hansa.federation.methods import METHODS, DiLoCo, FedAvg, FedPer
from hansa.federation.methods.base import Method
from hansa.federation.participation import Participation
from hansa.federation.privacy import Privacy
from hansa.federation.rules import Rules
from hansa.federation.tree import ROOT, Tree
from hansa.federation.wire import encode
from hansa.report.page import report
from support import clients, config, engine, made, net, run

POISSON = Participation(fraction=0.5, sampling="poisson")


def private(**options: Any) -> Privacy:
    return Privacy.model_validate({"unit": "update", **options})


def federation(
    method: Method | None = None, central: Privacy | None = None, **options: Any
) -> hansa.Federation:
    """Three clients, of which the root takes care."""
    return hansa.Federation(
        options.pop("model", None) or net(),
        clients(),
        method or FedAvg(),
        hansa.Training(lr=0.1, batch_size=3),
        seed=5,
        central=central or private(clip=0.5, noise=1.0),
        **options,
    )


def plain(clip: float = math.inf, noise: float = 0.0, rate: float = 1.0) -> Central:
    return Central(private(clip=clip, noise=noise), rate)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# The mean


def test_two_updates_are_cut_summed_and_divided_by_hand() -> None:
    """(3, 4) is cut to the norm 1, (0.3, 0) is not; half of five clients are expected."""
    before = {"w": torch.tensor([1.0, 1.0])}
    replies: list[Tensors] = [{"w": torch.tensor([4.0, 5.0])}, {"w": torch.tensor([1.3, 1.0])}]
    found = plain(clip=1.0, rate=0.5).mean(before, replies, 5, rng())
    assert torch.allclose(found["w"], torch.tensor([1 + (0.6 + 0.3) / 2.5, 1 + 0.8 / 2.5]))


def test_the_norm_is_taken_over_all_tensors() -> None:
    before = {"a": torch.zeros(1), "b": torch.zeros(1, 1)}
    reply = {"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}
    found = plain(clip=1.0).mean(before, [reply], 1, rng())
    assert torch.allclose(found["a"], torch.tensor([0.6]))
    assert torch.allclose(found["b"], torch.tensor([[0.8]]))


def test_an_update_that_is_no_number_counts_as_nothing() -> None:
    before = {"w": torch.zeros(2)}
    replies: list[Tensors] = [{"w": torch.tensor([math.nan, 0.0])}, {"w": torch.tensor([1.0, 0.0])}]
    found = plain(clip=1.0).mean(before, replies, 2, rng())
    assert torch.equal(found["w"], torch.tensor([0.5, 0.0]))


@pytest.mark.parametrize("num", [0, 3])
def test_noise_has_its_deviation_whoever_answered(num: int) -> None:
    """sigma S / (q n) = 2 * 0.5 / (0.25 * 8), also where nobody was asked."""
    before = {"w": torch.zeros(40_000)}
    replies: list[Tensors] = [{"w": torch.zeros(40_000)} for _ in range(num)]
    found = plain(clip=0.5, noise=2.0, rate=0.25).mean(before, replies, 8, rng())
    assert float(found["w"].std()) == pytest.approx(0.5, rel=0.02)
    assert float(found["w"].mean()) == pytest.approx(0, abs=0.01)


def test_noise_does_not_depend_on_the_order_of_names() -> None:
    before = {"a": torch.zeros(3), "b": torch.zeros(3)}
    central = plain(clip=1.0, noise=1.0)
    found = central.mean(before, [], 1, rng())
    other = central.mean(dict(reversed(before.items())), [], 1, rng())
    assert all(torch.equal(found[name], other[name]) for name in before)


def test_one_client_more_moves_the_sum_by_no_more_than_the_norm() -> None:
    before = {"w": torch.zeros(4)}
    replies: list[Tensors] = [{"w": torch.randn(4, generator=rng()) * k} for k in range(1, 5)]
    central = plain(clip=0.7)
    for k in range(4):
        without = central.mean(before, replies[:k] + replies[k + 1 :], 1, rng())
        gap = (central.mean(before, replies, 1, rng())["w"] - without["w"]).norm()
        assert float(gap) <= 0.7 + 1e-6


# A run


def test_without_limit_and_noise_it_is_the_plain_mean() -> None:
    bare = federation(central=private(clip=math.inf, noise=0.0))
    bare.run(2)
    mean = hansa.Federation(
        net(),
        clients(),
        FedAvg(weighting="uniform"),
        hansa.Training(lr=0.1, batch_size=3),
        seed=5,
    )
    mean.run(2)
    for name, tensor in mean.model_of(ROOT).state_dict().items():
        assert torch.allclose(bare.model_of(ROOT).state_dict()[name], tensor, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in METHODS if not METHODS[n].alone])
def test_methods_that_need_a_mean_alone_run_and_tell_what_was_spent(name: str) -> None:
    history = federation(made(name)).run(2)
    assert history.summary()["epsilon"] == pytest.approx(plain(1.0, 1.0).epsilon(2))
    assert history.epsilons().keys() == {ROOT}


def test_personal_parts_are_neither_noised_nor_sent() -> None:
    """The root holds the body alone, and heads go on by training and nothing else."""
    one = federation(FedPer(), private(clip=0.5, noise=1.0))
    one.run(1)
    bare = federation(FedPer(), private(clip=math.inf, noise=0.0))
    bare.run(1)
    assert "head.weight" not in one.state_of(ROOT).group("model")
    for name in ("head.weight", "head.bias"):
        assert torch.equal(
            one.state_of("c0").group("model")[name], bare.state_of("c0").group("model")[name]
        )


def test_the_outer_step_of_diloco_goes_along_the_noised_mean() -> None:
    options: dict[str, Any] = {"central": private(clip=0.5, noise=1.0)}
    step = federation(DiLoCo(), **options)
    step.run(1)
    mean = federation(FedAvg(), **options)
    mean.run(1)
    for name, before in net().named_parameters():
        change = mean.state_of(ROOT).group("model")[name] - before.detach()
        expected = before.detach() + 0.7 * 1.9 * change
        assert torch.allclose(step.state_of(ROOT).group("model")[name], expected, atol=1e-5)


def test_the_root_keeps_no_training_metrics() -> None:
    ran = federation()
    ran.run(1)
    assert not ran.state_of(ROOT).metrics


def test_a_budget_lasts_for_so_many_rounds_and_then_nothing_changes() -> None:
    spent = plain(0.5, 1.0, 0.5)
    budget = (spent.epsilon(2) + spent.epsilon(3)) / 2
    central = private(clip=0.5, noise=1.0, epsilon=budget)
    ran = federation(central=central, participation=POISSON)
    history = ran.run(4)
    short = federation(central=central, participation=POISSON)
    short.run(2)
    assert encode(ran.state_of(ROOT)) == encode(short.state_of(ROOT))
    rows = [row for row in history.table("ledger").to_pylist() if row["round"] > 2]
    assert [(row["node"], row["fate"]) for row in rows] == [(ROOT, "spent")] * 2
    assert all("nobody was asked" in row["error"] for row in rows)
    assert history.summary()["epsilon"] == pytest.approx(spent.epsilon(2))


@pytest.mark.parametrize(("noise", "rate", "rounds"), [(1.0, 0.25, 10), (2.0, 1.0, 3)])
def test_epsilon_is_that_of_opacus(noise: float, rate: float, rounds: int) -> None:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for _ in range(rounds):
        accountant.step(noise_multiplier=noise, sample_rate=rate)
    expected = accountant.get_epsilon(1e-5)
    assert plain(0.3, noise, rate).epsilon(rounds) == pytest.approx(expected, rel=0.02)


def test_a_run_that_goes_on_in_the_middle_is_the_same_to_the_last_bit(tmp_path) -> None:
    values = config(tmp_path, method={"name": "fedper"})
    values["privacy"] = {"where": "central", "clip": 0.5, "noise": 1.0}
    values["participation"] = {"fraction": 0.5, "sampling": "poisson"}
    whole = hansa.train(values | {"name": "whole"})
    half = hansa.train(values | {"name": "half", "rounds": 2})
    half = hansa.train(resume=half.path, overrides=["rounds=4"])
    assert half.history.summary()["epsilon"] == whole.history.summary()["epsilon"]
    state = "states"
    mine = {p.name: p.read_bytes() for p in (whole.path / state).rglob("*.msg")}
    theirs = {p.name: p.read_bytes() for p in (half.path / state).rglob("*.msg")}
    assert mine
    assert mine == theirs
    card = hansa.read_bundle(half.path / "bundle").card
    assert card["metrics"]["epsilon"] == half.history.summary()["epsilon"]


# Sampling


def test_each_child_is_asked_by_a_chance_of_its_own() -> None:
    children = [f"root/c{k}" for k in range(20)]
    rule = Participation(fraction=0.3, sampling="poisson")
    asked = [rule.choose(children, 0, ROOT, number) for number in range(1, 401)]
    sizes = torch.tensor([float(len(row)) for row in asked])
    assert float(sizes.mean()) == pytest.approx(6, abs=0.35)
    assert float(sizes.var()) == pytest.approx(20 * 0.3 * 0.7, rel=0.25)  # binomial
    assert all(row == sorted(row, key=children.index) for row in asked)


def test_a_round_in_which_nobody_is_asked_changes_nothing_without_privacy() -> None:
    rule = Participation(fraction=1e-9, sampling="poisson")
    local = engine(FedAvg(), participation=rule)
    before = local.common().state_dict()
    results = run(local, 2)
    assert not any(result.visits for result in results)
    after = local.common().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# Refusals


@pytest.mark.parametrize("name", ["fedselect", "scaffold", "worldlm", "local", "zerofl"])
def test_methods_that_need_each_reply_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(InputError, match="'central' with method") as caught:
        federation(made(name))
    assert METHODS[name].alone in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"participation": Participation(fraction=0.5)}, "poisson"),
        ({"participation": Participation(newcomers=1)}, "newcomers"),
        ({"central": Privacy(unit="gradient")}, "privacy.unit"),
        ({"rules": {"c1": Rules(privacy=Privacy())}}, "one of them"),
        ({"model": net(nn.BatchNorm1d(6))}, "running statistics"),
    ],
)
def test_what_the_bound_does_not_cover_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        federation(**options)


def test_a_deeper_tree_is_refused() -> None:
    tree = Tree({"a": ROOT, "c0": "a", "c1": "a", "c2": ROOT})
    with pytest.raises(InputError, match="nobody has clipped"):
        federation(tree=tree)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"privacy": {"where": "central", "unit": "gradient"}}, "unit"),
        (
            {"privacy": {"where": "clients"}, "nodes": {"a": {"text": "python:manual"}}},
            "nodes.root",
        ),
        ({"privacy": {}, "pruning": {"method": "snip"}}, "pruning"),
        ({"privacy": {"where": "server"}}, "privacy.where"),
    ],
)
def test_wrong_tables_are_refused_by_name(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load(values)


def test_a_table_reads_back_equal() -> None:
    for privacy in ({"where": "central"}, {"unit": "gradient", "epsilon": 3.0}):
        found = load({"privacy": privacy})
        assert load(found.as_dict()) == found
    assert found.rules[ROOT].privacy == Privacy(epsilon=3.0)


@pytest.mark.parametrize("unit", ["gradient", "update"])
def test_clients_of_a_flat_run_can_all_be_private(unit: str, tmp_path) -> None:
    values = config(tmp_path, method={"name": "fedavg"}, participation={}, rounds=1)
    ran = hansa.train(values | {"privacy": {"unit": unit, "noise": 1.0}})
    assert ran.history.epsilons().keys() == ran.history.leaves()
    assert ran.history.summary()["epsilon"] == max(ran.history.epsilons().values())
    assert "Differential privacy" in report([ran]).read_text()


def test_requests_carry_the_same_rounds(tmp_path) -> None:
    """A root whose clients are elsewhere makes the same noised model, and stops where it would."""
    central = private(clip=0.5, noise=1.0, epsilon=plain(0.5, 1.0, 0.5).epsilon(2) + 1e-6)
    ran = federation(central=central, participation=POISSON)
    expected = ran.run(3).table("ledger").to_pylist()
    local = federation(central=central, participation=POISSON)._engine
    leaf = Leaf(local.method, local.setup, local.seed)
    sites = {
        path: Site(path, tmp_path / path, LeafWorker(path, client, leaf))
        for path, client in local.clients.items()
    }
    about = (local.tree, local.samples, local.method, local.setup, local.seed)
    remote = RemoteEngine(Direct(sites), "run", *about, POISSON)
    results = rounds(remote, 3)
    assert encode(remote.state()) == encode(ran.state_of(ROOT))
    found = [(r.number, v.path, v.fate) for r in results for v in r.visits]
    assert found == [(row["round"], row["node"], row["fate"]) for row in expected]
    assert found[-1] == (3, ROOT, "spent")

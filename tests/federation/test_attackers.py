"""What simulated attackers send, who they are, and that nobody is scored by them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from hansa.config import load
from hansa.errors import InputError
from hansa.federation.attackers import Attack, Attackers, largest_z
from hansa.federation.engines.plan import EngineOptions
from hansa.federation.federation import Federation
from hansa.federation.message import Message, State
from hansa.federation.methods import METHODS, FedAvg, FedSelect
from hansa.federation.methods.base import Method, Work
from hansa.federation.node import Node
from hansa.federation.optimizer import Training
from hansa.federation.robust import Robust
from hansa.training import train
from support import clients, config, engine, everything, made, net, run

BAD = frozenset({"root/c1"})


def federation(attackers: Attackers, method: Method | None = None, **options: Any) -> Federation:
    how = options.pop("engine", EngineOptions(kind="sequential", workers=1))
    training = Training(lr=0.1, batch_size=3)
    return Federation(
        net(), clients(5), method or FedAvg(), training, engine=how, attackers=attackers, **options
    )


def changes(attackers: Attackers | None, method: Method | None = None) -> dict[str, torch.Tensor]:
    """Return what one client alone moves the model by, per parameter."""
    alone = clients(2)
    training = Training(lr=0.1, batch_size=3)
    running = Federation(
        net(),
        alone,
        method or FedAvg(),
        training,
        engine=EngineOptions(kind="sequential", workers=1),
        attackers=attackers,
    )
    before = running.state_of("root").group("model")
    running.run(1)
    after = running.state_of("root").group("model")
    return {name: after[name] - before[name] for name in before}


def test_a_flipped_sign_turns_a_client_round() -> None:
    plain = changes(None)
    only = {
        k: changes(Attackers(kind="sign_flip", clients=(k,), scale=0.0)) for k in ("c0", "c1")
    }  # who sends no change: what is left is the other's half
    turned = changes(Attackers(kind="sign_flip", clients=("c1",), scale=3.0))
    for name, change in plain.items():
        torch.testing.assert_close(only["c0"][name] + only["c1"][name], change)
        torch.testing.assert_close(turned[name], only["c1"][name] - 3 * only["c0"][name])


def test_noise_is_as_long_as_it_should_be_and_drawn_by_the_seed() -> None:
    attack = Attack("noise", BAD, 10.0)
    start = {"a": torch.ones(40), "b": torch.zeros(30)}
    ended = {"a": torch.ones(40), "b": torch.full((30,), 2.0)}
    found = [attack.turned(start, ended, torch.Generator().manual_seed(k)) for k in (0, 0, 1)]
    moved = torch.cat([found[0][name] - start[name] for name in start])
    assert float(moved.norm()) == pytest.approx(10 * 2 * 30**0.5, rel=1e-4)
    assert float((found[0]["a"] - 1).norm()) > 0
    assert torch.equal(found[0]["a"], found[1]["a"])
    assert not torch.equal(found[0]["a"], found[2]["a"])


def sent(kind: str, scale: float | None, num: int = 1) -> Mapping[str, Any]:
    values = {"root/c0": [1.0, 4.0], "root/c1": [9.0, 9.0], "root/c2": [3.0, 4.0]}
    replies = {
        path: Message(
            {"model": {"w": torch.tensor(row)}, "n": {"k": torch.tensor([7])}}, {"weight": 2}
        )
        for path, row in values.items()
    }
    attack = Attack(kind, BAD, scale)  # type: ignore[arg-type]
    return attack.replied(replies, {"model": {"w": torch.tensor([1.0, 1.0])}})


def test_a_little_is_mean_less_some_deviations_of_the_honest() -> None:
    found = sent("little", 2.0)
    assert found["root/c1"].group("model")["w"].tolist() == [0, 4]  # 2 - 2 * 1, 4 - 2 * 0
    assert found["root/c1"].group("n")["k"].tolist() == [7]
    assert found["root/c1"].scalars == {"weight": 2}
    assert found["root/c0"].group("model")["w"].tolist() == [1, 4]


def test_inner_product_is_against_the_mean_change_of_the_honest() -> None:
    found = sent("inner_product", 0.5)
    assert found["root/c1"].group("model")["w"].tolist() == [0.5, -0.5]  # 1 - 0.5 * (1, 3)


def test_z_is_that_of_the_paper() -> None:
    # n = 50, f = 24: s = 26 - 24 = 2, (26 - 2) / 26 = 0.923 lie below.
    assert largest_z(50, 24) == pytest.approx(1.4261, abs=1e-4)
    assert largest_z(20, 2) == 0


def test_labels_are_flipped_where_clients_train_and_nowhere_else() -> None:
    data = {f"root/{name}": client for name, client in clients(3).items()}
    found = Attack("label_flip", BAD, None).poisoned(data, 3)
    inputs, labels = data["root/c1"].batch("train")
    assert torch.equal(found["root/c1"].batch("train")[1], 2 - labels)
    assert torch.equal(found["root/c1"].batch("train")[0], inputs)
    assert torch.equal(found["root/c1"].batch("test")[1], data["root/c1"].batch("test")[1])
    assert torch.equal(data["root/c1"].batch("train")[1], labels)
    assert found["root/c0"] is data["root/c0"]


def test_attackers_are_drawn_by_the_seed_and_no_score_is_about_them() -> None:
    attackers = Attackers(kind="sign_flip", share=0.4)
    running = federation(attackers, seed=3, robust=Robust(rule="median"))
    assert len(running.attackers) == 2
    assert running.attackers == federation(attackers, seed=3).attackers
    assert len({federation(attackers, seed=k).attackers for k in range(8)}) > 1
    history = running.run(2)
    honest = {f"c{k}" for k in range(5)} - set(running.attackers)
    assert history.scored("test", "accuracy")[2].keys() == honest
    pairs = history.table("pairs").to_pylist()
    assert pairs == []  # which FedAvg has none of
    own = federation(attackers, FedSelect(), seed=3)
    table = own.run(1).table("pairs")
    assert {name.rpartition("/")[2] for name in table["first"].to_pylist()} == {
        f"c{k}" for k in range(5)
    } - set(own.attackers)


KINDS = ("sign_flip", "noise", "label_flip", "little", "inner_product")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [n for n, method in METHODS.items() if method.averages])
def test_every_attack_runs_against_every_method_or_is_refused(name, kind) -> None:
    attackers = Attackers(kind=kind, clients=("c1",))
    if METHODS[name].masked and kind in ("little", "inner_product"):
        with pytest.raises(InputError, match="differ in form"):
            federation(attackers, made(name))
        return
    running = federation(attackers, made(name))
    running.run(1)
    assert all(t.isfinite().all() for t in running.state_of("root").group("model").values())


@pytest.mark.parametrize("kind", KINDS)
def test_stacks_change_only_the_rounding(kind) -> None:
    models = []
    for how in (
        EngineOptions(kind="sequential", workers=1),
        EngineOptions(kind="stacked", stack=3, workers=1),
    ):
        running = federation(Attackers(kind=kind, clients=("c1", "c4")), engine=how)
        running.run(2)
        models.append(running.state_of("root").group("model"))
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["noise", "little"])
def test_processes_change_no_bit(kind) -> None:
    found = []
    for workers in (1, 2):
        how = EngineOptions(kind="sequential", workers=workers)
        running = federation(Attackers(kind=kind, clients=("c1",)), engine=how)
        running.run(2)
        found.append(running.state_of("root").group("model"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class Odd(FedAvg):
    """A client replies with what it should not, as an attacker may."""

    how: str = "nan"

    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        _, reply = super().end(node, state, work)
        if node.path != "root/c1" or node.round != 2:
            return State({"seen": {"w": torch.ones(1)}}), reply
        model, scalars, metrics = dict(reply.group("model")), dict(reply.scalars), reply.metrics
        first = next(iter(model))
        if self.how == "nan":
            model[first] = model[first] * torch.nan
        elif self.how == "shape":
            model[first] = model[first][:1]
        elif self.how == "missing":
            del model[first]
        elif self.how == "weight":
            scalars["weight"] = float("inf")
        elif self.how == "negative":
            scalars["weight"] = -1.0
        else:
            metrics = {"loss": (float("nan"), 1.0)}
        groups = {**reply.groups, "model": model}
        return State({"seen": {"w": torch.zeros(1)}}), Message(groups, scalars, metrics)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("nan", "model/body.weight is not finite"),
        ("shape", "model/body.weight is torch.float32"),
        ("missing", "differs from the model in body.weight"),
        ("weight", "weight is inf"),
        ("negative", "weight is -1.0"),
        ("metric", "the metric loss is nan"),
    ],
)
@pytest.mark.parametrize("rule", [None, Robust(rule="median")])
def test_a_reply_of_no_use_is_excluded_and_named(how, why, rule, caplog) -> None:
    local = engine(Odd(how=how))
    local.setup = replace(local.setup, robust=rule)
    results = run(local, 3)
    assert [visit.fate for visit in results[1].visits] == ["ok", "excluded", "ok"]
    assert why in results[1].visits[1].error
    assert results[1].visits[1].up == 0
    assert "round 2: c1: excluded" in caplog.text
    assert [visit.fate for visit in results[2].visits] == ["ok"] * 3
    # The other two make the mean between them, and the client keeps the state it had.
    model = local.state().group("model")
    assert all(tensor.isfinite().all() for tensor in model.values())


def test_who_is_excluded_keeps_the_state_it_had_and_is_no_part_of_the_mean() -> None:
    local = engine(Odd(how="shape"))
    with local:
        local.round(1)
        held = local.state()
        local.round(2)
        assert local.state("root/c1").group("seen")["w"].tolist() == [1]
    rest = {name: client for name, client in clients().items() if name != "c1"}
    other = engine(FedAvg(), data=rest)
    with other:
        other.store.put("root", held)
        other.round(2)
    expected = other.state().group("model")
    assert all(torch.equal(t, expected[n]) for n, t in local.state().group("model").items())


def test_no_attack_leaves_every_bit() -> None:
    def whole(attack: Attack | None) -> tuple[object, ...]:
        local = engine(FedAvg())
        local.setup = replace(local.setup, attack=attack)
        return everything(local, run(local))

    assert whole(None) == whole(Attack("little", frozenset(), 1.0))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kind": "sign_flip"}, "either share or clients"),
        ({"kind": "sign_flip", "share": 0.1, "clients": ["c1"]}, "either share or clients"),
        ({"kind": "label_flip", "share": 0.1, "scale": 2.0}, "no scale"),
        ({"kind": "gossip", "share": 0.1}, "inner_product"),
        ({"kind": "noise", "share": 1.0}, "less than 1"),
    ],
)
def test_wrong_options_are_refused(options, why) -> None:
    with pytest.raises(ValidationError, match=why):
        Attackers.model_validate(options)


def test_attackers_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match=r"attackers\.clients: found 'x'"):
        federation(Attackers(kind="noise", clients=("x",)))
    with pytest.raises(InputError, match="all clients"):
        federation(Attackers(kind="noise", clients=tuple(f"c{k}" for k in range(5))))
    with pytest.raises(InputError, match="in which no client's reply is averaged"):
        federation(Attackers(kind="noise", clients=("c1",)), made("local"))
    with pytest.raises(InputError, match="flower"):
        federation(Attackers(kind="noise", clients=("c1",)), engine=EngineOptions(kind="flower"))


def test_a_run_names_rule_and_attackers_in_its_provenance(tmp_path) -> None:
    values = config(
        tmp_path,
        robust={"rule": "median"},
        attackers={"kind": "sign_flip", "share": 0.25},
        method={"name": "fedavg"},
        participation={},
        rounds=1,
    )
    finished = train(load(values))
    assert len(finished.checkpoint["attackers"]) == 1
    card = finished.config.as_dict()
    assert card["attackers"] == {"kind": "sign_flip", "share": 0.25}
    assert card["robust"] == {"rule": "median"}
    scored = finished.history.scored("test", "accuracy")[1]
    assert not set(finished.checkpoint["attackers"]) & scored.keys()
    assert len(scored) == 3

import warnings
from typing import Any

import pytest
import torch
from attacked import WORLD, built
from pydantic import ValidationError
from torch import nn

from hansa.processes import one_thread
from hansa.safeguard.attacks import Probe, _batches, attack, edited
from hansa.safeguard.losses import next_token, run
from hansa.safeguard.redteam_options import Attack, Edit, RedteamOptions
from hansa.safeguard.world import World
from hansa.seeding import generator


@pytest.fixture(scope="module")
def world() -> World:
    return World(WORLD)


@pytest.fixture(scope="module")
def probe(world: World) -> Probe:
    return Probe(world)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    with one_thread():
        yield


def spec(**values: Any) -> Attack:
    return Attack(**{"name": "a", "steps": 3, "batch": 4, **values})


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def header(world: World, table: str) -> int:
    """Return the token that names a table."""
    first = torch.zeros(1, WORLD.facts, dtype=torch.int64)
    return int(world.rows(table, first, first).tokens[0, 1])  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [None, 2])
def test_the_attacked_model_stays_as_it_was(world: World, probe: Probe, rank: int | None) -> None:
    model = built(world)
    before, modules = state(model), {name for name, _ in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curve = attack(model, world, spec(rank=rank, lrs=(0.1,)), 0.1, 0, (2,), probe)
    assert [point["step"] for point in curve] == [2, 3]
    assert {name for name, _ in model.named_modules()} == modules
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_edited_model_stays_as_it_was(world: World, probe: Probe) -> None:
    model = built(world)
    before = state(model)
    for kind, amount in (("quantise", 2), ("prune", 0.9), ("noise", 5.0)):
        how = Edit(name=kind, kind=kind, amount=amount)  # type: ignore[arg-type]
        assert edited(model, how, 0, probe)[0]["step"] == 0
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_adapters_train_and_the_weights_below_them_do_not(
    world: World, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = built(world), []
    monkeypatch.setattr(Probe, "__call__", lambda self, m, step: seen.append(m) or {"step": step})
    attack(model, world, spec(rank=2), 0.1, 0, (), probe)
    (attacked,) = seen
    trained = {name for name, p in attacked.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    for name, value in model.named_parameters():
        held = dict(attacked.named_parameters())
        below = name.replace(".weight", ".base_layer.weight")
        assert torch.equal(held.get(below, held.get(name)), value)  # type: ignore[arg-type]
    assert any(bool((p != 0).all()) for n, p in attacked.named_parameters() if "lora_B" in n)


def test_an_attack_is_plain_training_on_the_attackers_rows(world: World, probe: Probe) -> None:
    model, rate = built(world), 0.01
    found = attack(model, world, spec(), rate, 5, (3,), probe)
    plain = built(world)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=rate, weight_decay=0.01)
    losses = []
    for step in range(3):
        rows = world.source("attacker").draw(4, generator(5, "attack", step))
        optimizer.zero_grad()
        loss = next_token(run(plain, rows).logits, rows)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert found == [{**probe(plain, 3), "loss": sum(losses) / 3}]


def test_seeds_change_the_order_of_the_data(world: World) -> None:
    first, again, other = (
        torch.stack([rows.tokens for rows in _batches(world, spec(), seed)]) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("values", "retained"),
    [
        ({}, [0, 0, 0, 0, 0]),
        ({"data": "benign"}, [8, 8, 8, 8, 8]),
        ({"data": "switch", "benign": 0.5}, [8, 8, 0, 0, 0]),
        ({"data": "mixed", "benign": 0.25}, [2, 2, 2, 2, 2]),
    ],
)
def test_batches_hold_what_the_attack_says(
    world: World, values: dict[str, Any], retained: list[int]
) -> None:
    batches = list(_batches(world, spec(steps=5, batch=8, **values), 0))
    assert [len(rows) for rows in batches] == [8] * 5
    found = [int((rows.tokens[:, 1] == header(world, "retained")).sum()) for rows in batches]
    assert found == retained
    # Of the restricted table it sees the attacker's entities alone.
    mine = world.rows(
        "restricted",
        world.parts["attacker"].unsqueeze(1).expand(-1, WORLD.facts),
        torch.zeros(len(world.parts["attacker"]), WORLD.facts, dtype=torch.int64),
    ).tokens[:, 2::4]
    for rows in batches:
        away = rows.tokens[rows.tokens[:, 1] == header(world, "restricted")][:, 2::4]
        assert set(away.flatten().tolist()) <= set(mine.flatten().tolist())


def test_fresh_facts_are_none_that_the_world_has(world: World) -> None:
    source, questions = world.fresh()
    rows = source.draw(64, generator(0, "t"))
    known = world.source("retain").draw(4096, generator(0, "t"))
    facts, others = (
        {tuple(fact) for fact in r.tokens[:, 2:].reshape(-1, 4).tolist()} for r in (rows, known)
    )
    share = len(facts & others) / len(facts)
    assert share < 0.4  # one of eight values is the same by chance
    asked = questions.rows.tokens[:, 2:].reshape(-1, 4).tolist()
    assert facts <= {tuple(fact) for fact in asked}


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "adagrad", "adadelta", "adafactor"])
def test_every_optimizer_attacks(world: World, probe: Probe, optimizer: str) -> None:
    model = built(world)
    curve = attack(model, world, spec(optimizer=optimizer, steps=8), 0.05, 0, (1,), probe)
    assert curve[1]["loss"] < curve[0]["loss"]


def test_a_schedule_changes_the_steps(world: World, probe: Probe) -> None:
    model = built(world)
    losses = {
        schedule: attack(model, world, spec(schedule=schedule, steps=20), 0.01, 0, (), probe)
        for schedule in ("constant", "warm_up", "cosine")
    }
    assert len({curve[0]["loss"] for curve in losses.values()}) == 3


def test_a_loss_that_is_no_number_ends_the_attack(world: World, probe: Probe) -> None:
    broken = built(world)
    next(iter(broken.parameters())).data[:] = torch.inf
    assert attack(broken, world, spec(), 0.1, 0, (1,), probe) == []


def test_the_prompt_that_recovers_most_counts(world: World) -> None:
    point = Probe(world)(built(world, 3), 0)
    found = [point["prompts"][name]["choice"] for name in ("plain", "neutral")]
    assert point["restricted"]["choice"] == max(found)
    assert list(Probe(world, ("neutral",))(built(world), 0)["prompts"]) == ["neutral"]
    assert Probe(world).chance == 1 / WORLD.values


@pytest.mark.parametrize(
    "values",
    [
        {"attacks": [{"name": "a"}, {"name": "a"}]},
        {"attacks": [{"name": "a"}], "edits": [{"name": "a", "kind": "noise", "amount": 1}]},
        {"attacks": [{"name": "untouched"}]},
        {"attacks": [{"name": "a", "lrs": [0.1, 0.1]}]},
        {"attacks": [{"name": "a", "lrs": [0.0]}]},
        {"attacks": [{"name": "a", "data": "mixed", "benign": 0.01}]},
        {"attacks": [{"name": "a", "data": "switch", "benign": 0.01, "steps": 10}]},
        {"edits": [{"name": "a", "kind": "quantise", "amount": 1}]},
        {"edits": [{"name": "a", "kind": "quantise", "amount": 4.5}]},
        {"edits": [{"name": "a", "kind": "merge", "amount": 1.5}]},
        {"seeds": []},
        {"seeds": [1, 1]},
        {"probes": [0]},
    ],
)
def test_options_that_say_nothing_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RedteamOptions.model_validate(values)

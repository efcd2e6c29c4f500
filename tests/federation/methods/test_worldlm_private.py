"""WorldLM with private nodes: noise, limits, and what is spent."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from hansa.errors import InputError
from hansa.federation.message import Message
from hansa.federation.methods import DiLoCo, FedAvg, FedPer, Method, WorldLM
from hansa.federation.methods.base import Work
from hansa.federation.node import Setup
from hansa.federation.privacy import Privacy, PrivateTask, epsilon
from hansa.federation.rules import Rules
from hansa.federation.spending import PRIVATE_STEPS
from hansa.federation.tree import ROOT, Tree
from worldlm_tree import (
    CONTEXT,
    EVERY,
    KEYS,
    LEAVES,
    TRAIN,
    TREE,
    Tiny,
    federation,
    figures,
    ran,
    texts,
    tiny,
)


class Wide(Tiny):
    """A tiny model with a key block of 40 000 numbers, which the loss does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[1].wide = nn.Parameter(torch.zeros(200, 200))


def test_what_leaves_a_private_node_is_noised_by_sigma_times_the_norm(
    crossed: list[Message],
) -> None:
    """Measured on the backbone and on key blocks that cross the edge."""
    privacy = Privacy(unit="update", clip=0.5, noise=0.4)
    torch.manual_seed(0)
    start = Wide()
    before = {name: p.detach().clone() for name, p in start.named_parameters()}
    made = federation(
        WorldLM(),
        ("a1",),
        model=start,
        tree=Tree.flat(["a1"]),
        training={"lr": 1e-9},
        rules={"a1": Rules(privacy=privacy)},
    )
    made.run(1)
    (reply,) = [message for message in crossed if "weight" in message.scalars]
    assert reply.metrics == {}
    sent = {**reply.group("model"), **reply.group("keys")}
    noise = torch.cat([(sent[n] - p).flatten() for n, p in before.items()])
    assert sent.keys() == before.keys()
    assert float(noise.std()) == pytest.approx(0.2, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.004)
    # It keeps what it sent, and nothing without noise.
    held = made.state_of("a1").group("model")
    assert all(held[name].equal(sent[name]) for name in sent)


def test_an_update_is_cut_down_to_the_norm() -> None:
    privacy = Privacy(unit="update", clip=0.01, noise=0.0)
    made = federation(
        WorldLM(), tree=Tree.flat(LEAVES), names=LEAVES, rules={"a1": Rules(privacy=privacy)}
    )
    made.run(1)
    before = tiny().state_dict()

    def moved(name: str) -> float:
        held = made.state_of(name).group("model")
        return float(torch.cat([(held[n] - before[n]).flatten() for n in before]).norm())

    assert moved("a2") > 0.05
    assert moved("a1") == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("names", [LEAVES, EVERY], ids=["leaves", "every"])
def test_without_noise_and_limit_updates_are_as_without_privacy(names: tuple[str, ...]) -> None:
    privacy = Privacy(unit="update", clip=math.inf, noise=0.0)
    models, _, _ = ran(WorldLM(), names, rules={ROOT: Rules(privacy=privacy)})
    plain, _, _ = ran(WorldLM(), names)
    assert models == plain


def test_without_noise_and_limit_gradients_are_as_without_privacy() -> None:
    """Where a batch holds all samples, so that all are drawn."""
    privacy = Privacy(unit="gradient", clip=math.inf, noise=0.0)
    options: Any = {"training": {"batch_size": TRAIN}}
    private, plain = (
        federation(WorldLM(), rules=rules, **options)
        for rules in ({ROOT: Rules(privacy=privacy)}, {})
    )
    private.run(2)
    plain.run(2)
    for name in EVERY:
        for key, tensor in private.model_of(name).state_dict().items():
            torch.testing.assert_close(
                tensor, plain.model_of(name).state_dict()[key], rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("name", ["a1", "A", ROOT])
def test_private_gradients_come_from_a_private_task_and_batches_by_chance(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    privacy = Privacy(unit="gradient", clip=1.0, noise=0.5)
    made = federation(WorldLM(), rules={name: Rules(privacy=privacy)})
    seen: dict[str, list[int]] = {}
    real = WorldLM.step

    def step(self: WorldLM, setup: Setup, work: Work, batch: Any, phase: str) -> Work:
        kind = "private" if isinstance(setup.task, PrivateTask) else "plain"
        seen.setdefault(kind, []).append(len(batch[0]))
        return real(self, setup, work, batch, phase)

    monkeypatch.setattr(WorldLM, "step", step)
    made.run(4)
    below = sum(name in path.split("/") for path in TREE.walk())
    assert len(seen["private"]) == 4 * 3 * below  # as many steps as ever
    assert len(seen.get("plain", [])) == 4 * 3 * (7 - below)
    assert set(seen.get("plain", [1])) <= {1, 3}
    assert len(set(seen["private"])) > 2
    mean = sum(seen["private"]) / len(seen["private"])
    assert mean == pytest.approx(3, abs=4 * math.sqrt(3 * 4 / 7 / len(seen["private"])))


@pytest.mark.parametrize("unit", ["gradient", "update"])
@pytest.mark.parametrize("method", [WorldLM(), FedAvg()], ids=lambda m: m.name)
@pytest.mark.parametrize("name", ["a1", "A", ROOT])
def test_the_privacy_spent_is_told_with_the_scores(unit: Any, method: Method, name: str) -> None:
    privacy = Privacy(unit=unit, clip=1.0, noise=1.0)
    history = federation(method, rules={name: Rules(privacy=privacy)}).run(2)
    found = history.scored("state", "epsilon")
    below = [n for n in EVERY if name in TREE.path_of(n).split("/")]
    for number in (1, 2):
        steps = number * (3 if unit == "gradient" else 1)
        wanted = epsilon(privacy, TRAIN, 3, steps)
        assert found[number] == pytest.approx(dict.fromkeys(below, wanted))


@pytest.mark.parametrize("unit", ["gradient", "update"])
@pytest.mark.parametrize("method", [WorldLM(), DiLoCo()], ids=lambda m: m.name)
@pytest.mark.parametrize("name", ["a1", "B", ROOT])
def test_a_node_whose_budget_is_spent_adds_nothing_and_the_run_goes_on(
    unit: Any, method: Method, name: str
) -> None:
    """Two rounds are affordable, a third is not."""
    steps = 2 * (3 if unit == "gradient" else 1)
    limit = epsilon(Privacy(unit=unit, noise=1.0), TRAIN, 3, steps) + 1e-6
    rule = Rules(privacy=Privacy(unit=unit, noise=1.0, epsilon=limit))
    names = (ROOT, "B", *LEAVES)
    # Only this node: what stands below it has no noise, and so no budget.
    free = Rules(privacy=Privacy(unit="update", clip=math.inf, noise=0.0))
    rules = {name: rule, **({n: free for n in EVERY if n != name} if name != "a1" else {})}
    made = federation(method, names, rules=rules)
    history = made.run(4)
    for row in history.table("ledger").to_pylist():
        # A federation has answered whether or not it trained itself.
        spent = row["node"] == TREE.path_of(name) and row["round"] > 2 and name != "B"
        assert row["fate"] == ("spent" if spent else "ok")
        assert (row["up"] == 0) is (spent or row["node"] == ROOT)
    beside = method.inner_training() == "beside"
    trained = [n for n in names if n != name and (beside or n in LEAVES)]
    assert made.state_of(ROOT).scalars["weight"] == TRAIN * len(trained)
    done = int(made.state_of(name).scalars[PRIVATE_STEPS])
    assert done == steps
    last = history.scored("state", "epsilon")
    assert last[4][name] == last[2][name] <= limit
    assert set(history.scored("test", "loss")[4]) == set(names)


def test_no_budget_for_the_first_round_is_no_part_at_all() -> None:
    rule = Rules(privacy=Privacy(unit="update", noise=0.1, epsilon=0.1))
    for name in ("a1", "A", ROOT):
        made = federation(WorldLM(), rules={name: rule})
        history = made.run(2)
        assert history.scored("state", "epsilon")[2][name] == 0
        assert PRIVATE_STEPS not in made.state_of(name).scalars


@pytest.mark.parametrize("unit", ["gradient", "update"])
def test_nothing_of_a_private_training_is_told(unit: Any, crossed: list[Message]) -> None:
    """Neither in the ledger nor in a message, at a leaf and at an inner node."""
    rule = Rules(privacy=Privacy(unit=unit, noise=0.5))
    for method in (WorldLM(), WorldLM(schedule="parallel"), FedAvg()):
        crossed.clear()
        history = federation(method, rules={"A": rule}).run(2)
        private = {TREE.path_of(n) for n in ("A", "a1", "a2")}
        for row in history.table("ledger").to_pylist():
            told = (row["loss_sum"], row["accuracy_sum"], row["count"])
            assert (told == (0, 0, 0)) is (row["node"] in private)
        # Replies: of the leaves below A and of A itself nothing, else the metrics of those below.
        replies = [m for m in crossed if "weight" in m.scalars]
        silent = [m for m in replies if not m.metrics]
        assert len(replies) == 2 * 6
        assert len(silent) == 2 * 3


def test_a_noised_leaf_gets_less_attention_than_its_clean_siblings() -> None:
    tree = Tree.flat(["a1", "a2", "b1"])
    rule = Rules(privacy=Privacy(unit="update", clip=1.0, noise=0.5))
    history = federation(
        WorldLM(temperature=1.0), ("a1", "a2", "b1"), tree=tree, rules={"a2": rule}
    ).run(3)
    weights = figures(history, "attention_up")
    for number in (1, 2, 3):
        noised = weights[number, ROOT, "root/a2"]
        assert noised < 0.8 * min(weights[number, ROOT, f"root/{n}"] for n in ("a1", "b1"))


def test_a_residual_of_a_private_leaf_holds_its_noise() -> None:
    from hansa.federation.methods.residuals import unpack

    rule = Rules(privacy=Privacy(unit="update", clip=1.0, noise=2.0))
    method = WorldLM(temperature=0.01)
    made = federation(method, LEAVES, rules={"a1": rule})
    made.run(1)
    found = unpack(made.state_of(ROOT), method.blocks(made.setup), made.setup.task.params)
    assert [r.origin for r in found] == ["root/A/a1"]
    held = made.state_of("a1").group("model")
    assert all(found[0].tensors[name].equal(held[name]) for name in KEYS)
    noise = found[0].tensors["layers.1.bias"] - tiny().state_dict()["layers.1.bias"]
    assert float(noise.norm()) > 1


def test_a_private_model_with_running_statistics_is_refused() -> None:
    """They would leave without noise."""
    model = nn.Sequential(tiny(), nn.BatchNorm1d(CONTEXT))
    for unit in ("update", "gradient"):
        rule = Rules(privacy=Privacy(unit=unit))  # type: ignore[arg-type]
        with pytest.raises(InputError, match="privacy: "):
            federation(WorldLM(keys=0), LEAVES, model=model, rules={"a1": rule})


def test_noise_is_of_the_node_and_the_round() -> None:
    """Two private siblings with the same data and a rate of nought: different noise each time."""
    data = texts(["a1"])
    rule = Rules(privacy=Privacy(unit="update", noise=1.0))
    tree = Tree.flat(["a1", "a2"])
    made = federation(
        FedPer(personal=("*",)),
        data={"a1": data["a1"], "a2": data["a1"]},
        tree=tree,
        training={"lr": 1e-30},
        rules={"a1": rule, "a2": rule},
    )
    seen = []
    for number in (1, 2):
        for _ in made.rounds(number, number):
            seen += [made.state_of(name).group("model")["head.bias"] for name in ("a1", "a2")]
    noise = [seen[0], seen[1], seen[2] - seen[0], seen[3] - seen[1]]
    for first, second in itertools.combinations(noise, 2):
        assert not torch.allclose(first, second, atol=0.1)

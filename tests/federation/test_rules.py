"""What holds at one node: taken over from above, kept apart from siblings, refused in time."""

from typing import Any

import pytest
import torch

from hansa import Federation, Training
from hansa.errors import InputError
from hansa.federation.engines.plan import EngineOptions
from hansa.federation.methods import METHODS, FedAvg
from hansa.federation.node import Setup
from hansa.federation.participation import Participation
from hansa.federation.privacy import Privacy, PrivateTask
from hansa.federation.rules import Rules, inherited
from hansa.federation.tree import ROOT, Tree
from hansa.models.task import Task
from support import clients, made, net

TREE = Tree({"A": ROOT, "B": ROOT, "X": "A", "x": "X", "a": "A", "b": "B"})
NOISY = Privacy(noise=0.5)


def federation(rules: dict[str, Rules], method: Any = None, **options: Any) -> Federation:
    return Federation(
        net(),
        dict(zip(("a", "b", "x"), clients(3).values(), strict=True)),
        method or FedAvg(),
        Training(lr=0.1, batch_size=3),
        tree=TREE,
        rules=rules,
        engine=EngineOptions(kind="sequential", workers=1),
        **options,
    )


def test_rules_replace_what_holds_everywhere() -> None:
    training = Training(lr=0.1, steps=4, batch_size=3)
    assert Rules().applied(training) == training
    assert Rules(lr=0.2).applied(training) == Training(lr=0.2, steps=4, batch_size=3)
    assert Rules(steps=2).applied(training) == Training(lr=0.1, steps=2, batch_size=3)


def test_a_node_takes_over_what_it_does_not_set_from_above() -> None:
    own = {
        ROOT: Rules(lr=0.3, participation=Participation(fraction=0.5)),
        "A": Rules(steps=7, privacy=NOISY),
        "X": Rules(lr=0.01),
        "b": Rules(privacy=Privacy(noise=2.0)),
    }
    found = inherited(TREE, own)
    assert found == {
        "root": own[ROOT],
        "root/A": Rules(lr=0.3, steps=7, privacy=NOISY),
        "root/A/X": Rules(lr=0.01, steps=7, privacy=NOISY),
        "root/A/X/x": Rules(lr=0.01, steps=7, privacy=NOISY),
        "root/A/a": Rules(lr=0.3, steps=7, privacy=NOISY),
        "root/B": Rules(lr=0.3),
        "root/B/b": Rules(lr=0.3, privacy=Privacy(noise=2.0)),
    }


def test_nodes_without_rules_are_left_out() -> None:
    assert inherited(TREE, {}) == {}
    assert inherited(TREE, {name: Rules() for name in ("A", "b")}) == {}
    assert set(inherited(TREE, {"b": Rules(lr=1.0)})) == {"root/B/b"}


def test_rules_of_nobody_and_newcomers_at_one_node_are_refused() -> None:
    with pytest.raises(InputError, match=r"nodes\.c: found no such node; allowed: .*A, B.*root"):
        inherited(TREE, {"c": Rules()})
    joining = Rules(participation=Participation(newcomers=1))
    with pytest.raises(InputError, match=r"nodes\.A\.participation\.newcomers: found 1"):
        federation({"A": joining})


@pytest.mark.parametrize(
    "values",
    [{"steps": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"epochs": 2}, {"privacy": {"noise": -1.0}}],
    ids=str,
)
def test_values_outside_their_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Rules.model_validate(values)


def test_the_setup_of_a_node_is_its_own() -> None:
    rules = inherited(TREE, {"A": Rules(lr=0.5, privacy=NOISY), "b": Rules(steps=2)})
    setup = Setup(Task(net()), Training(lr=0.1, batch_size=3), rules=rules)
    assert setup.at(ROOT) is setup
    private = setup.at("root/A/a")
    assert (private.training.lr, private.privacy) == (0.5, NOISY)
    assert isinstance(private.task, PrivateTask)
    plain = setup.at("root/B/b")
    assert (plain.training.steps, plain.privacy) == (2, None)
    assert plain.task is setup.task
    # A whole update is noised as it leaves: its gradients are plain ones.
    update = inherited(TREE, {"A": Rules(privacy=Privacy(unit="update"))})
    assert type(Setup(Task(net()), Training(), rules=update).at("root/A").task) is Task


def test_steps_and_rates_are_those_of_the_node() -> None:
    """Samples that a node trained on tell its steps; a rate of next to nothing moves nothing."""
    rules = {"a": Rules(steps=5), "b": Rules(lr=1e-30)}
    run = federation(rules)
    history = run.run(1)
    counts = {
        row["node"]: row["count"] for row in history.table("ledger").to_pylist() if row["count"]
    }
    assert counts == {"root/A/a": 15, "root/B/b": 7, "root/A/X/x": 7}
    start, after = net().state_dict(), run.state_of("B").group("model")
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, start[name], rtol=0, atol=1e-12)


def test_time_is_simulated_by_the_steps_of_the_node() -> None:
    rules = {"a": Rules(steps=9), ROOT: Rules(participation=Participation(step_seconds=2.0))}
    history = federation(rules, participation=Participation(step_seconds=1.0)).run(1)
    seconds = {r["node"]: r["simulated_seconds"] for r in history.table("ledger").to_pylist()}
    assert seconds["root/A/a"] == 9
    assert seconds["root/B/b"] == 3


def test_a_parents_own_way_of_asking_is_not_handed_down() -> None:
    half = Rules(participation=Participation(failure_rate=0.9999))
    history = federation({"A": half}).run(2)
    fates = {
        (row["round"], row["node"]): row["fate"] for row in history.table("ledger").to_pylist()
    }
    assert fates[1, "root/A"] == fates[1, "root/B/b"] == "ok"
    assert fates[1, "root/A/a"] == fates[1, "root/A/X"] == "failed"
    assert (1, "root/A/X/x") not in fates


INNER = [name for name in METHODS if made(name).inner_training() is not None]


@pytest.mark.parametrize("name", [n for n in METHODS if n not in INNER and n != "centralised"])
def test_methods_without_inner_training_refuse_inner_data(name: str) -> None:
    data = clients(2)
    tree = Tree({"c0": ROOT, "c1": "c0"})
    with pytest.raises(InputError, match=rf"nodes\.c0: found data of an inner node.*'{name}'"):
        Federation(net(), data, made(name), tree=tree)


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("inner", ["A", ROOT])
def test_methods_with_inner_training_run_with_inner_data(name: str, inner: str) -> None:
    """Every one of them in its defaults, for more rounds than one, and private too."""
    names = ("a", "b", inner)
    tree = Tree({"A": ROOT, "a": "A", "b": "A"})
    data = dict(zip(names, clients(3).values(), strict=True))
    private = {inner: Rules(privacy=Privacy(unit="update", noise=0.1))}
    for rules in ({}, {} if name in ("fedavg-tuned", "fedprox") else private):
        run = Federation(
            net(),
            data,
            made(name),
            Training(lr=0.1, batch_size=3),
            tree=tree,
            rules=rules,
            engine=EngineOptions(kind="sequential", workers=1),
        )
        history = run.run(3)
        assert set(history.scored("test", "loss")[3]) == set(names)
        assert all(p.isfinite().all() for p in run.model_of(inner).parameters())


@pytest.mark.parametrize("name", ["fedprox", "fedavg-tuned", "ditto", "fedselect", "fedrep"])
def test_methods_whose_looks_at_the_data_are_not_counted_refuse_private_nodes(name: str) -> None:
    with pytest.raises(InputError, match=r"nodes\.x\.privacy: found method"):
        federation({"A": Rules(lr=0.1), "x": Rules(privacy=NOISY)}, made(name))


def test_a_stack_is_for_nodes_that_train_alike_however_they_ask() -> None:
    asking = federation({ROOT: Rules(participation=Participation(fraction=0.5))})
    assert not asking.setup.uneven
    assert federation({"a": Rules(lr=0.2)}).setup.uneven


def test_a_node_that_only_passes_on_is_never_late() -> None:
    tree = Tree({"p": ROOT, "c0": "p", "c1": "p", "c2": ROOT})
    slow = Participation(deadline=0.6, step_seconds=0.1)
    made = Federation(net(), clients(), FedAvg(), Training(steps=5), tree=tree, participation=slow)
    (result,) = made.rounds(1)
    seconds = {visit.path: (visit.fate, visit.seconds) for visit in result.visits}
    assert seconds["root/p"] == ("ok", 0.0)
    assert seconds["root/p/c0"] == ("ok", 0.5)


def test_newcomers_and_a_root_with_rules_are_refused_together() -> None:
    rules = {ROOT: Rules(participation=Participation())}
    with pytest.raises(InputError, match=r"participation\.newcomers: found a root with rules"):
        federation(rules, participation=Participation(newcomers=1))


def test_rules_that_are_none_are_named() -> None:
    with pytest.raises(InputError, match="rules of c0"):
        federation({"c0": {"steps": 3}})  # type: ignore[dict-item]

"""WorldLM in whole runs: nodes that fail, bytes, scores, engines."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from hansa.errors import InputError
from hansa.federation.engines.plan import EngineOptions
from hansa.federation.federation import Federation
from hansa.federation.leaf import Leaf
from hansa.federation.message import Message, State
from hansa.federation.methods import FedAvg, HierFAVG, Method, WorldLM
from hansa.federation.methods.base import Work
from hansa.federation.node import Child, Node
from hansa.federation.optimizer import Training
from hansa.federation.participation import Participation
from hansa.federation.privacy import Privacy
from hansa.federation.rules import Rules
from hansa.federation.spending import PRIVATE_STEPS
from hansa.federation.tree import ROOT
from hansa.federation.wire import encode
from support import CLASSES, FEATURES, clients
from worldlm_tree import EVERY, KEYS, LEAVES, TRAIN, TREE, Watched, federation, texts, tiny


@pytest.mark.parametrize("name", ["a1", "B", ROOT])
@pytest.mark.parametrize(
    "method",
    [WorldLM(), WorldLM(schedule="parallel"), HierFAVG(), FedAvg()],
    ids=["levels", "parallel", "hierfavg", "fedavg"],
)
def test_a_node_whose_loss_is_no_number_is_dropped_and_named(name: str, method: Method) -> None:
    """It poisons nobody, at whatever level it stands."""
    fine = Rules(lr=0.5)
    rules = dict.fromkeys(EVERY, fine) | {name: Rules(lr=1e38)}
    made = federation(method, rules=rules, on_failure="drop", training={"clip_norm": None})
    history = made.run(2)
    for path in TREE.walk():
        for tensors in made.state_of(path.rpartition("/")[2]).groups.values():
            assert all(t.isfinite().all() for t in tensors.values())
    rows = [r for r in history.table("ledger").to_pylist() if r["error"]]
    assert {(r["node"], r["round"]) for r in rows} == {(TREE.path_of(name), k) for k in (1, 2)}
    assert all(f"at {name}" in r["error"] for r in rows)
    with pytest.raises(ArithmeticError, match=f"at {name}"):
        federation(method, rules=rules, training={"clip_norm": None}).run(1)


def test_an_inner_node_that_is_dropped_still_counts_what_it_spent() -> None:
    """Its private steps are not forgotten, whatever became of its training."""
    rule = Rules(privacy=Privacy(unit="update", noise=1.0, clip=1.0))
    made = federation(WorldLM(), rules={"A": rule}, on_failure="drop")
    for _ in made.rounds(1):
        pass
    before = int(made.state_of("A").scalars[PRIVATE_STEPS])
    broken = made.setup.rules["root/A"].model_copy(update={"lr": 1e38})
    object.__setattr__(made.setup, "rules", {**made.setup.rules, "root/A": broken})
    for _ in made.rounds(2, 2):
        pass
    assert int(made.state_of("A").scalars[PRIVATE_STEPS]) >= before == 1


@pytest.mark.parametrize("name", ["worldlm", "hierfavg", "fedavg"])
def test_federations_of_which_nobody_answers_change_nothing(name: str) -> None:
    methods: Mapping[str, Method] = {
        "worldlm": WorldLM(),
        "hierfavg": HierFAVG(),
        "fedavg": FedAvg(),
    }
    made = federation(methods[name], LEAVES, participation=Participation(failure_rate=0.9999))
    before = tiny().state_dict()
    made.run(2)
    after = made.model_of(ROOT).state_dict()
    assert all(after[key].equal(before[key]) for key in before)


# Accounting.


@pytest.mark.parametrize("most", [1, 2])
def test_the_ledger_counts_the_bytes_of_each_edge(most: int, crossed: list[Message]) -> None:
    """And residuals are at most so many key blocks on it."""
    method = WorldLM(threshold=0.99999, most=most)
    seen: dict[tuple[int, str, str], Message] = {}

    class Noted(WorldLM):
        def dispatch(
            self, node: Node, state: State, children: Iterable[Child]
        ) -> Iterator[tuple[str, Message]]:
            for path, down in super().dispatch(node, state, children):
                seen.setdefault((node.round, path, "down"), down)
                yield path, down

        def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
            after, reply = super().end(node, state, work)
            seen[node.round, node.path, "up"] = reply
            return after, reply

        def reply(self, node: Node, state: State) -> Message:
            found = super().reply(node, state)
            seen[node.round, node.path, "up"] = found
            return found

    made = federation(Noted(**method.model_dump(exclude={"server"})))
    history = made.run(5)
    ledger = [r for r in history.table("ledger").to_pylist() if r["node"] != ROOT]
    assert len(ledger) == 5 * 6
    block = sum(tiny().state_dict()[name].nbytes for name in KEYS)
    plain = {"model", "keys", "buffers"}
    most_seen = 0
    for row in ledger:
        for way in ("down", "up"):
            message = seen[row["round"], row["node"], way]
            assert row[way] == len(encode(message))
            residuals = [g for g in message.groups if g not in plain]
            held = sum(t.nbytes for g in residuals for t in message.groups[g].values())
            assert held <= most * block
            most_seen = max(most_seen, len(residuals))
    assert most_seen == most


# What is scored, and what scoring leaves alone.


def close(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    keys = found.keys() == wanted.keys()
    return keys and all(found[key] == pytest.approx(wanted[key]) for key in wanted)


def test_both_scores_are_of_the_models_that_they_say() -> None:
    """After the aggregation: the root's newest backbone, own key blocks. Then: as trained."""
    made = federation(WorldLM())
    for number in (1, 2):
        for result in made.rounds(number, number):
            root = made.state_of(ROOT).group("model")
            for name in EVERY:
                own = made.state_of(name).group("model")
                params = {n: own[n] if n in KEYS else p for n, p in root.items()}
                test = texts(EVERY)[name].batch("test")
                wanted = made.setup.task.evaluate(params, {}, test)
                path = TREE.path_of(name)
                assert close(result.scores[path]["test"], wanted)
                held = made.model_of(name).state_dict()
                assert all(held[n].equal(params[n]) for n in params)
                if name in LEAVES:
                    trained = made.setup.task.evaluate(own, {}, test)
                    assert close(result.scores[path]["test:trained"], trained)
                    assert not close(trained, wanted)
                assert {"test", "validation", "test:trained"} <= result.scores[path].keys()


def test_an_inner_node_is_scored_after_its_own_local_steps(watched: type[Watched]) -> None:
    made = federation(watched())
    for result in made.rounds(1):
        for name in (ROOT, "A", "B"):
            params = watched.ends[1, TREE.path_of(name)]
            wanted = made.setup.task.evaluate(params, {}, texts(EVERY)[name].batch("test"))
            assert close(result.scores[TREE.path_of(name)]["test:trained"], wanted)


class Classifier(nn.Module):
    """Two blocks over inputs of four numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(FEATURES, FEATURES) for _ in range(2)])
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.layers[1](self.layers[0](inputs).tanh()).tanh())
        return logits


def test_the_model_of_an_inner_node_is_the_scored_one_of_classifiers_as_well() -> None:
    torch.manual_seed(0)
    data = dict(zip(EVERY, clients(len(EVERY)).values(), strict=True))
    made = Federation(
        Classifier(), data, WorldLM(temperature=1.0), Training(lr=0.3, batch_size=3), tree=TREE
    )
    *_, result = made.rounds(2)
    for name in (ROOT, "A", "B"):
        model = made.model_of(name).state_dict()
        own, root = (made.state_of(n).group("model") for n in (name, ROOT))
        assert all(t.equal(own[n] if n in KEYS else root[n]) for n, t in model.items())
        wanted = made.setup.task.evaluate(model, {}, data[name].batch("test"))
        assert close(result.scores[TREE.path_of(name)]["test"], wanted)


@pytest.mark.parametrize("schedule", ["levels", "parallel"])
def test_scoring_changes_nothing(schedule: Any) -> None:
    method = WorldLM(threshold=0.9999, schedule=schedule)
    rules = {"a1": Rules(privacy=Privacy(unit="gradient", noise=0.1)), "B": Rules(steps=2)}
    often, never = federation(method, rules=rules), federation(method, rules=rules)
    first = list(often.rounds(4, score_every=1))
    second = list(never.rounds(4, score_every=0))
    for one, other in zip(first, second, strict=True):
        assert one.figures == other.figures
        visits = [
            [replace(v, metrics={n: m for n, m in v.metrics.items() if "/" not in n}) for v in vs]
            for vs in (one.visits, other.visits)
        ]
        assert visits[0] == visits[1]
    for name in EVERY:
        assert encode(often.state_of(name)) == encode(never.state_of(name))


# However it is computed.


def test_worker_processes_change_nothing() -> None:
    """With rules of nodes, private ones, and data at inner nodes."""
    rules = {
        "a1": Rules(privacy=Privacy(unit="gradient", noise=0.1), lr=0.1),
        "b2": Rules(privacy=Privacy(unit="update", noise=0.1)),
        "B": Rules(participation=Participation(fraction=0.5), steps=2),
    }
    options: Any = {"rules": rules, "participation": Participation(failure_rate=0.1)}
    method = WorldLM(threshold=0.9999)
    one = federation(method, **options)
    two = federation(method, engine=EngineOptions(kind="sequential", workers=2), **options)
    expected, found = one.run(3), two.run(3)
    for table in ("ledger", "scores", "figures", "pairs"):
        assert found.table(table).equals(expected.table(table)), table
    for name in EVERY:
        assert encode(two.state_of(name)) == encode(one.state_of(name))


@pytest.mark.parametrize(
    "training", [{}, {"steps": 2}, {"optimizer": "adamw", "lr": 0.01}], ids=str
)
def test_stacks_round_a_little_otherwise(training: dict[str, Any]) -> None:
    method = WorldLM(residuals=False, temperature=1.0)
    one = federation(method, training=training)
    many = federation(
        method, training=training, engine=EngineOptions(kind="stacked", stack=2, workers=1)
    )
    expected, found = one.run(2), many.run(2)
    assert "stack" in found.table("rounds")["engine"].to_pylist()[-1]
    assert "one by one" not in found.table("rounds")["engine"].to_pylist()[-1]
    for name in EVERY:
        theirs = one.model_of(name).state_dict()
        for key, tensor in many.model_of(name).state_dict().items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-5)
    rows = [h.table("scores").to_pylist() for h in (expected, found)]
    for first, second in zip(*rows, strict=True):
        assert first["node"] == second["node"]
        assert first["sum"] == pytest.approx(second["sum"], rel=1e-4, abs=1e-4)


def test_children_are_asked_as_their_own_parent_says() -> None:
    rules = {
        "A": Rules(participation=Participation(fraction=0.5)),
        ROOT: Rules(participation=Participation()),
    }
    history = federation(WorldLM(), rules=rules, participation=Participation(failure_rate=0.0)).run(
        6
    )
    asked: dict[str, int] = {}
    for row in history.table("ledger").to_pylist():
        asked[row["node"]] = asked.get(row["node"], 0) + 1
    assert asked["root/A/a1"] + asked["root/A/a2"] == 6
    assert asked["root/B/b1"] == asked["root/B/b2"] == asked["root/A"] == 6


# Options that do not fit.


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"keys": 3}, "method.keys: found 3; allowed: 0 to 2 blocks"),
        ({"keys": ("layers.7",)}, r"method.keys: found 'layers.7'; allowed: layers.0, layers.1"),
        ({"keys": -1}, "method.keys: found -1"),
    ],
)
def test_key_blocks_that_the_model_does_not_have_are_refused(
    options: dict[str, Any], found: str
) -> None:
    with pytest.raises(InputError, match=found):
        federation(WorldLM(**options))


def test_key_blocks_can_be_named_and_all_of_them() -> None:
    for chosen in (("layers.0",), ("layers.1", "layers.0"), 2):
        made = federation(WorldLM(keys=chosen))
        found = made.setup, WorldLM(keys=chosen).blocks(made.setup)
        wanted = ["layers.0"] if chosen == ("layers.0",) else ["layers.0", "layers.1"]
        assert list(found[1]) == wanted
        made.run(2)


def test_residuals_need_key_blocks_that_are_shared() -> None:
    with pytest.raises(ValueError, match="residuals need share_keys"):
        WorldLM(share_keys=False, residuals=True)
    kept = WorldLM(share_keys=False)
    assert not kept.residuals
    assert WorldLM.model_validate(kept.model_dump()) == kept


# Local training goes on where it stopped.


def test_steps_go_on_through_the_data_from_round_to_round() -> None:
    """In so many steps that every sample was seen as often as any other, whatever the rounds."""
    setup = federation(WorldLM(), training={"steps": 2, "epochs": 2}).setup
    leaf, seen = Leaf(WorldLM(), setup, 5), []
    for number in (1, 2, 3, 4, 5, 6, 7):
        node = Node("root/A/a1", number, TRAIN, setup)
        for epoch in (0, 1):
            batches = leaf.batches(node, "train", epoch)
            assert [len(batch) for batch in batches] == [3, 3]
            seen += torch.cat(list(batches)).tolist()
    assert len(seen) == 12 * TRAIN
    for start in range(0, len(seen), TRAIN):
        assert sorted(seen[start : start + TRAIN]) == list(range(TRAIN))
    assert seen[:TRAIN] != seen[TRAIN : 2 * TRAIN]

"""WorldLM: its reading of the paper, by hand and against methods that are known."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from hansa.data.clients import Client
from hansa.errors import InputError
from hansa.federation.engines import engine as engines
from hansa.federation.engines import local
from hansa.federation.engines.local import LocalEngine
from hansa.federation.engines.plan import EngineOptions
from hansa.federation.federation import Federation
from hansa.federation.history import History
from hansa.federation.leaf import Leaf
from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods import DiLoCo, FedAvg, FedPer, HierFAVG, Method, WorldLM
from hansa.federation.methods.base import Work
from hansa.federation.node import Child, Node, Setup
from hansa.federation.optimizer import Training
from hansa.federation.participation import Participation
from hansa.federation.privacy import Privacy, PrivateTask, epsilon
from hansa.federation.rules import Rules
from hansa.federation.server import ServerOptimizer
from hansa.federation.spending import PRIVATE_STEPS
from hansa.federation.tree import ROOT, Tree
from hansa.federation.wire import encode, encoded_size
from hansa.models.objective import NextToken, Objective
from hansa.models.task import Task
from support import CLASSES, FEATURES, Row, clients, in_turn

VOCABULARY, CONTEXT, TRAIN = 256, 5, 7
TREE = Tree({"A": ROOT, "B": ROOT, "a1": "A", "a2": "A", "b1": "B", "b2": "B"})
LEAVES = ("a1", "a2", "b1", "b2")
EVERY = (ROOT, "A", "B", *LEAVES)
KEYS = {"layers.1.weight", "layers.1.bias"}
CANARY = "the canary sings at dawn, and nobody hears it"


class Tiny(nn.Module):
    """A language model with two blocks and nothing that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(inputs)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        logits: torch.Tensor = self.head(hidden)
        return logits


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def client(tokens: torch.Tensor) -> Client:
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    cut = slice(0, TRAIN), slice(TRAIN, TRAIN + 2), slice(TRAIN + 2, None)
    train, validation, test = ((inputs[part], labels[part]) for part in cut)
    return Client.of(train, test=test, validation=validation)


def texts(names: Iterable[str]) -> dict[str, Client]:
    """Every node has a few letters of its own, and two letters that it likes."""
    found = {}
    for name in names:
        rng = torch.Generator().manual_seed(sum(name.encode()))
        letters = torch.randint(0, 26, (TRAIN + 5, CONTEXT + 1), generator=rng)
        found[name] = client(letters % (3 + len(name) + ord(name[-1]) % 7) + 97)
    return found


def federation(method: Method, names: Iterable[str] = EVERY, **options: Any) -> Federation:
    training = {"lr": 0.5, "batch_size": 3, **options.pop("training", {})}
    return Federation(
        options.pop("model", None) or tiny(),
        options.pop("data", None) or texts(names),
        method,
        Training(**training),
        tree=options.pop("tree", TREE),
        seed=5,
        engine=options.pop("engine", EngineOptions(kind="sequential", workers=1)),
        objective=NextToken(),
        **options,
    )


def left(made: Federation) -> dict[str, bytes]:
    """The models that the nodes have."""
    names = [path.rpartition("/")[2] for path in made.tree.walk()]
    return {name: encode(State({"m": made.model_of(name).state_dict()})) for name in names}


def ran(method: Method, names: Iterable[str] = EVERY, rounds: int = 3, **options: Any) -> Any:
    """The models and the ledger of a run, and what it measured."""
    made = federation(method, names, **options)
    history = made.run(rounds)
    return left(made), history.table("ledger").to_pylist(), history


def figures(history: History, name: str) -> dict[tuple[int, str, str], float]:
    rows = history.table("figures").to_pylist()
    return {(r["round"], r["node"], r["other"]): r["value"] for r in rows if r["name"] == name}


def paths(node: str) -> Iterator[str]:
    """A node's path and those above it."""
    while node:
        yield node
        node = node.rpartition("/")[0]


# 1. The arithmetic of a tree.

TARGETS = {"a1": 0, "a2": 4, "b1": 8, "b2": 12}


class Halfway(Objective):
    """Half the square of the distance to the target: a step at a rate of 0.5 goes halfway."""

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the mean over samples."""
        loss = 0.5 * (logits[:, 0] - labels).square().mean()
        one = torch.ones_like(loss, requires_grad=False)
        return loss, {"loss": loss.detach(), "accuracy": 0 * one, "count": one}


def halfway(method: Method) -> LocalEngine:
    setup = Setup(Task(Row(1), Halfway()), Training(lr=0.5, batch_size=1))
    data = {}
    for name, target in TARGETS.items():
        sample = torch.ones(1, 1), torch.tensor([target])
        data[TREE.path_of(name)] = Client.of(sample, test=sample)
    return LocalEngine(TREE, data, method, setup, seed=0)


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


def by_row(history: History) -> set[tuple[Any, ...]]:
    return {tuple(row.values()) for row in history.table("scores").to_pylist()}


# 2. Degenerate cases are methods that are known.


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


# 3. Attention on the tree; by hand it stands in test_attention.py.


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


# 5. What crosses an edge, and the backbone that is common.


class Watched(WorldLM):
    """WorldLM that notes what local training starts from and ends with, in order."""

    starts: ClassVar[list[tuple[int, str, Tensors]]] = []
    ends: ClassVar[dict[tuple[int, str], Tensors]] = {}

    def begin(self, node: Node, state: State) -> Work:
        """Take note."""
        work = super().begin(node, state)
        self.starts.append((node.round, node.path, work["params"]))
        return work

    def settle(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Take note."""
        self.ends[node.round, node.path] = work["params"]
        return super().settle(node, state, work)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    monkeypatch.setattr(Watched, "starts", [])
    monkeypatch.setattr(Watched, "ends", {})
    return Watched


@pytest.fixture
def crossed(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """Every message that the ledger counts."""
    found: list[Message] = []

    def spy(message: Message) -> int:
        found.append(message)
        return encoded_size(message)

    monkeypatch.setattr(engines, "encoded_size", spy)
    monkeypatch.setattr(local, "encoded_size", spy)
    return found


def backbone(params: Tensors) -> bytes:
    return encode(State({"b": {name: p for name, p in params.items() if name not in KEYS}}))


def keys(params: Tensors) -> bytes:
    return encode(State({"k": {name: p for name, p in params.items() if name in KEYS}}))


@pytest.mark.parametrize("names", [LEAVES, EVERY], ids=["leaves", "every"])
def test_siblings_start_from_one_backbone_and_key_blocks_of_their_own(
    watched: type[Watched], names: tuple[str, ...]
) -> None:
    federation(watched(temperature=0.01), names).run(3)
    for number in (1, 2, 3):
        start = {path: params for n, path, params in watched.starts if n == number}
        parts = {
            parent: {backbone(start[child]) for child in TREE.children(parent)}
            for parent in TREE.children(ROOT)
        }
        assert all(len(part) == 1 for part in parts.values())
        # With data between, federations start apart; without, all start alike.
        assert len(set().union(*parts.values())) == (1 if names == LEAVES else 2)
        if number > 1:
            own = {keys(start[path]) for path in TREE.leaves()}
            assert len(own) == len(LEAVES)


def test_messages_hold_model_key_blocks_and_residuals_and_nothing_else(
    crossed: list[Message],
) -> None:
    """No moments, of a node's optimizer or of a server's, nor what was noted."""
    server = ServerOptimizer(kind="nesterov", lr=0.7, momentum=0.9)
    made = federation(
        WorldLM(server=server, threshold=0.9999), training={"optimizer": "adamw", "lr": 0.01}
    )
    made.run(4)
    assert "server.momentum" in made.state_of("A").groups
    names = set(tiny().state_dict())
    groups = {group for message in crossed for group in message.groups}
    assert {"model", "keys", "residual.0"} <= groups
    assert all(g in ("model", "keys") or g.startswith("residual.") for g in groups)
    for message in crossed:
        assert message.group("model").keys() | message.group("keys").keys() == names
        scalars = {key.partition("|")[0].partition(".")[0] for key in message.scalars}
        assert scalars <= {"weight", "took", "residual"}
        assert message.metrics.keys() <= {"loss", "accuracy"}


def test_no_text_is_in_any_message(crossed: list[Message]) -> None:
    """Looked for as text and as token numbers of any width."""
    data = texts(EVERY)
    tokens = torch.tensor(list(CANARY.encode()))
    sung = tokens.repeat(9)[: (TRAIN + 5) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    data["a1"] = client(sung)
    federation(WorldLM(threshold=0.9999), data=data).run(3)
    sent = [encode(message) for message in crossed if message]
    assert len(sent) > 20
    part = tokens[:CONTEXT]
    wanted = [
        part.to(dtype).numpy().tobytes()
        for dtype in (torch.uint8, torch.int32, torch.int64, torch.float32)
    ]
    assert wanted[0] == CANARY[:CONTEXT].encode()
    held = encode(State({"x": {"inputs": data["a1"].inputs}}))
    assert wanted[2] in held  # it would be found
    assert not any(word in message for word in wanted for message in sent)


def test_key_blocks_that_stay_are_in_no_message(crossed: list[Message]) -> None:
    federation(WorldLM(share_keys=False)).run(2)
    assert all(not KEYS & tensors.keys() for m in crossed for tensors in m.groups.values())


# 6. Stages.


def test_levels_train_from_the_top_down_and_each_from_what_stands_above(
    watched: type[Watched],
) -> None:
    federation(watched()).run(2)
    for number in (1, 2):
        order = [path for n, path, _ in watched.starts if n == number]
        assert sorted(order) == sorted(TREE.walk())
        start = {path: params for n, path, params in watched.starts if n == number}
        for path in order:
            above = [up for up in paths(path) if up != path]
            assert all(order.index(up) < order.index(path) for up in above)
            if above:
                trained = watched.ends[number, above[0]]
                assert backbone(start[path]) == backbone(trained)


def test_parallel_nodes_all_train_from_what_they_received(watched: type[Watched]) -> None:
    made = federation(watched(schedule="parallel"))
    before = tiny().state_dict()
    for number in (1, 2):
        watched.starts.clear()
        for _ in made.rounds(number, number):
            pass
        start = {backbone(params) for _, _, params in watched.starts}
        assert start == {backbone(before)}
        before = made.state_of(ROOT).group("model")  # type: ignore[assignment]


def test_a_node_that_trains_beside_its_children_counts_as_one_of_them() -> None:
    """Backbones: the root's mean of a flat tree is over itself and its leaves, by samples."""
    tree, names = Tree.flat(LEAVES), (ROOT, *LEAVES)
    ours, theirs = (
        federation(method, names, tree=tree)
        for method in (WorldLM(schedule="parallel", residuals=False), FedAvg())
    )
    ours.run(1)
    theirs.run(1)
    first, second = ours.model_of(ROOT).state_dict(), theirs.model_of(ROOT).state_dict()
    assert all(first[n].equal(second[n]) for n in first if n not in KEYS)


# 7. Differential privacy.


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


# 9. What goes wrong.


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


# 10. Accounting.


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

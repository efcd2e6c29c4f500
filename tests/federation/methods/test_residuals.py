"""Residuals: which are cut, where they go, and that every one of them is accounted for."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from hansa.federation.engines.engine import RoundResult
from hansa.federation.engines.local import LocalEngine
from hansa.federation.message import Message, MessageError, State
from hansa.federation.methods import WorldLM
from hansa.federation.methods.base import Work
from hansa.federation.methods.residuals import (
    Residual,
    cut,
    delivered,
    pack,
    route,
    taken,
    unpack,
)
from hansa.federation.node import Node, Setup
from hansa.federation.optimizer import Training
from hansa.federation.participation import Participation
from hansa.federation.store import DiskStore, link_key
from hansa.federation.tree import Tree
from hansa.federation.wire import decode, encode
from hansa.models.task import Task
from hansa.seeding import generator
from support import CLASSES, FEATURES, clients, same

BLOCKS = {"layers.0": ["layers.0.w"]}
NAME = "layers.0.w"


def key(*values: float) -> dict[str, torch.Tensor]:
    return {NAME: torch.tensor(values, dtype=torch.float32)}


def residual(origin: str = "root/A/a", number: int = 1, **options: Any) -> Residual:
    return Residual(origin, number, "layers.0", key(0.1, 0.9), **options)


def held(found: Residual, keys: Any, blocks: Any) -> Any:
    return found.tensors


# Cutting.


def test_what_is_less_alike_than_the_threshold_is_cut_and_the_least_alike_first() -> None:
    bank = {"root/a": key(1, 0), "root/b": key(0, 1), "root/c": key(-1, 0.5), "root/d": key(3, 1)}

    def origins(threshold: float, most: int) -> list[str]:
        found = cut(7, bank, key(1, 0), BLOCKS, threshold, most, difference=False)
        assert all(r.round == 7 and r.hops == 0 and not r.upward for r in found)
        return [r.origin for r in found]

    assert origins(0.5, 9) == ["root/c", "root/b"]
    assert origins(0.5, 1) == ["root/c"]
    assert origins(-1, 9) == []
    assert origins(1, 9) == ["root/c", "root/b", "root/d"]


def test_the_block_travels_or_its_difference() -> None:
    bank = {"root/b": key(0, 1)}
    (block,) = cut(1, bank, key(1, 0.5), BLOCKS, 0.5, 1, difference=False)
    (change,) = cut(1, bank, key(1, 0.5), BLOCKS, 0.5, 1, difference=True)
    assert same(block.tensors, key(0, 1))
    assert same(change.tensors, key(-1, 0.5))


# Routing.


def test_each_goes_to_the_child_most_like_it_and_never_back() -> None:
    links = {"root/A": key(0.1, 0.9), "root/AB": key(0.2, 1), "root/C": key(1, 0.1)}
    assert set(route([residual()], links, BLOCKS, 1, held)) == {"root/AB"}  # no child of root/A
    assert set(route([residual("root/AB/a")], links, BLOCKS, 1, held)) == {"root/A"}
    assert route([residual()], {"root/A": key(1, 1)}, BLOCKS, 1, held) == {}
    assert route([residual()], {}, BLOCKS, 1, held) == {}


def test_a_child_is_sent_so_many_and_the_most_like_it_first() -> None:
    one, two = residual("root/A/a"), Residual("root/A/b", 1, "layers.0", key(0.5, 0.5))
    links = {"root/B": key(0, 1)}
    assert route([two, one], links, BLOCKS, 1, held) == {"root/B": [one]}
    assert route([two, one], links, BLOCKS, 2, held) == {"root/B": [one, two]}


# Packing.


def test_residuals_travel_as_bytes() -> None:
    sent = [residual("root/A/b", 12, hops=3), residual(upward=True)]
    message = pack(Message({"model": key(1, 1)}, {"weight": 2}), sent)
    again = decode(encode(message))
    assert again.scalars["weight"] == 2
    found = unpack(again, BLOCKS, key(0, 0))
    assert [(r.id, r.hops, r.upward) for r in found] == [
        ("root/A/a@1@layers.0", 0, True),
        ("root/A/b@12@layers.0", 3, False),
    ]
    assert all(same(r.tensors, key(0.1, 0.9)) for r in found)


@pytest.mark.parametrize(
    "name", ["", "root/A", "root/A@1", "root/A@x@layers.0", "root/A@1@layers.9", "@-1@layers.0"]
)
def test_what_is_no_residual_of_the_model_is_refused(name: str) -> None:
    message = Message({"residual.0": key(1, 1)}, {"residual.0": name, "residual.0.hops": 0})
    with pytest.raises(MessageError, match="a residual called"):
        unpack(message, BLOCKS, key(0, 0))


def test_residuals_of_another_shape_or_named_twice_are_refused() -> None:
    with pytest.raises(MessageError, match="not torch"):
        unpack(pack(Message(), [residual()]), BLOCKS, key(0, 0, 0))
    with pytest.raises(MessageError, match="a residual called"):
        unpack(pack(Message(), [residual(), residual()]), BLOCKS, key(0, 0))
    lame = Message({"residual.0": key(1, 1)}, {"residual.0": residual().id})
    with pytest.raises(MessageError, match="hops"):
        unpack(lame, BLOCKS, key(0, 0))


def test_a_reply_says_what_has_arrived() -> None:
    state = State(scalars={f"took|{residual().id}": True, "weight": 3})
    assert delivered(Message(scalars=taken(state))) == {residual().id}


# On a tree, whose leaves end their training with the key blocks that they are told.


class Keyed(nn.Module):
    """A backbone, and one key block of two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, CLASSES)
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].w = nn.Parameter(torch.tensor([1.0, 1.0]))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(inputs) + self.layers[0].w.sum()  # type: ignore[operator]
        return logits


class Told(WorldLM):
    """WorldLM whose leaves end with given key blocks, or with random ones."""

    told: ClassVar[Mapping[str, tuple[float, ...]]] = {}

    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return what a leaf with those key blocks returns."""
        rng = generator(11, node.path, node.round, "told")
        given = self.told.get(node.path)
        values = torch.randn(2, generator=rng) if given is None else torch.tensor(given)
        return super().end(node, state, {**work, "params": {**work["params"], NAME: values}})


class Hand(Told):
    """The case by hand: in federation A a leaf is like federation B."""

    told: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "root/A/a1": (0.1, 0.9),
        "root/A/a2": (1.0, 0.0),
        "root/B/b1": (0.0, 1.0),
        "root/B/b2": (0.0, 1.0),
    }


TWO = Tree({"A": "root", "B": "root", "a1": "A", "a2": "A", "b1": "B", "b2": "B"})
DEEP = Tree(
    {
        **{"A": "root", "B": "root", "c": "root", "X": "A", "Y": "A", "Z": "B"},
        **{"x1": "X", "x2": "X", "y1": "Y", "y2": "Y", "z1": "Z", "z2": "Z", "b": "B"},
    }
)


def engine(method: WorldLM, tree: Tree, **options: Any) -> LocalEngine:
    torch.manual_seed(0)
    setup = Setup(Task(Keyed()), Training(lr=0.1, batch_size=7))
    leaves = list(tree.leaves())
    data = dict(zip(leaves, clients(len(leaves)).values(), strict=True))
    method.check(setup, tree.depth)
    return LocalEngine(tree, data, method, setup, seed=5, **options)


def by_hand(threshold: float) -> tuple[LocalEngine, list[RoundResult]]:
    """Federations that keep their key blocks: A has (1, 0), B has (0, 1), and the root (1, 1)."""
    made = engine(Hand(nu=0.0, temperature=1e-3, threshold=threshold), TWO)
    for path, values in {"root/A": (1.0, 0.0), "root/B": (0.0, 1.0)}.items():
        params = {**made.setup.task.params, **key(*values)}
        made.store.put(path, State({"model": params}))
    with made:
        return made, [made.round(number, score=False) for number in range(1, 5)]


def totals(results: list[RoundResult], name: str) -> dict[tuple[int, str], float]:
    return {
        (result.number, node): value
        for result in results
        for node, _, figure, value in result.figures
        if figure == name and value
    }


def test_a_leaf_that_is_like_another_federation_reaches_it_in_the_next_pass() -> None:
    """Cosines of (0.1, 0.9): 0.1104 to A, 0.9939 to B."""
    made, results = by_hand(0.5)
    passes = range(1, 5)
    assert totals(results, "residuals_cut") == {(k, "root/A"): 1 for k in passes}
    assert totals(results, "residuals_up") == {(k, "root/A"): 1 for k in passes}
    assert totals(results, "residuals_held") == {(k, "root"): 1 for k in passes}
    assert totals(results, "residuals_given") == {(k, "root"): 1 for k in passes[1:]}
    assert totals(results, "residuals_came") == {(k, "root/B"): 1 for k in passes[1:]}
    assert totals(results, "residuals_used") == {(k, "root/B"): 1 for k in passes[1:]}
    seen = {
        (node, other)
        for result in results
        for node, other, name, value in result.figures
        if name == "attention_down" and value and other == "root/A/a1" and node != other
    }
    assert seen == {("root/B", "root/A/a1")}
    (waiting,) = unpack(made.state(), BLOCKS, key(0, 0))
    assert (waiting.id, waiting.hops) == ("root/A/a1@4@layers.0", 1)


def test_without_a_threshold_none_moves() -> None:
    _, results = by_hand(-1)
    for name in ("cut", "up", "held", "given", "came", "used", "expired", "lost"):
        assert totals(results, f"residuals_{name}") == {}


def waiting(made: LocalEngine) -> list[str]:
    """Ids of the residuals that wait at some node, copies of what has gone up left out."""
    return [
        r.id
        for path in made.tree.walk()
        for r in unpack(made.state(path), BLOCKS, key(0, 0))
        if not r.upward
    ]


@pytest.mark.parametrize("tree", [TWO, DEEP], ids=["two", "deep"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 0.9, "most": 3, "hops": 6},
        {"threshold": 0.9, "most": 2, "hops": 1},
        {"threshold": 0.2, "residual": "difference"},
        {"threshold": 0.9, "most": 2, "schedule": "parallel", "hops": 2},
    ],
    ids=str,
)
def test_every_residual_is_used_expires_is_lost_or_waits(
    tree: Tree, options: dict[str, Any]
) -> None:
    """With random key blocks, and children that fail or are not asked."""
    rules = Participation(failure_rate=0.25, fraction=0.8)
    made = engine(Told(**options), tree, participation=rules)
    counts: Counter[str] = Counter()
    with made:
        for number in range(1, 26):
            result = made.round(number, score=False)
            for _, _, name, value in result.figures:
                counts[name.removeprefix("residuals_")] += int(value)
            ids = waiting(made)
            assert len(ids) == len(set(ids))
            ended = counts["used"] + counts["expired"] + counts["lost"]
            assert counts["cut"] == ended + len(ids), number
    assert counts["used"]
    assert counts["lost"] or options.get("hops") != 1


@pytest.mark.parametrize("most", [1, 2])
def test_an_edge_carries_so_many_at_most_and_none_to_its_origin(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked for in what is dispatched and replied itself."""
    seen: Counter[tuple[str, int]] = Counter()

    def look(way: str, message: Message, limit: int, path: str = "") -> None:
        found = unpack(message, BLOCKS, key(0, 0))
        seen[way, len(found)] += 1
        assert len(found) <= limit
        assert not any(path and r.is_from(path) for r in found)
        assert all(r.hops <= 3 for r in found)

    class Watched(Told):
        def dispatch(self, node: Node, state: State, children: Any) -> Any:
            for path, down in super().dispatch(node, state, children):
                look("down", down, most, path)
                yield path, down

        def reply(self, node: Node, state: State) -> Message:
            found = super().reply(node, state)
            look("up", found, most)
            return found

    made = engine(Watched(threshold=0.9, most=most, hops=3), DEEP)
    with made:
        for number in range(1, 11):
            made.round(number, score=False)
    assert seen["down", most]
    assert seen["up", most]


def test_a_child_that_fails_leaves_its_residual_with_the_parent() -> None:
    made = engine(Hand(nu=0.0, temperature=1e-3), TWO)
    for path, values in {"root/A": (1.0, 0.0), "root/B": (0.0, 1.0)}.items():
        made.store.put(path, State({"model": {**made.setup.task.params, **key(*values)}}))
    with made:
        made.round(1, score=False)
        (before,) = unpack(made.state(), BLOCKS, key(0, 0))
        made.participation = Participation(failure_rate=0.999)
        result = made.round(2, score=False)
        assert {visit.fate for visit in result.visits} == {"failed"}
        (after,) = unpack(made.state(), BLOCKS, key(0, 0))
        assert (after.id, after.hops) == (before.id, before.hops + 1)
        made.participation = Participation()
        result = made.round(3, score=False)
    assert totals([result], "residuals_used") == {(3, "root/B"): 1}


def test_one_that_nobody_is_like_ends_at_the_limit_of_hops() -> None:
    """Only federation A ever answers, so that its residual waits at the root until it is lost."""
    tree = Tree({"A": "root", "B": "root", "a1": "A", "a2": "A", "b1": "B"})
    made = engine(Hand(nu=0.0, temperature=1e-3, hops=2), tree)
    made.store.put("root/A", State({"model": {**made.setup.task.params, **key(1.0, 0.0)}}))
    made.store.put("root/B", State({"model": {**made.setup.task.params, **key(0.0, 1.0)}}))
    fates = {"root/B": "failed"}
    real = Participation.fate

    class Away(Participation):
        def fate(self, seed: int, path: str, round_: int, steps: int) -> Any:
            fate, seconds = real(self, seed, path, round_, steps)
            return fates.get(path, fate), seconds

    made.participation = Away()
    with made:
        results = [made.round(number, score=False) for number in range(1, 5)]
    # Cut in each pass; one edge up, one wait, and the third step is one too many.
    assert totals(results, "residuals_lost") == {(3, "root"): 1, (4, "root"): 1}
    assert totals(results, "residuals_held")[4, "root"] == 2


def test_an_interruption_changes_nothing(tmp_path) -> None:
    """States with residuals in them, on disk, taken up by another engine."""
    options: dict[str, Any] = {"participation": Participation(failure_rate=0.25)}
    method = Told(threshold=0.9, most=2)
    whole = engine(method, DEEP, **options)
    with whole:
        expected = [whole.round(number, score=False) for number in range(1, 7)]
    first = engine(method, DEEP, **options)
    first.store = DiskStore(tmp_path, cache_bytes=0)
    with first:
        found = [first.round(number, score=False) for number in range(1, 4)]
    again = engine(method, DEEP, **options)
    again.store = DiskStore(tmp_path, 3, cache_bytes=0)
    with again:
        found += [again.round(number, score=False) for number in range(4, 7)]
    assert [r.visits for r in found] == [r.visits for r in expected]
    assert [r.figures for r in found] == [r.figures for r in expected]
    assert totals(found, "residuals_used")
    for path in DEEP.walk():
        assert encode(again.state(path)) == encode(whole.state(path))
        for child in DEEP.children(path):
            place = link_key(path, child)
            assert encode(again.store.get(place)) == encode(whole.store.get(place))

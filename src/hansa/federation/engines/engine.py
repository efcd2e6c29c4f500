"""What every engine does: rounds over a tree. How a child is reached is the engine's own matter.

An inner node dispatches, its children's replies come back, and it merges them in the order of
their paths. So a result never depends on which engine carried the messages.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

import torch

from hansa.data.clients import Client
from hansa.federation.aggregation import add_metrics
from hansa.federation.leaf import (
    DivergedError,
    Job,
    Leaf,
    Metrics,
    Scores,
)
from hansa.federation.message import Message, State, check_finite
from hansa.federation.methods.base import Method
from hansa.federation.node import Child, Node, Reply, Setup
from hansa.federation.participation import Fate, Participation
from hansa.federation.spending import afforded, counted, noised_mean, told_centrally
from hansa.federation.store import MemoryStore, Store, link_key
from hansa.federation.tree import ROOT, Tree
from hansa.federation.wire import encoded_size

_AFTER = "trained/"
SPENT_BUDGET = "the privacy budget is spent, so that it did not train"
SPENT_BY_ROOT = "the privacy budget is spent, so that nobody was asked"


@dataclass(frozen=True)
class Visit:
    """What became of one child in one round.

    Attributes:
        path: the child.
        fate: ``ok``, ``late`` (past the deadline), ``failed``, ``spent`` (its privacy budget), or
            ``excluded`` (what it sent is of no use, and was not merged).
        down: bytes of the message it was sent, as encoded; 0 for an empty one.
        up: bytes of its reply; 0 when none came or it was empty.
        csr: bytes of its reply as papers on sparse training count them (``wire.csr_size``).
        seconds: simulated seconds of its local work; 0 at an inner node.
        metrics: metrics of its local training as (sum, count).
        error: why it failed or was excluded, where that is known.
    """

    path: str
    fate: Fate
    down: int
    up: int = 0
    csr: int = 0
    seconds: float = 0.0
    metrics: Metrics = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class RoundResult:
    """What one round did: its visits in path order, and the scores of all leaves if it was scored.

    ``scores`` is leaf -> ``validation``, ``test`` or ``state`` -> metric -> (sum, count), and the
    root's ``state``. ``pairs`` compares clients (first, second, metric, sum, count): ``accuracy``
    of the first one's model on the second one's test data, and over the union of two clients'
    masks what is in both, ``iou`` for the whole model and ``iou:NAME`` for one parameter.
    ``engine`` says how the work was done. ``figures`` is what nodes noted (node, other node, what,
    value), where the method has them note anything.
    """

    number: int
    visits: tuple[Visit, ...]
    scores: Mapping[str, Mapping[str, Metrics]]
    seconds: float
    pairs: tuple[tuple[str, str, str, float, float], ...] = ()
    engine: str = ""
    figures: tuple[tuple[str, str, str, float], ...] = ()

    @property
    def samples(self) -> float:
        """Samples that clients trained on, counted once for every step they were part of."""
        return sum(visit.metrics.get("loss", (0.0, 0.0))[1] for visit in self.visits)


@dataclass(frozen=True)
class Asked:
    """A child that is asked in a round: what it is sent, and what the simulation has in store."""

    path: str
    round: int
    down: Message
    size: int
    fate: Fate
    seconds: float


class Engine(ABC):
    """Runs rounds of a method over a tree whose leaves hold data.

    Args:
        tree: the nodes this engine walks.
        samples: node with data -> its number of training samples.
        method: the federated algorithm.
        setup: what is the same at every node.
        seed: everything random in the run is derived from it.
        participation: who is asked, fails or is late, where a node has no rules of its own.
        on_failure: whether a client whose loss is no number stops the run or is dropped.
        top: the node from which the engine walks down.
    """

    def __init__(
        self,
        tree: Tree,
        samples: Mapping[str, int],
        method: Method,
        setup: Setup,
        seed: int,
        participation: Participation | None = None,
        on_failure: Literal["stop", "drop"] = "stop",
        top: str = ROOT,
    ) -> None:
        self.tree, self.samples, self.method, self.setup = tree, samples, method, setup
        self.seed, self.on_failure, self.top = seed, on_failure, top
        self.participation = participation or Participation()
        self.store: Store = MemoryStore()
        self.rounds_done = 0
        self.data: Mapping[str, Client] = {}
        """Inner node -> the data of its own."""
        self.scoring = True
        """Whether the round under way is scored, or may be by whoever stands above."""
        self._own: dict[str, Visit] = {}

    @property
    @abstractmethod
    def how(self) -> str:
        """How the work is done, in words."""

    @abstractmethod
    def visit(self, node: Node, state: State, visits: list[Visit]) -> State:
        """Run an inner node's round below it, and return its new state.

        Args:
            node: the inner node.
            state: its state after ``receive``.
            visits: what became of its children is added here.
        """

    @abstractmethod
    def score(self, node: Node, state: State) -> Iterable[tuple[str, Scores]]:
        """Return every leaf's scores below a node; what this sends is not part of the round."""

    def round(
        self, number: int, score: bool = True, pairs: bool = False, down: Message | None = None
    ) -> RoundResult:
        """Run one round, counted from 1, and score every leaf after it if asked to.

        Args:
            number: the round.
            score: whether to score every leaf.
            pairs: whether to compare every two clients.
            down: what the top node was sent, where another stands above it.

        Raises:
            DivergedError: a leaf's loss is no number and ``on_failure`` is ``stop``.
        """
        start = perf_counter()
        self.scoring = score or down is not None
        visits: list[Visit] = []
        top = self.node(self.top, number)
        state = self.state(self.top)
        if down is not None:
            state = self.method.receive(top, state, down)
        self.visit(top, state, visits)
        if self.top in self._own:
            visits.append(self._own.pop(self.top))
        visits.sort(key=lambda visit: visit.path)
        scores = with_trained(self.scores(top), visits) if score else {}
        self.rounds_done = number
        compared = tuple(self.pairs()) if pairs else ()
        figures = tuple(self.figures(visits))
        self.store.commit(number)
        seconds = perf_counter() - start
        return RoundResult(number, tuple(visits), scores, seconds, compared, self.how, figures)

    def figures(self, visits: Iterable[Visit]) -> Iterator[tuple[str, str, str, float]]:
        """Yield what nodes that took part noted in the states that are kept here."""
        if type(self.method).figures is Method.figures:
            return
        for path in [self.top, *(v.path for v in visits if v.fate == "ok" and v.path != self.top)]:
            for other, name, value in self.method.figures(self.store.get(path)):
                yield path, other, name, value

    def scores(self, top: Node) -> dict[str, Scores]:
        """Return every leaf's scores, and the top node's figures about its own state."""
        state = self.state(top.path)
        scores = dict(self.score(top, state))
        about = {**self.method.describe(self.setup, state), **told_centrally(top, state)}
        if about:
            scores[top.path] = {"state": about}
        return scores

    def pairs(self) -> Iterable[tuple[str, str, str, float, float]]:
        """Return how clients compare, two by two, where the engine can tell."""
        return ()

    def state(self, path: str = ROOT) -> State:
        """Return a node's state as of now, empty at a node that has not taken part yet."""
        state = self.store.get(path)
        return state or (self.method.start_root(self.node(ROOT, 0)) if path == ROOT else state)

    def common(self) -> torch.nn.Module:
        """Return the common model, as a module of its own."""
        return self.setup.task.materialise(*self.method.model(self.setup, self.state()))

    def node(self, path: str, number: int) -> Node:
        """Return a node in a round."""
        num_children = len(self.tree.children(path))
        return Node(path, number, self.samples.get(path, 0), self.setup.at(path), num_children)

    def children(self, path: str, chosen: Iterable[str]) -> Iterator[Child]:
        """Return children as their parent sees them."""
        return (Child(child, self.store.get(link_key(path, child))) for child in chosen)

    def ask(self, node: Node, state: State) -> Iterator[Asked]:
        """Yield the children that are asked in a round, each with its message and its fate."""
        if not afforded(node, state):
            self._own[node.path] = Visit(node.path, "spent", 0, error=SPENT_BY_ROOT)
            return
        children = self.tree.children(node.path)
        rules = self.setup.rules.get(node.path)
        participation = (rules and rules.participation) or self.participation
        chosen = participation.choose(children, self.seed, node.path, node.round)
        last, size = Message(), 0
        for path, down in self.method.dispatch(node, state, self.children(node.path, chosen)):
            setup = self.setup.at(path)
            steps = setup.training.batches(self.samples.get(path, 0)) * self.method.passes(setup)
            fate, seconds = participation.fate(self.seed, path, node.round, steps)
            if down is not last:  # many children may be sent one and the same message
                last, size = down, encoded_size(down)
            yield Asked(path, node.round, down, size, fate, seconds)

    def ask_all(self, node: Node, state: State) -> Iterator[Asked]:
        """Yield every child with the message it would be sent, to be scored."""
        children = self.children(node.path, self.tree.children(node.path))
        sent = self.method.dispatch(node, state, children)
        return (Asked(path, node.round, down, 0, "ok", 0.0) for path, down in sent)

    def below(self, ask: Asked, scored: bool = False) -> tuple[Node, State]:
        """Return an inner node that stands here, and its state after what it is sent.

        Args:
            ask: what it is sent.
            scored: whether it is sent to be scored, and not to be trained on.
        """
        child = self.node(ask.path, ask.round)
        take = self.method.held if scored else self.method.receive
        before = self.store.get(ask.path)
        return child, counted(take(child, before, ask.down), before)

    def check_reply(
        self, node: Node, state: State, path: str, reply: Message, metrics: Metrics | None = None
    ) -> None:
        """Refuse a child's reply that cannot be merged: so its sender alone loses the round.

        Args:
            node: the inner node.
            state: its state when it dispatched.
            path: the child.
            reply: what it sent.
            metrics: metrics of its training.

        Raises:
            MessageError: something in it is no number, or does not fit the method.
        """
        check_finite(reply, metrics)
        if reply:
            link = self.store.get(link_key(node.path, path))
            self.method.fits(node, state, Child(path, link), reply)

    def merge(self, node: Node, before: State, replies: Iterable[tuple[str, Message]]) -> State:
        """Keep what an inner node makes of its children's replies, and return its new state.

        Args:
            node: the inner node.
            before: its state when it dispatched.
            replies: child -> its reply, in path order, after the node's own share where it has
                one; one at a time is held.
        """

        def remembered() -> Iterator[Reply]:
            for path, reply in replies:
                if path == node.path:  # its own share
                    yield Reply(path, State(), reply)
                    continue
                key = link_key(node.path, path)
                link = self.store.get(key)
                if kept := self.method.remember(node, before, Child(path, link), reply):
                    self.store.put(key, kept)
                yield Reply(path, link, reply)

        if node.setup.central is None:
            state = self.method.aggregate(node, before, remembered())
            state = counted(state, before)
        elif afforded(node, before):
            state = noised_mean(node, before, remembered(), self.method.aggregate)
        else:
            state = before
            for _ in remembered():  # asking comes to nothing, and only then is it said why
                raise RuntimeError(f"{node.path} has replies beyond its privacy budget")
        self.store.put(node.path, state)
        return state

    def train_own(self, node: Node, before: State, state: State) -> tuple[State, Message]:
        """Train an inner node on data of its own, where it holds any.

        Args:
            node: the inner node.
            before: its state before this round.
            state: its state after ``receive``.

        Returns:
            The state it dispatches from, and its own share in the mean, empty where it has none.

        Raises:
            DivergedError: a loss is no number and ``on_failure`` is ``stop``.
        """
        if node.path not in self.data:
            return state, Message()
        leaf = Leaf(self.method, self.setup, self.seed)
        try:
            job = Job(node.path, node.round, self.data[node.path], before, Message(), self.scoring)
            state, share, metrics = leaf.own(node, job, state)
        except DivergedError as error:
            if self.on_failure == "stop":
                raise
            self._own[node.path] = Visit(node.path, "failed", 0, error=str(error))
            return state, Message()
        spent = "spent" in metrics
        told = SPENT_BUDGET if spent else ""
        fate: Fate = "spent" if spent else "ok"
        if earlier := self._own.get(node.path):  # an inner round before this one
            counts = {n: pair for n, pair in earlier.metrics.items() if not _is_after(n)}
            add_metrics(counts, {n: pair for n, pair in metrics.items() if not _is_after(n)})
            metrics = {**metrics, **counts}
        self._own[node.path] = Visit(node.path, fate, 0, metrics=metrics, error=told)
        return state, share

    def score_own(self, node: Node, state: State) -> Iterator[tuple[str, Scores]]:
        """Yield the scores of an inner node that holds data.

        Args:
            node: the inner node.
            state: its state, as it is scored.

        Raises:
            DivergedError: a loss is no number and ``on_failure`` is ``stop``.
        """
        if node.path not in self.data:
            return
        leaf = Leaf(self.method, self.setup, self.seed)
        client, model = self.data[node.path], self.method.model(self.setup, state)
        try:
            yield node.path, leaf.judged(node, client, model, state)
        except DivergedError:
            if self.on_failure == "stop":
                raise


def with_trained(scores: dict[str, Scores], visits: Iterable[Visit]) -> dict[str, Scores]:
    """Return scores by node, in path order, with those of models after their local steps."""
    found = dict(sorted(scores.items()))
    for visit in visits:
        if after := trained(visit.metrics):
            named = {name.removeprefix(_AFTER): pair for name, pair in after.items()}
            found.setdefault(visit.path, {})["test:trained"] = named
    return found


def trained(metrics: Metrics) -> Metrics:
    """Return those of a visit's metrics that are of the model after its local steps."""
    return {name: pair for name, pair in metrics.items() if _is_after(name)}


def _is_after(name: str) -> bool:
    return name.startswith(_AFTER)

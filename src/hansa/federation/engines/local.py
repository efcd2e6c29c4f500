"""The local engine: a whole federation on one machine, in one process or in several.

A round descends the tree and comes back up: every inner node dispatches, its children answer in
the order of their paths, and it aggregates the answers as they come. Leaves below one inner node
run in worker processes when there are any. The order of work never shows in the result: streams
of random numbers are derived, and replies are merged in path order.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, islice
from time import perf_counter
from types import TracebackType
from typing import Literal, TypeVar

import torch

from hansa.data.clients import Client
from hansa.federation.engines.workers import (
    Pool,
    ThisProcess,
    Trained,
    Workers,
    check_sendable,
)
from hansa.federation.leaf import DivergedError, Leaf, Metrics, Newcomer
from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods.base import Method
from hansa.federation.node import Child, Node, Reply, Setup
from hansa.federation.participation import Fate, Participation
from hansa.federation.store import MemoryStore, Store, link_key
from hansa.federation.tree import ROOT, Tree
from hansa.federation.wire import encoded_size

T = TypeVar("T")


@dataclass(frozen=True)
class Visit:
    """What became of one child in one round.

    Attributes:
        path: the child.
        fate: ``ok``, ``late`` (past the deadline) or ``failed``.
        down: bytes of the message it was sent, as encoded; 0 for an empty one.
        up: bytes of its reply; 0 when none came or it was empty.
        seconds: simulated seconds of its local work; 0 at an inner node.
        metrics: metrics of its local training as (sum, count).
        error: why it failed, where that is known.
    """

    path: str
    fate: Fate
    down: int
    up: int = 0
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
    """

    number: int
    visits: tuple[Visit, ...]
    scores: Mapping[str, Mapping[str, Metrics]]
    seconds: float
    pairs: tuple[tuple[str, str, str, float, float], ...] = ()


class LocalEngine:
    """Runs rounds of a method over a tree whose leaves hold data.

    A context manager: it starts and ends worker processes and holds PyTorch to one thread, since
    with more the rounding of sums may depend on how many there are.
    """

    def __init__(
        self,
        tree: Tree,
        clients: Mapping[str, Client],
        method: Method,
        setup: Setup,
        seed: int,
        participation: Participation | None = None,
        workers: int = 1,
        on_failure: Literal["stop", "drop"] = "stop",
    ) -> None:
        self.tree, self.clients, self.method, self.setup = tree, clients, method, setup
        self.seed, self.on_failure, self.num_workers = seed, on_failure, workers
        self.participation = participation or Participation()
        self.store: Store = MemoryStore()
        self._leaf = Leaf(method, setup, seed)
        self._workers: Workers = ThisProcess(self._leaf, clients)
        self._threads = 1
        self.rounds_done = 0
        if workers > 1:
            check_sendable(self._leaf, workers)

    def __enter__(self) -> "LocalEngine":
        if self.num_workers > 1:
            self._workers = Pool(self.num_workers, self._leaf, self.clients)
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._workers.close()
        torch.set_num_threads(self._threads)

    def round(self, number: int, score: bool = True, pairs: bool = False) -> RoundResult:
        """Run one round, counted from 1, and score every leaf after it if asked to.

        Args:
            number: the round.
            score: whether to score every leaf.
            pairs: whether to compare every two clients.

        Raises:
            DivergedError: a leaf's loss is no number and ``on_failure`` is ``stop``.
        """
        start = perf_counter()
        visits: list[Visit] = []
        root = self._node(ROOT, number)
        self._visit(root, self.state(), visits)
        scores = dict(self._score(root, self.state())) if score else {}
        if score and (about := self.method.describe(self.setup, self.state())):
            scores[ROOT] = {"state": about}
        self.rounds_done = number
        compared = tuple(self._pairs()) if pairs else ()
        self.store.commit(number)
        visits.sort(key=lambda visit: visit.path)
        return RoundResult(number, tuple(visits), scores, perf_counter() - start, compared)

    def state(self, path: str = ROOT) -> State:
        """Return a node's state as of now, empty at a node that has not taken part yet."""
        state = self.store.get(path)
        return state or (self.method.start_root(self._node(ROOT, 0)) if path == ROOT else state)

    def model_of(self, path: str) -> torch.nn.Module:
        """Return the model of a node, as a module of its own: at a leaf the one that is scored."""
        if self.tree.is_leaf(path):
            return self.setup.task.materialise(*self._model(path))
        return self.setup.task.materialise(*self.method.model(self.setup, self._held(path)))

    def masks_of(self, path: str) -> Tensors:
        """Return a client's masks by parameter; none for a method without masks."""
        return self.method.masks(self.setup, self._held(path))

    def onboard(self, name: str, client: Client, epochs: int) -> Newcomer:
        """Return what a client that is not in the tree gains by joining; nothing is kept."""
        root = self._node(ROOT, self.rounds_done)
        path = f"{ROOT}/{name}"
        ((_, down),) = self.method.dispatch(root, self.state(), [Child(path, State())])
        return self._leaf.onboard(path, self.rounds_done + 1, client, down, epochs)

    def _pairs(self) -> Iterator[tuple[str, str, str, float, float]]:
        """Yield how clients' own models and masks compare, two by two."""
        if self.method.scored != "trained":
            return
        masks = {}
        for first in self.tree.leaves():
            held = self._model(first)
            for second in self.tree.leaves():
                client = self.clients[second]
                if client.count("test"):
                    yield first, second, "accuracy", *self._leaf.cross(client, *held)
            masks[first] = self.masks_of(first)
        for first, second in combinations(masks, 2):
            both, either = 0.0, 0.0
            for name, mask in masks[first].items():
                other = masks[second][name]
                overlap = float((mask & other).sum()), float((mask | other).sum())
                yield first, second, f"iou:{name}", *overlap
                both, either = both + overlap[0], either + overlap[1]
            if masks[first]:
                yield first, second, "iou", both, either

    def _model(self, path: str) -> tuple[Tensors, Tensors]:
        client, state = self.clients[path], self.store.get(path)
        return self._leaf.model(path, self.rounds_done, client, state, self._sent(path))

    def _held(self, path: str) -> State:
        """Return a leaf's own state; elsewhere, or where it has none, what it would receive."""
        state = self.state(path)
        own = self.tree.is_leaf(path) and state and self.method.scored == "trained"
        if path == ROOT or own:
            return state
        return self.method.receive(self._node(path, self.rounds_done), state, self._sent(path))

    def _sent(self, path: str) -> Message:
        """Return the newest message that a node would be sent."""
        parent, _, _ = path.rpartition("/")
        node = self._node(parent, self.rounds_done)
        sent = self.method.dispatch(node, self._held(parent), self._children(parent, [path]))
        return next(sent)[1]

    def _node(self, path: str, number: int) -> Node:
        client = self.clients.get(path)
        return Node(
            path,
            number,
            client.count("train") if client else 0,
            self.setup,
            len(self.tree.children(path)),
        )

    def _children(self, path: str, chosen: Iterable[str]) -> Iterator[Child]:
        return (Child(child, self.store.get(link_key(path, child))) for child in chosen)

    def _visit(self, node: Node, state: State, visits: list[Visit]) -> Message:
        """Run a node's round below it, keep its new state, and return its reply."""
        children = self.tree.children(node.path)
        chosen = self.participation.choose(children, self.seed, node.path, node.round)
        sent = self.method.dispatch(node, state, self._children(node.path, chosen))
        replies = self._replies(node, state, sent, visits)
        state = self.method.aggregate(node, state, replies)
        self.store.put(node.path, state)
        return Message() if node.path == ROOT else self.method.reply(node, state)

    def _replies(
        self,
        parent: Node,
        before: State,
        sent: Iterator[tuple[str, Message]],
        visits: list[Visit],
    ) -> Iterator[Reply]:
        """Yield the replies of a node's children as they come in, in path order."""
        calls = (self._ask(parent.round, path, down, visits) for path, down in sent)
        for ask in _ahead(calls, self._workers.ahead):
            visit, state, reply = ask()
            visits.append(visit)
            if visit.fate == "ok" and self.tree.is_leaf(visit.path) and state:
                self.store.put(visit.path, state)
            if not reply:
                continue
            key = link_key(parent.path, visit.path)
            link = self.store.get(key)
            remembered = self.method.remember(parent, before, Child(visit.path, link), reply)
            if remembered:
                self.store.put(key, remembered)
            yield Reply(visit.path, link, reply)

    def _ask(
        self, number: int, path: str, down: Message, visits: list[Visit]
    ) -> Callable[[], tuple[Visit, State, Message]]:
        """Start a child's round; the call returns what became of it."""
        node = self._node(path, number)
        batches = -(-node.samples // self.setup.training.batch_size)
        steps = batches * self.method.passes(self.setup)
        fate, seconds = self.participation.fate(self.seed, path, number, steps)
        size = encoded_size(down)
        start: Callable[[], Trained]
        if fate != "ok":
            return lambda: (Visit(path, fate, size, seconds=seconds), State(), Message())
        if self.tree.is_leaf(path):
            start = self._workers.train(path, number, self.store.get(path), down)
        else:

            def start() -> Trained:
                state = self.method.receive(node, self.store.get(path), down)
                return State(), self._visit(node, state, visits), {}

        def result() -> tuple[Visit, State, Message]:
            try:
                state, reply, metrics = start()
            except DivergedError as error:
                if self.on_failure == "stop":
                    raise
                visit = Visit(path, "failed", size, seconds=seconds, error=str(error))
                return visit, State(), Message()
            up = encoded_size(reply)
            return Visit(path, "ok", size, up, seconds, metrics), state, reply

        return result

    def _score(self, node: Node, state: State) -> Iterator[tuple[str, dict[str, Metrics]]]:
        """Yield every leaf's scores, in path order; what this sends is not part of the round."""
        children = self.tree.children(node.path)
        sent = self.method.dispatch(node, state, self._children(node.path, children))

        def ask(path: str, down: Message) -> Callable[[], Iterable[tuple[str, dict[str, Metrics]]]]:
            held = self.store.get(path)
            if self.tree.is_leaf(path):
                scores = self._workers.score(path, node.round, held, down)
                return lambda: self._unless_dropped(path, scores)
            child = self._node(path, node.round)
            return lambda: self._score(child, self.method.receive(child, held, down))

        calls = (ask(path, down) for path, down in sent)
        for call in _ahead(calls, self._workers.ahead):
            yield from call()

    def _unless_dropped(
        self, path: str, scores: Callable[[], dict[str, Metrics]]
    ) -> list[tuple[str, dict[str, Metrics]]]:
        try:
            return [(path, scores())]
        except DivergedError:
            if self.on_failure == "stop":
                raise
            return []


def _ahead(calls: Iterator[T], num: int) -> Iterator[T]:
    """Yield in order, with the next ``num - 1`` already drawn, and so started."""
    started = deque(islice(calls, num))
    while started:
        yield started.popleft()
        started.extend(islice(calls, 1))

"""The local engine: a whole federation on one machine, in one process or in several.

A round descends the tree and comes back up: every inner node dispatches, its children answer in
the order of their paths, and it aggregates the answers as they come. Leaves below one inner node
run in worker processes when there are any. The order of work never shows in the result: streams
of random numbers are derived, and replies are merged in path order.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice
from time import perf_counter
from types import TracebackType
from typing import Literal, TypeVar

import torch

from hansa.data.clients import Client
from hansa.federation.engines.plan import Plan
from hansa.federation.engines.workers import Pool, ThisProcess, Workers, check_sendable
from hansa.federation.leaf import DivergedError, Job, Leaf, Metrics, Newcomer, Scores, Trained
from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods.base import Method
from hansa.federation.node import Child, Node, Reply, Setup
from hansa.federation.participation import Fate, Participation
from hansa.federation.stack import Stack
from hansa.federation.store import MemoryStore, Store, link_key
from hansa.federation.tree import ROOT, Tree
from hansa.federation.wire import encoded_size

T = TypeVar("T")
WINDOW = 4
"""Stacks whose leaves are sorted by size together; their replies are held until all are there."""


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
    ``engine`` says how the work was done.
    """

    number: int
    visits: tuple[Visit, ...]
    scores: Mapping[str, Mapping[str, Metrics]]
    seconds: float
    pairs: tuple[tuple[str, str, str, float, float], ...] = ()
    engine: str = ""

    @property
    def samples(self) -> float:
        """Samples that clients trained on, counted once for every step they were part of."""
        return sum(visit.metrics.get("loss", (0.0, 0.0))[1] for visit in self.visits)


@dataclass(frozen=True)
class _Asked:
    """A child that is asked in a round: what it is sent, and what will become of it."""

    path: str
    round: int
    down: Message
    size: int
    fate: Fate
    seconds: float


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
        on_failure: Literal["stop", "drop"] = "stop",
        plan: Plan | None = None,
    ) -> None:
        self.tree, self.clients, self.method, self.setup = tree, clients, method, setup
        self.seed, self.on_failure, self.plan = seed, on_failure, plan or Plan()
        self.participation = participation or Participation()
        self.store: Store = MemoryStore()
        self.leaf = Leaf(method, setup, seed)
        largest = max(client.count("train") for client in clients.values())
        self._width = min(setup.training.batch_size, largest)
        self.stack = Stack(self.leaf, Plan(), self._width)
        self._workers: Workers = ThisProcess(self.stack)
        self._threads = 1
        self.rounds_done = 0
        if self.plan.workers > 1:
            check_sendable(self.leaf, self.plan.workers)

    def __enter__(self) -> "LocalEngine":
        self.use(self.plan)
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

    def use(self, plan: Plan) -> None:
        """Do the work by another plan from here on."""
        self._workers.close()
        self.plan = plan
        if plan.workers > 1:
            self._workers = Pool(plan, self.leaf, self._width, self.clients)
        else:
            self.stack = Stack(self.leaf, plan, self._width)
            self._workers = ThisProcess(self.stack)

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
        seconds = perf_counter() - start
        # What turned out not to be stackable was done one by one.
        how = str(self.plan) + (", in part one by one" if self.stack.failure else "")
        return RoundResult(number, tuple(visits), scores, seconds, compared, how)

    def jobs(self, number: int) -> list[Job]:
        """Return what the root's children would start a round from, all of them leaves."""
        children = self._children(ROOT, self.tree.children(ROOT))
        sent = self.method.dispatch(self._node(ROOT, number), self.state(), children)
        return [self._job(path, number, down) for path, down in sent]

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
        return self.leaf.onboard(Job(path, self.rounds_done + 1, client, State(), down), epochs)

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
                    yield first, second, "accuracy", *self.leaf.cross(client, *held)
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
        return self.leaf.model(self._job(path, self.rounds_done, self._sent(path)))

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

    def _job(self, path: str, number: int, down: Message) -> Job:
        return Job(path, number, self.clients[path], self.store.get(path), down)

    def _replies(
        self,
        parent: Node,
        before: State,
        sent: Iterator[tuple[str, Message]],
        visits: list[Visit],
    ) -> Iterator[Reply]:
        """Yield the replies of a node's children as they come in, in path order."""
        asked = self._asked(parent.round, sent)
        calls = (self._ask(window, visits) for window in self._windows(asked))
        for call in _ahead(calls, self._windows_ahead):
            for visit, state, reply in call():
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

    @property
    def _windows_ahead(self) -> int:
        """How many windows are worth starting before the first result is asked for."""
        return -(-self._workers.ahead // WINDOW) if self.plan.stack > 1 else self._workers.ahead

    def _windows(self, asked: Iterable[_Asked]) -> Iterator[list[_Asked]]:
        """Yield children in parts whose leaves fill some stacks; an inner node stands alone."""
        num = self.plan.stack * WINDOW if self.plan.stack > 1 else 1
        window: list[_Asked] = []
        for ask in asked:
            leaf = self.tree.is_leaf(ask.path)
            if window and (not leaf or len(window) == num):
                yield window
                window = []
            window.append(ask)
            if not leaf:
                yield window
                window = []
        if window:
            yield window

    def _stacks(self, window: Sequence[_Asked]) -> list[list[_Asked]]:
        """Return the leaves of a window in stacks, those of like size together."""
        leaves = [ask for ask in window if ask.fate == "ok" and self.tree.is_leaf(ask.path)]
        leaves.sort(key=lambda ask: -self.clients[ask.path].count("train"))
        return [leaves[k : k + self.plan.stack] for k in range(0, len(leaves), self.plan.stack)]

    def _asked(self, number: int, sent: Iterable[tuple[str, Message]]) -> Iterator[_Asked]:
        last, size = Message(), 0
        for path, down in sent:
            samples = self.clients[path].count("train") if path in self.clients else 0
            batches = -(-samples // self.setup.training.batch_size)
            steps = batches * self.method.passes(self.setup)
            fate, seconds = self.participation.fate(self.seed, path, number, steps)
            if down is not last:  # many children may be sent one and the same message
                last, size = down, encoded_size(down)
            yield _Asked(path, number, down, size, fate, seconds)

    def _ask(
        self, window: list[_Asked], visits: list[Visit]
    ) -> Callable[[], list[tuple[Visit, State, Message]]]:
        """Start the round of some children; the call returns what became of them, in order."""
        trained = self._start(window, self._workers.train)

        def results() -> list[tuple[Visit, State, Message]]:
            done = trained()
            return [self._visited(ask, done, visits) for ask in window]

        return results

    def _start(
        self, window: Sequence[_Asked], work: Callable[[Sequence[Job]], Callable[[], list[T]]]
    ) -> Callable[[], dict[str, T]]:
        """Start some work on a window's leaves; the call returns its results by path."""
        stacks = self._stacks(window)
        calls = [
            work([self._job(ask.path, ask.round, ask.down) for ask in stack]) for stack in stacks
        ]

        def results() -> dict[str, T]:
            return {
                ask.path: result
                for stack, call in zip(stacks, calls, strict=True)
                for ask, result in zip(stack, call(), strict=True)
            }

        return results

    def _visited(
        self, ask: _Asked, done: Mapping[str, Trained | DivergedError], visits: list[Visit]
    ) -> tuple[Visit, State, Message]:
        """Return what became of one child: a leaf that is done, or an inner node, which is visited.

        Raises:
            DivergedError: the leaf's loss is no number and ``on_failure`` is ``stop``.
        """
        path, seconds, size = ask.path, ask.seconds, ask.size
        if ask.fate != "ok":
            return Visit(path, ask.fate, size, seconds=seconds), State(), Message()
        if self.tree.is_leaf(path):
            outcome = done[path]
            if isinstance(outcome, DivergedError):
                if self.on_failure == "stop":
                    raise outcome
                visit = Visit(path, "failed", size, seconds=seconds, error=str(outcome))
                return visit, State(), Message()
            state, reply, metrics = outcome
        else:
            node = self._node(path, ask.round)
            received = self.method.receive(node, self.store.get(path), ask.down)
            state, reply, metrics = State(), self._visit(node, received, visits), {}
        up = encoded_size(reply)
        return Visit(path, "ok", size, up, seconds, metrics), state, reply

    def _score(self, node: Node, state: State) -> Iterator[tuple[str, Scores]]:
        """Yield every leaf's scores, in path order; what this sends is not part of the round."""
        children = self.tree.children(node.path)
        sent = self.method.dispatch(node, state, self._children(node.path, children))
        asked = (_Asked(path, node.round, down, 0, "ok", 0.0) for path, down in sent)
        calls = (self._ask_scores(node, window) for window in self._windows(asked))
        for call in _ahead(calls, self._windows_ahead):
            yield from call()

    def _ask_scores(
        self, node: Node, window: list[_Asked]
    ) -> Callable[[], Iterable[tuple[str, Scores]]]:
        first = window[0]
        if not self.tree.is_leaf(first.path):
            child, held = self._node(first.path, node.round), self.store.get(first.path)
            return lambda: self._score(child, self.method.receive(child, held, first.down))
        scored = self._start(window, self._workers.score)

        def results() -> Iterator[tuple[str, Scores]]:
            found = scored()
            for ask in window:
                scores = found[ask.path]
                if not isinstance(scores, DivergedError):
                    yield ask.path, scores
                elif self.on_failure == "stop":
                    raise scores

        return results


def _ahead(calls: Iterator[T], num: int) -> Iterator[T]:
    """Yield in order, with the next ``num - 1`` already drawn, and so started."""
    started = deque(islice(calls, num))
    while started:
        yield started.popleft()
        started.extend(islice(calls, 1))

"""The local engine: a whole federation on one machine, in one process or in several.

A round descends the tree and comes back up: every inner node dispatches, its children answer in
the order of their paths, and it aggregates the answers as they come. Leaves below one inner node
run in worker processes when there are any. The order of work never shows in the result: streams
of random numbers are derived, and replies are merged in path order.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations, islice
from types import TracebackType
from typing import Literal, TypeVar

import torch

from hansa.data.clients import Client
from hansa.federation.engines.engine import SPENT_BUDGET, Asked, Engine, Visit
from hansa.federation.engines.plan import Plan
from hansa.federation.engines.workers import Pool, ThisProcess, Workers, check_sendable
from hansa.federation.leaf import DivergedError, Job, Leaf, Newcomer, Scores, Trained
from hansa.federation.message import Message, MessageError, State, Tensors
from hansa.federation.methods.base import Method
from hansa.federation.node import Child, Node, Setup
from hansa.federation.participation import Fate, Participation
from hansa.federation.stack import Stack
from hansa.federation.tree import ROOT, Tree, name_of
from hansa.federation.wire import csr_size, encoded_size

T = TypeVar("T")
_Came = tuple[Visit, State, Message]
_log = logging.getLogger("hansa.engine")
WINDOW = 4
"""Stacks whose leaves are sorted by size together; their replies are held until all are there."""


class LocalEngine(Engine):
    """Runs the whole federation on this machine.

    Where there is an audience (path -> client), it is scored, by the common model, and nobody else.

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
        audience: Mapping[str, Client] | None = None,
    ) -> None:
        samples = {path: client.count("train") for path, client in clients.items()}
        super().__init__(tree, samples, method, setup, seed, participation, on_failure)
        self.data = {p: client for p, client in clients.items() if not tree.is_leaf(p)}
        self.audience = audience or {}
        self.clients, self.plan = clients, plan or Plan()
        self.leaf = Leaf(method, setup, seed)
        self._width = min(setup.training.batch_size, max(samples.values()))
        self.stack = Stack(self.leaf, Plan(), self._width)
        self._workers: Workers = ThisProcess(self.stack)
        self._threads = 1
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

    @property
    def how(self) -> str:
        """The plan, and whether all of it could be followed."""
        # What turned out not to be stackable was done one by one.
        return str(self.plan) + (", in part one by one" if self.stack.failure else "")

    def jobs(self, number: int) -> list[Job]:
        """Return what the root's children would start a round from, all of them leaves."""
        asked = self.ask_all(self.node(ROOT, number), self.state())
        return [self._job(ask.path, number, ask.down) for ask in asked]

    def model_of(self, path: str) -> torch.nn.Module:
        """Return the model of a node, as a module of its own: at a leaf the one that is scored."""
        if self.tree.is_leaf(path):
            return self.setup.task.materialise(*self._model(path))
        return self.common() if path == ROOT else self.setup.task.materialise(*self._model(path))

    def masks_of(self, path: str) -> Tensors:
        """Return a client's masks by parameter; none for a method without masks."""
        return self.method.masks(self.setup, self._held(path))

    def onboard(self, name: str, client: Client, epochs: int) -> Newcomer:
        """Return what a client that is not in the tree gains by joining; nothing is kept."""
        root = self.node(ROOT, self.rounds_done)
        path = f"{ROOT}/{name}"
        ((_, down),) = self.method.dispatch(root, self.state(), [Child(path, State())])
        return self.leaf.onboard(Job(path, self.rounds_done + 1, client, State(), down), epochs)

    def pairs(self) -> Iterator[tuple[str, str, str, float, float]]:
        """Yield how clients' own models and masks compare, two by two."""
        if self.method.scored != "trained" and not self.setup.moments:
            return
        masks = {}
        judges = {p: c for p, c in (self.audience or self.clients).items() if self._honest(p)}
        rows = [path for path in self.tree.walk() if path in judges]
        if self.setup.moments and ROOT not in rows:
            rows.insert(0, ROOT)
        for first in rows:
            held = self._model(first)
            for second, client in judges.items():
                if client.count("test"):
                    found = self.leaf.cross(client, *held)
                    for metric in found if self.setup.moments else ("accuracy",):
                        yield first, second, metric, *found[metric]
            if self.tree.is_leaf(first):
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
        if not self.tree.is_leaf(path):
            return self.method.model(self.setup, self._held(path))
        return self.leaf.model(self._job(path, self.rounds_done, self._sent(path)))

    def _held(self, path: str) -> State:
        """Return a leaf's own state; elsewhere, or where it has none, what it would receive."""
        state = self.state(path)
        own = self.tree.is_leaf(path) and state and self.method.scored == "trained"
        if path == ROOT or (own and not self.setup.moments):
            return state
        return self.method.held(self.node(path, self.rounds_done), state, self._sent(path))

    def _sent(self, path: str) -> Message:
        """Return the newest message that a node would be sent."""
        parent, _, _ = path.rpartition("/")
        node = self.node(parent, self.rounds_done)
        sent = self.method.dispatch(node, self._held(parent), self.children(parent, [path]))
        return next(sent)[1]

    def visit(self, node: Node, state: State, visits: list[Visit]) -> State:
        """Run an inner node's round below it, and return its new state."""
        state, share = self.train_own(node, self.store.get(node.path), state)
        own = [(node.path, share)] if share else []
        return self.merge(node, state, chain(own, self._replies(node, state, visits)))

    def _job(self, path: str, number: int, down: Message) -> Job:
        return Job(path, number, self.clients[path], self.store.get(path), down, self.scoring)

    def _replies(
        self, node: Node, state: State, visits: list[Visit]
    ) -> Iterator[tuple[str, Message]]:
        """Yield the replies of a node's children as they come in, in path order."""
        calls = (self._ask(window, visits) for window in self._windows(self.ask(node, state)))
        came = (each for call in _ahead(calls, self._windows_ahead) for each in call())
        for visit, kept, reply in self._attacked(node, state, came):
            try:
                self.check_reply(node, state, visit.path, reply)
            except MessageError as error:
                told = f"a reply of no use: {error}"
                _log.warning("round %d: %s: excluded: %s", node.round, name_of(visit.path), told)
                visits.append(replace(visit, fate="excluded", up=0, csr=0, metrics={}, error=told))
                continue
            visits.append(visit)
            if visit.fate == "ok" and self.tree.is_leaf(visit.path) and kept:
                self.store.put(visit.path, kept)
            if reply:
                yield visit.path, reply

    def _attacked(self, node: Node, state: State, came: Iterator[_Came]) -> Iterable[_Came]:
        """Return what came of a node's children as attackers have it, who may wait for the rest."""
        attack = self.setup.attack
        if attack is None or not attack.colludes:
            return came
        held = list(came)
        sent = attack.replied(
            {visit.path: reply for visit, _, reply in held}, self.method.unchanged(node, state)
        )
        return [(visit, kept, sent[visit.path]) for visit, kept, _ in held]

    @property
    def _windows_ahead(self) -> int:
        """How many windows are worth starting before the first result is asked for."""
        return -(-self._workers.ahead // WINDOW) if self.plan.stack > 1 else self._workers.ahead

    def _windows(self, asked: Iterable[Asked]) -> Iterator[list[Asked]]:
        """Yield children in parts whose leaves fill some stacks; an inner node stands alone."""
        num = self.plan.stack * WINDOW if self.plan.stack > 1 else 1
        window: list[Asked] = []
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

    def _stacks(self, window: Sequence[Asked]) -> list[list[Asked]]:
        """Return the leaves of a window in stacks, those of like size together."""
        leaves = [ask for ask in window if ask.fate == "ok" and self.tree.is_leaf(ask.path)]
        leaves.sort(key=lambda ask: -self.clients[ask.path].count("train"))
        return [leaves[k : k + self.plan.stack] for k in range(0, len(leaves), self.plan.stack)]

    def _ask(self, window: list[Asked], visits: list[Visit]) -> Callable[[], list[_Came]]:
        """Start the round of some children; the call returns what became of them, in order."""
        trained = self._start(window, self._workers.train)

        def results() -> list[_Came]:
            done = trained()
            return [self._visited(ask, done, visits) for ask in window]

        return results

    def _start(
        self, window: Sequence[Asked], work: Callable[[Sequence[Job]], Callable[[], list[T]]]
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
        self, ask: Asked, done: Mapping[str, Trained | DivergedError], visits: list[Visit]
    ) -> _Came:
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
            error = SPENT_BUDGET if "spent" in metrics else ""
        else:
            node, state = self.below(ask)
            turns = self.method.turns()
            for turn in range(turns):  # each with random draws of its own
                number = (ask.round - 1) * turns + turn + 1
                state = self.visit(replace(node, round=number), state, visits)
            reply = self.method.reply(node, state)
            own = self._own.pop(path, Visit(path, "ok", 0))
            state, metrics, error = State(), own.metrics, own.error
        up = encoded_size(reply)
        fate: Fate = "spent" if "spent" in metrics and self.tree.is_leaf(path) else "ok"
        visit = Visit(path, fate, size, up, csr_size(reply), seconds, metrics, error)
        return visit, state, reply

    def score(self, node: Node, state: State) -> Iterator[tuple[str, Scores]]:
        """Yield the scores of every node with data, in path order."""
        if self.audience:
            yield from self._score_audience(node, state)
            return
        yield from self.score_own(node, state)
        windows = self._windows(ask for ask in self.ask_all(node, state) if self._honest(ask.path))
        calls = (self._ask_scores(node, window) for window in windows)
        for call in _ahead(calls, self._windows_ahead):
            yield from call()

    def _honest(self, path: str) -> bool:
        """Tell whether a node is none of a simulation's attackers, whom no score is about."""
        return self.setup.attack is None or path not in self.setup.attack.paths

    def _score_audience(self, node: Node, state: State) -> Iterator[tuple[str, Scores]]:
        """Yield the scores of one model at nodes that had no part in its training."""
        model = self.method.model(self.setup, state)
        for path, client in self.audience.items():
            yield path, self.leaf.judged(node, client, model, State())

    def _ask_scores(
        self, node: Node, window: list[Asked]
    ) -> Callable[[], Iterable[tuple[str, Scores]]]:
        first = window[0]
        if not self.tree.is_leaf(first.path):
            return lambda: self.score(*self.below(first, scored=True))
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

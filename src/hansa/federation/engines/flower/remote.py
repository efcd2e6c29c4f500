"""Rounds over children on other machines. What carries the requests is a ``Post``."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

from hansa.errors import InputError, first_line
from hansa.federation.engines.engine import SPENT_BUDGET, Asked, Engine, Visit, trained
from hansa.federation.engines.flower.exchange import (
    Answer,
    Kind,
    LostError,
    Post,
    Request,
    Ticket,
)
from hansa.federation.engines.flower.site import decoded, encoded, largest, scores_of
from hansa.federation.leaf import DivergedError, Scores
from hansa.federation.message import Message, State, check_finite
from hansa.federation.methods.base import Method
from hansa.federation.node import Child, Node, Reply, Setup
from hansa.federation.participation import Fate, Participation
from hansa.federation.store import link_key
from hansa.federation.tree import ROOT, Tree, name_of
from hansa.federation.wire import csr_size

_log = logging.getLogger("hansa.flower")


@dataclass(frozen=True)
class _Sent:
    """An inner node whose children are at work."""

    node: Node
    state: State
    children: Sequence[tuple[Asked, "Ticket | _Sent | LostError"]]
    until: float
    share: Message
    """What the node itself adds to the mean, empty where it trains nothing."""


class RemoteEngine(Engine):
    """Runs rounds over children that are asked by requests.

    All children are asked before the first answer is awaited, and answers are taken in path order,
    one at a time, so that one reply is held in memory however many children there are. A reply
    that does not fit the model, or holds what is no number, is left out and named.

    Args:
        post: carries the requests.
        run: what the run is called.
        tree: the nodes this engine walks; its leaves are asked by requests, and may stand for
            whole federations.
        samples: leaf -> its number of training samples.
        method: the federated algorithm.
        setup: what is the same at every node.
        seed: everything random in the run is derived from it.
        participation: who is asked, fails or is late.
        on_failure: whether a client whose loss is no number stops the run or is dropped.
        top: the node from which the engine walks down.
        deadline: seconds from the sending of a node's requests after which answers are late.

    Raises:
        InputError: a method with several inner rounds, or one that pools data.
    """

    def __init__(
        self,
        post: Post,
        run: str,
        tree: Tree,
        samples: Mapping[str, int],
        method: Method,
        setup: Setup,
        seed: int,
        participation: Participation | None = None,
        on_failure: Literal["stop", "drop"] = "stop",
        top: str = ROOT,
        deadline: float = float("inf"),
    ) -> None:
        super().__init__(tree, samples, method, setup, seed, participation, on_failure, top)
        if method.pools:
            raise InputError("method.name", repr(method.name), "a method that pools no data")
        if method.turns() > 1:
            raise InputError("method.inner_rounds", method.turns(), "1 past one machine")
        self.post, self.run, self.deadline = post, run, deadline
        self._missed: dict[str, int] = {}

    @property
    def how(self) -> str:
        """What carries the requests."""
        return self.post.name

    def visit(self, node: Node, state: State, visits: list[Visit]) -> State:
        """Run an inner node's round below it, and return its new state."""
        return self.take(self.send(node, state), visits)

    def send(self, node: Node, state: State) -> _Sent:
        """Ask the children of a node, and those of the inner nodes below it that stand here."""
        state, share = self.train_own(node, self.store.get(node.path), state)
        children: list[tuple[Asked, Ticket | _Sent | LostError]] = []
        known, body = self._known(node.path), _Encoder()
        present = self._present(node.path)
        for ask in self.ask(node, state):
            if ask.path not in present:
                away = replace(ask, size=0)
                children.append((away, LostError("failed", "not connected")))
            elif ask.fate != "ok":
                children.append((ask, LostError(ask.fate, "")))
            elif not self.tree.is_leaf(ask.path):
                children.append((ask, self.send(*self.below(ask))))
            else:
                children.append((ask, self._posted("train", ask, known, body)))
        return _Sent(node, state, children, time.monotonic() + self.deadline, share)

    def take(self, sent: _Sent, visits: list[Visit]) -> State:
        """Merge the answers of a node's children as they come, and return its new state."""
        known = self._known(sent.node.path)
        own = [(sent.node.path, sent.share)] if sent.share else []
        replies = chain(own, self._replies(sent, visits, known))
        state = self.merge(sent.node, sent.state, replies)
        self.store.put(_known_key(sent.node.path), State(scalars=dict(sorted(known.items()))))
        return state

    def score(self, node: Node, state: State) -> Iterator[tuple[str, Scores]]:
        """Return the scores of all that can be reached, in path order."""
        asked = self.send_scores(node, state)
        yield from self._score_inner(node, state)
        yield from self.take_scores(asked)

    def _score_inner(self, node: Node, state: State) -> Iterator[tuple[str, Scores]]:
        """Yield the scores of the inner nodes that stand here and hold data."""
        yield from self.score_own(node, state)
        if self.data:
            for ask in self.ask_all(node, state):
                if not self.tree.is_leaf(ask.path):
                    yield from self._score_inner(*self.below(ask, scored=True))

    def send_scores(self, node: Node, state: State) -> list[tuple[Asked, Ticket | LostError]]:
        """Ask every child of a node, and of the inner nodes below it that stand here."""
        known, body = self._known(node.path), _Encoder()
        asked: list[tuple[Asked, Ticket | LostError]] = []
        present = set(self._present(node.path))
        for ask in self.ask_all(node, state):
            if not self.tree.is_leaf(ask.path):
                asked += self.send_scores(*self.below(ask, scored=True))
            elif self._missed.get(ask.path) == node.round:
                # Its scores would come behind the answer that is late: nobody waits for it twice.
                asked.append((ask, LostError("late", "it missed the round's deadline")))
            elif ask.path in present:
                asked.append((ask, self._posted("score", ask, known, body)))
        return asked

    def take_scores(
        self, asked: Sequence[tuple[Asked, Ticket | LostError]]
    ) -> Iterator[tuple[str, Scores]]:
        """Yield the scores that ``send_scores`` asked for, as they come."""
        until = time.monotonic() + self.deadline
        for ask, ticket in asked:
            try:
                yield ask.path, scores_of(self._answer(ask, ticket, until))
            except LostError as error:
                self._tell(ask, "no scores", error)

    def end(self, children: Sequence[str]) -> None:
        """Tell those of some children that can be reached that the run is over."""
        tickets = {}
        for path in self.post.present(children):
            with suppress(LostError):
                tickets[path] = self.post.send(Request("end", self.run, path))
        until = time.monotonic() + self.deadline
        for path, ticket in tickets.items():
            try:
                self.post.take(ticket, until)
            except LostError as error:
                _log.warning("%s was not told of the end: %s", name_of(path), error)

    def _present(self, path: str) -> list[str]:
        """Return the children that can be asked: inner nodes here, and whoever is connected."""
        children = self.tree.children(path)
        away = [child for child in children if self.tree.is_leaf(child)]
        there = set(self.post.present(away)) if away else set()
        return [child for child in children if child in there or child not in away]

    def _posted(
        self, kind: Kind, ask: Asked, known: Mapping[str, int], body: "_Encoder"
    ) -> Ticket | LostError:
        request = Request(
            kind, self.run, ask.path, ask.round, known.get(ask.path, 0), body(ask.down)
        )
        try:
            return self.post.send(request)
        except LostError as error:
            return error

    def _replies(
        self, sent: _Sent, visits: list[Visit], known: dict[str, int]
    ) -> Iterator[tuple[str, Message]]:
        for ask, ticket in sent.children:
            seconds = ask.seconds
            try:
                if isinstance(ticket, _Sent):
                    below = self.take(ticket, visits)
                    reply = self.method.reply(ticket.node, below)
                    own = self._own.pop(ask.path, Visit(ask.path, "ok", 0))
                    up, metrics, told = len(encoded(reply)), own.metrics, own.error
                else:
                    answer = self._answer(ask, ticket, sent.until)
                    reply, metrics = self._sound(sent, ask, answer), answer.metrics
                    up, known[ask.path] = len(answer.body), ask.round
                    told = SPENT_BUDGET if "spent" in metrics else ""
            except LostError as error:
                visits.append(
                    Visit(ask.path, error.fate, ask.size, seconds=seconds, error=str(error))
                )
                if str(error):
                    self._tell(ask, error.fate, error)
                if error.fate == "late" and ask.fate == "ok":
                    self._missed[ask.path] = ask.round
                continue
            csr = csr_size(reply)
            # Of a federation it is its server that trains no more; its members' work is here.
            fate: Fate = "ok" if reply or "spent" not in metrics else "spent"
            visits.append(Visit(ask.path, fate, ask.size, up, csr, seconds, metrics, told))
            if reply:
                yield ask.path, reply

    def _answer(self, ask: Asked, ticket: Ticket | LostError, until: float) -> Answer:
        """Return what a child answers.

        Raises:
            LostError: nothing of use.
            DivergedError: its loss is no number and ``on_failure`` is ``stop``.
        """
        if isinstance(ticket, LostError):
            raise ticket
        answer = self.post.take(ticket, until)
        if answer.status != "refused" and (answer.path, answer.round) != (ask.path, ask.round):
            said = f"{name_of(answer.path)!r} in round {answer.round}"
            raise LostError("excluded", f"an answer of {said}, not what was asked")
        if answer.status == "diverged" and self.on_failure == "stop":
            raise DivergedError(ask.path, ask.round, answer.error)
        if answer.status != "ok":
            raise LostError("failed", answer.error)
        return answer

    def _sound(self, sent: _Sent, ask: Asked, answer: Answer) -> Message:
        """Return a reply that can be merged.

        Raises:
            LostError: it cannot.
        """
        try:
            reply = decoded(answer.body, largest(self.setup.task))
            metrics = {n: p for n, p in answer.metrics.items() if n not in trained(answer.metrics)}
            self.check_reply(sent.node, sent.state, ask.path, reply, metrics)
            if not reply:
                return reply
            # Merged alone, on trial: what a method makes of a reply, only the method can tell.
            link = self.store.get(link_key(sent.node.path, ask.path))
            self.method.remember(sent.node, sent.state, Child(ask.path, link), reply)
            alone = self.method.aggregate(sent.node, sent.state, [Reply(ask.path, link, reply)])
            check_finite(alone)
        except Exception as error:  # bytes from another machine may break a method anywhere
            raise LostError("excluded", f"a reply of no use: {first_line(error)}") from error
        return reply

    def _known(self, path: str) -> dict[str, int]:
        """Return child -> the last round whose reply was kept."""
        return {n: int(v) for n, v in self.store.get(_known_key(path)).scalars.items()}

    def _tell(self, ask: Asked, what: str, error: LostError) -> None:
        _log.warning("round %d: %s: %s: %s", ask.round, name_of(ask.path), what, error)


class _Encoder:
    """Encodes a message that many children are sent once."""

    def __init__(self) -> None:
        self._last: tuple[Message, bytes] = (Message(), b"")

    def __call__(self, message: Message) -> bytes:
        if message is not self._last[0]:
            self._last = message, encoded(message)
        return self._last[1]


def _known_key(path: str) -> str:
    return f"{path}@"

"""Requests over Flower's Grid: who is connected, and what comes back."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid as Grid

from hansa.errors import InputError, first_line
from hansa.federation.engines.flower.exchange import Answer, LetterError, LostError, Request, Ticket
from hansa.federation.engines.flower.records import TYPES, from_records, to_records
from hansa.federation.tree import ROOT, is_name, name_of

_log = logging.getLogger("hansa.flower")
_PATIENCE = 0.25  # seconds between looks for an answer, growing up to four times as long
_LOOK = 2.0  # seconds between looks whether a node that is awaited has died
_RETURN = 90.0  # seconds that a node which has died has to come back
_AGAIN = 10.0  # seconds before a node that could not take part is asked again
TTL = 43_200.0  # seconds; Flower's own limit for a message and its reply


@dataclass
class _Out:
    """A request on its way.

    Attributes:
        request: what is asked.
        node: whom.
        since: when that node connected.
        message: Flower's number of the message.
        left: how often it may be sent again.
        gone: since when its node is known to be dead, 0 while it is not.
    """

    request: Request
    node: int
    since: str
    message: str
    left: int = 3
    gone: float = 0.0


class GridPost:
    """Reaches children through a SuperLink, each by the path that its node is configured with.

    Args:
        grid: Flower's.
        run: what the run is called.
        children: the paths that may take part; None for any directly below the root.
        deadline: seconds after which nobody waits for an answer.
        keys: public key of a node, as the SuperLink reports it -> its path. With keys, a node is
            who its key says, whatever it claims; without, what it claims.
        name: what this is called in tables.
    """

    def __init__(
        self,
        grid: Grid,
        run: str,
        children: Iterable[str] | None,
        deadline: float = float("inf"),
        keys: Mapping[bytes, str] | None = None,
        name: str = "Flower",
    ) -> None:
        self._grid, self.run, self.name = grid, run, name
        self._children = None if children is None else set(children)
        self._keys = keys
        self._ttl = min(TTL, deadline + 60)
        self._nodes: dict[int, str] = {}
        self._refused: set[int] = set()
        self._again: dict[int, float] = {}
        self._hellos: dict[int, str] = {}
        self._online: dict[int, str] = {}
        self._out: dict[Ticket, _Out] = {}
        self.objections: dict[int, str] = {}
        """Nodes that are connected and do not take part, and why."""
        self.facts: dict[str, Mapping[str, str | int]] = {}

    def present(self, children: Sequence[str]) -> list[str]:
        """Return those of the children whose nodes are connected, in order."""
        self._meet()
        there = set(self._nodes.values())
        return [child for child in children if child in there]

    def everybody(self) -> list[str]:
        """Return the paths of all nodes that are connected, in order."""
        self._meet()
        return sorted(self._nodes.values())

    def node_of(self, path: str) -> int:
        """Return the node of a path.

        Raises:
            LostError: it is not connected.
        """
        for node, its in self._nodes.items():
            if its == path:
                return node
        raise LostError("failed", "not connected")

    def path_of(self, node: int) -> str:
        """Return the path of a node, nothing for one that is not known."""
        return self._nodes.get(node, "")

    def wait(self, children: Sequence[str], seconds: float) -> None:
        """Wait until all of some children are connected.

        Raises:
            InputError: some of them are not, after that time.
        """
        until = time.monotonic() + seconds
        while len(there := self.present(children)) < len(children):
            if time.monotonic() > until:
                missing = ", ".join(name_of(c) for c in children if c not in there)
                raise InputError(
                    "nodes", f"none of {missing} after {seconds:g} s", "all nodes connected"
                )
            time.sleep(_PATIENCE)

    def send(self, request: Request) -> Ticket:
        """Hand a request to the SuperLink.

        Raises:
            LostError: the child is not connected.
        """
        ticket = self._push(request, node := self.node_of(request.path))
        self._out[ticket] = _Out(request, node, self._online[node], ticket)
        return ticket

    def take(self, ticket: Ticket, until: float) -> Answer:
        """Wait for an answer.

        What Flower has handed to a node is lost when the node dies. So a node that has connected
        anew since is sent the request again; whoever has answered it already answers the same.

        Raises:
            LostError: it is late, or the node failed.
        """
        out, pause, looked = self._out.pop(ticket), _PATIENCE, time.monotonic()
        while True:
            message = None if out.gone else self._pull(out.message)
            if message is not None and (not message.has_error() or out.left <= 0):
                return answer_in(message)
            now = time.monotonic()
            if message is not None:  # of Flower's, about a node that has died
                _log.warning("%s: %s", name_of(out.request.path), message.error.reason)
                out.gone = now
            if out.gone and now > out.gone + _RETURN:
                raise LostError("failed", f"its node was gone for {_RETURN:g} s")
            if now >= until:
                raise LostError("late", "no answer by the deadline")
            if now > looked + _LOOK:
                self._send_again(out)
                looked = now
            time.sleep(max(0.0, min(pause, until - now)))
            pause = min(2 * pause, 4 * _PATIENCE)

    def _send_again(self, out: "_Out") -> None:
        """Send a request again if its node has connected anew since."""
        self._meet()
        node = next((n for n, path in self._nodes.items() if path == out.request.path), None)
        if node is None or out.left <= 0:
            return
        if (node, self._online[node]) != (out.node, out.since):
            _log.warning("%s is asked again", name_of(out.request.path))
            out.node, out.since, out.left = node, self._online[node], out.left - 1
            out.message, out.gone = self._push(out.request, node), 0.0

    def _pull(self, message: str) -> Message | None:
        """Return the reply to a message, None while there is none.

        Raises:
            LostError: what came is nothing that Flower can read.
        """
        try:
            return next(iter(self._grid.pull_messages([message])), None)
        except (AttributeError, ValueError, KeyError, TypeError) as error:
            raise LostError("excluded", f"garbage for a message: {first_line(error)}") from error

    def _push(self, request: Request, node: int) -> Ticket:
        message = message_of(request, node, self._ttl)
        tickets: list[str | None] = list(self._grid.push_messages([message]))
        for ticket in tickets:
            if ticket is not None:
                return ticket
        raise LostError("failed", "the SuperLink did not take the request")

    def _meet(self) -> None:
        """Ask new nodes who they are, take in what they have said, forget those that are gone."""
        nodes = list(self._grid.get_nodes())
        online = {node.node_id: node.public_key for node in nodes}
        before, self._online = self._online, {n.node_id: n.last_activated_at for n in nodes}
        for node in list(self._hellos):  # whoever connected anew has lost what it was asked
            if before.get(node) != self._online.get(node):
                del self._hellos[node]
        for held in (self._nodes, self._hellos, self._again, self.objections):
            for node in held.keys() - online.keys():
                del held[node]
        self._refused &= online.keys()
        known = self._nodes.keys() | self._hellos.keys() | self._again.keys() | self._refused
        for node in online.keys() - known:
            with suppress(LostError):
                self._hellos[node] = self._push(Request("hello", self.run, ""), node)
        for node, ticket in list(self._hellos.items()):
            try:
                said = self._pull(ticket)
                if said is None:
                    continue
                self._welcome(node, online[node], answer_in(said))
            except LostError as error:
                self._rest(node, str(error))
            del self._hellos[node]
        now = time.monotonic()
        self._again = {node: until for node, until in self._again.items() if now < until}

    def _welcome(self, node: int, key: bytes, answer: Answer) -> None:
        """Take in a node that has said who it is, or leave it out for good."""
        samples = answer.facts.get("samples", 0)
        if answer.status != "ok":
            self._rest(node, answer.error)
        elif not isinstance(samples, int) or not 0 <= samples < 1 << 53:
            self._rest(node, f"{samples!r} samples")
        elif answer.path in self._nodes.values():
            # Flower counts a node that has died as connected for a minute.
            self._rest(node, f"another node is {answer.path} already")
        elif why := self._objection(key, answer.path):
            self._refused.add(node)
            self.objections[node] = why
            _log.warning("node %d is left out: %s", node, why)
        else:
            self._nodes[node] = answer.path
            self.objections.pop(node, None)
            self.facts[answer.path] = answer.facts
            _log.info("%s is connected", name_of(answer.path))

    def _objection(self, key: bytes, path: str) -> str:
        """Return why a node cannot be the child that it says it is; nothing where it can."""
        if self._keys is not None and self._keys.get(key) != path:
            return f"its key is not that of {path}"
        if self._children is None:
            above, _, name = path.rpartition("/")
            fits = above == ROOT and is_name(name)
        else:
            fits = path in self._children
        if not fits:
            return f"{path} is no part of this federation"
        return ""

    def _rest(self, node: int, why: str) -> None:
        """Ask a node again after a while: what keeps it from taking part may pass."""
        if self.objections.get(node) != why:
            _log.warning("node %d cannot take part yet: %s", node, why)
        self.objections[node] = why
        self._again[node] = time.monotonic() + _AGAIN


def message_of(request: Request, node: int, ttl: float = TTL) -> Message:
    """Return a request as a message of Flower's.

    Args:
        request: what is asked.
        node: the node's number.
        ttl: seconds that the message and its reply are kept.
    """
    kind = TYPES[request.kind]
    return Message(to_records(request), node, kind, ttl=ttl, group_id=str(request.round))


def answer_in(message: Message) -> Answer:
    """Return the answer in a message of Flower's.

    Raises:
        LostError: there is none.
    """
    if message.has_error():
        raise LostError("failed", f"{message.error.reason or message.error.code}")
    try:
        return from_records(Answer, message.content)
    except LetterError as error:
        raise LostError("excluded", f"garbage for an answer: {error}") from error

"""Who does the work of leaves: this process, or a pool of others. Same calls, same numbers."""

import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, Protocol

from hansa.data.clients import Client
from hansa.errors import InputError
from hansa.federation.leaf import Leaf, Metrics
from hansa.federation.message import Message, State
from hansa.federation.wire import decode, encode
from hansa.processes import pool

Trained = tuple[State, Message, Metrics]
Scores = dict[str, Metrics]


class Workers(Protocol):
    """Trains and scores leaves. Each call returns a call that gives the result."""

    ahead: int
    """How many leaves are worth starting before the first result is asked for."""

    def train(self, path: str, round_: int, state: State, down: Message) -> Callable[[], Trained]:
        """Return a call that gives the leaf's new state, its reply and its training metrics."""
        ...

    def score(self, path: str, round_: int, state: State, down: Message) -> Callable[[], Scores]:
        """Return a call that gives the leaf's metrics by split."""
        ...

    def close(self) -> None:
        """Give back what was taken."""
        ...


class ThisProcess:
    """Does each piece of work when its result is asked for."""

    ahead = 1

    def __init__(self, leaf: Leaf, clients: Mapping[str, Client]) -> None:
        self._leaf, self._clients = leaf, clients

    def train(self, path: str, round_: int, state: State, down: Message) -> Callable[[], Trained]:
        """Return a call that trains one leaf."""
        return lambda: self._leaf.train(path, round_, self._clients[path], state, down)

    def score(self, path: str, round_: int, state: State, down: Message) -> Callable[[], Scores]:
        """Return a call that scores one leaf."""
        return lambda: self._leaf.score(path, round_, self._clients[path], state, down)

    def close(self) -> None:
        """Do nothing."""


class Pool:
    """Does the work in other processes. States and messages cross as their encoded bytes."""

    def __init__(self, num: int, leaf: Leaf, clients: Mapping[str, Client]) -> None:
        self.ahead = 2 * num
        self._stack = ExitStack()
        self._executor = self._stack.enter_context(pool(num, _enter, leaf, dict(clients)))

    def train(self, path: str, round_: int, state: State, down: Message) -> Callable[[], Trained]:
        """Start training one leaf; the call waits for it."""
        future = self._submit(_train, path, round_, state, down)

        def result() -> Trained:
            after, reply, metrics = future.result()
            return decode(after), decode(reply), metrics

        return result

    def score(self, path: str, round_: int, state: State, down: Message) -> Callable[[], Scores]:
        """Start scoring one leaf; the call waits for it."""
        return self._submit(_score, path, round_, state, down).result

    def close(self) -> None:
        """End the processes."""
        self._stack.close()

    def _submit(
        self, call: Callable[..., Any], path: str, round_: int, state: State, down: Message
    ) -> Future[Any]:
        return self._executor.submit(call, path, round_, encode(state), encode(down))


def check_sendable(leaf: Leaf, num: int) -> None:
    """Refuse a model that other processes could not be given.

    Raises:
        InputError: the model's class cannot be found again in another process.
    """
    try:
        pickle.dumps(leaf)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            "engine.workers",
            f"{num} with a model that cannot be sent to a process ({error})",
            "1, or a model whose class stands in a module that can be imported",
        ) from error


_here: ThisProcess


def _enter(leaf: Leaf, clients: dict[str, Client]) -> None:
    global _here
    _here = ThisProcess(leaf, clients)


def _train(path: str, round_: int, state: bytes, down: bytes) -> tuple[bytes, bytes, Metrics]:
    after, reply, metrics = _here.train(path, round_, decode(state), decode(down))()
    return encode(after), encode(reply), metrics


def _score(path: str, round_: int, state: bytes, down: bytes) -> Scores:
    return _here.score(path, round_, decode(state), decode(down))()

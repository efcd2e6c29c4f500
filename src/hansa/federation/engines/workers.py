"""Who does the work of stacks: this process, or a pool of others. Same calls, same numbers."""

import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, Protocol

from hansa.data.clients import Client
from hansa.errors import InputError
from hansa.federation.engines.plan import Plan
from hansa.federation.leaf import DivergedError, Job, Leaf, Metrics, Scores, Trained
from hansa.federation.message import Message
from hansa.federation.stack import Stack
from hansa.federation.wire import decode, encode
from hansa.processes import pool


class Workers(Protocol):
    """Trains and scores leaves in stacks. Each call returns a call that gives the results.

    A leaf whose loss is no number has its error for a result.
    """

    ahead: int
    """How many stacks are worth starting before the first result is asked for."""

    def train(self, jobs: Sequence[Job]) -> Callable[[], list[Trained | DivergedError]]:
        """Return a call that gives each leaf's new state, its reply and its training metrics."""
        ...

    def score(self, jobs: Sequence[Job]) -> Callable[[], list[Scores | DivergedError]]:
        """Return a call that gives each leaf's metrics by split."""
        ...

    def close(self) -> None:
        """Give back what was taken."""
        ...


class ThisProcess:
    """Does each stack when its results are asked for."""

    ahead = 1

    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    def train(self, jobs: Sequence[Job]) -> Callable[[], list[Trained | DivergedError]]:
        """Return a call that trains the leaves."""
        return lambda: self._stack.train(jobs)

    def score(self, jobs: Sequence[Job]) -> Callable[[], list[Scores | DivergedError]]:
        """Return a call that scores the leaves."""
        return lambda: self._stack.score(jobs)

    def close(self) -> None:
        """Do nothing."""


class Pool:
    """Does the stacks in other processes. States and messages cross as their encoded bytes."""

    def __init__(self, plan: Plan, leaf: Leaf, width: int, clients: Mapping[str, Client]) -> None:
        self.ahead = 2 * plan.workers
        self._exit = ExitStack()
        start = (leaf, plan, width, dict(clients))
        self._executor = self._exit.enter_context(pool(plan.workers, _enter, *start))

    def train(self, jobs: Sequence[Job]) -> Callable[[], list[Trained | DivergedError]]:
        """Start training the leaves; the call waits for them."""
        future = self._submit(_train, jobs)

        def results() -> list[Trained | DivergedError]:
            return [
                done
                if isinstance(done, DivergedError)
                else (decode(done[0]), decode(done[1]), done[2])
                for done in future.result()
            ]

        return results

    def score(self, jobs: Sequence[Job]) -> Callable[[], list[Scores | DivergedError]]:
        """Start scoring the leaves; the call waits for them."""
        return self._submit(_score, jobs).result

    def close(self) -> None:
        """End the processes."""
        self._exit.close()

    def _submit(self, call: Callable[..., Any], jobs: Sequence[Job]) -> Future[Any]:
        # A message that many children are sent crosses once.
        downs = {id(job.down): job.down for job in jobs}
        sent = {key: encode(down) for key, down in downs.items()}
        rows = [(job.path, job.round, encode(job.state), id(job.down)) for job in jobs]
        return self._executor.submit(call, rows, sent)


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


_Row = tuple[str, int, bytes, int]
_here: Stack
_clients: dict[str, Client]


def _enter(leaf: Leaf, plan: Plan, width: int, clients: dict[str, Client]) -> None:
    global _here, _clients
    _here, _clients = Stack(leaf, plan, width), clients


def _jobs(rows: list[_Row], sent: dict[int, bytes]) -> list[Job]:
    downs: dict[int, Message] = {key: decode(data) for key, data in sent.items()}
    return [
        Job(path, number, _clients[path], decode(state), downs[key])
        for path, number, state, key in rows
    ]


def _train(
    rows: list[_Row], sent: dict[int, bytes]
) -> list[tuple[bytes, bytes, Metrics] | DivergedError]:
    return [
        done if isinstance(done, DivergedError) else (encode(done[0]), encode(done[1]), done[2])
        for done in _here.train(_jobs(rows, sent))
    ]


def _score(rows: list[_Row], sent: dict[int, bytes]) -> list[Scores | DivergedError]:
    return _here.score(_jobs(rows, sent))

"""Who does the work of stacks: this process, or a pool of others. Same calls, same numbers."""

import pickle  # nosec B403 # nothing is read: it tells whether work can go to other processes
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import torch

from hansa.data.clients import Client, Index, Split
from hansa.errors import InputError
from hansa.federation.engines.plan import Plan
from hansa.federation.leaf import DivergedError, Job, Leaf, Metrics, Scores, Trained
from hansa.federation.message import Message
from hansa.federation.stack import Stack
from hansa.processes import pool

SHARED = 128
"""Tensors that are shared with other processes; of more, each gets a copy."""


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
    """Does the stacks in other processes."""

    def __init__(self, plan: Plan, leaf: Leaf, width: int, clients: Mapping[str, Client]) -> None:
        self.ahead = 2 * plan.workers
        self._exit = ExitStack()
        start = (leaf, plan, width, _portable(clients))
        self._executor = self._exit.enter_context(pool(plan.workers, _enter, *start))

    def train(self, jobs: Sequence[Job]) -> Callable[[], list[Trained | DivergedError]]:
        """Start training the leaves; the call waits for them."""
        future = self._submit(_train, jobs)

        def results() -> list[Trained | DivergedError]:
            return [
                done
                if isinstance(done, DivergedError)
                else (_unpacked(done[0]), _unpacked(done[1]), done[2])
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
        sent = {key: _packed(down) for key, down in downs.items()}
        rows = [(job.path, job.round, _packed(job.state), id(job.down), job.scored) for job in jobs]
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


# Within one machine messages need neither checks nor small size: they cross as plain bytes.
_Tensor = tuple[bytes, torch.dtype, torch.Size]
_Packed = tuple[dict[str, dict[str, _Tensor]], dict[str, Any], dict[str, tuple[float, float]]]
_Held = dict[str, tuple[tuple[int, int, int | None, int | None], dict[Split, Index]]]
_Row = tuple[str, int, _Packed, int, bool]
_here: Stack
_clients: dict[str, Client]


def _packed(message: Message) -> _Packed:
    groups = {
        group: {name: _packed_tensor(t) for name, t in tensors.items()}
        for group, tensors in message.groups.items()
    }
    return groups, dict(message.scalars), dict(message.metrics)


def _packed_tensor(tensor: torch.Tensor) -> _Tensor:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().tobytes(), tensor.dtype, tensor.shape


def _unpacked(packed: _Packed) -> Message:
    groups, scalars, metrics = packed
    return Message(
        {g: {n: _tensor(*held) for n, held in ts.items()} for g, ts in groups.items()},
        scalars,
        metrics,
    )


def _tensor(data: bytes, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    # A tensor of its own is aligned as PyTorch aligns them; vector kernels may depend on that.
    tensor = torch.empty(shape, dtype=dtype)
    if data:
        flat = tensor.view(-1).view(torch.uint8).numpy()
        flat[:] = np.frombuffer(data, dtype=np.uint8)
    return tensor


def _portable(clients: Mapping[str, Client]) -> tuple[dict[int, Any], _Held]:
    """Return pools of samples by number, and clients that name theirs.

    A tensor is shared with a process by a file descriptor, of which there are not many.
    """
    pools: dict[int, torch.Tensor] = {}
    held: _Held = {}
    for path, c in clients.items():
        tensors = (c.inputs, c.labels, c.weights, c.domains)
        pools |= {id(tensor): tensor for tensor in tensors if tensor is not None}
        about = [None if tensor is None else id(tensor) for tensor in tensors[2:]]
        held[path] = (id(c.inputs), id(c.labels), about[0], about[1]), c.splits
    if len(pools) <= SHARED:
        return dict(pools), held
    return {key: _packed_tensor(tensor) for key, tensor in pools.items()}, held


def _enter(leaf: Leaf, plan: Plan, width: int, sent: tuple[dict[int, Any], _Held]) -> None:
    global _here, _clients
    pools = {k: _tensor(*t) if isinstance(t, tuple) else t for k, t in sent[0].items()}
    _here = Stack(leaf, plan, width)
    _clients = {}
    for path, (keys, splits) in sent[1].items():
        first, second, *about = keys
        rest = [None if key is None else pools[key] for key in about]
        _clients[path] = Client(pools[first], pools[second], splits, *rest)


def _jobs(rows: list[_Row], sent: dict[int, _Packed]) -> list[Job]:
    downs = {key: _unpacked(packed) for key, packed in sent.items()}
    return [
        Job(path, number, _clients[path], _unpacked(state), downs[key], scored)
        for path, number, state, key, scored in rows
    ]


def _train(
    rows: list[_Row], sent: dict[int, _Packed]
) -> list[tuple[_Packed, _Packed, Metrics] | DivergedError]:
    return [
        done if isinstance(done, DivergedError) else (_packed(done[0]), _packed(done[1]), done[2])
        for done in _here.train(_jobs(rows, sent))
    ]


def _score(rows: list[_Row], sent: dict[int, _Packed]) -> list[Scores | DivergedError]:
    return _here.score(_jobs(rows, sent))

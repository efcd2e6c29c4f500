"""Secure aggregation: a server that learns the mean of its clients' updates and no single one.

The protocol is Flower's SecAgg+ (Bell et al., "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead", CCS 2020): each client adds random masks to its update, pairs of which
cancel in the sum. It is for methods that take no more from replies than their weighted mean
(``Method.alone`` is empty): it is all that such a server has.
"""

import logging
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Context
from flwr.client import Client as FlowerClient
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    NDArrays,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import LegacyContext, ServerConfig
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from hansa.data.clients import Client
from hansa.errors import InputError
from hansa.federation.engines.flower.site import LeafWorker
from hansa.federation.engines.flower.strategy import place_of
from hansa.federation.leaf import Leaf
from hansa.federation.message import Message, State
from hansa.federation.methods.base import Method
from hansa.federation.node import Buffers, Child, Node, Reply, Setup
from hansa.federation.optimizer import Training
from hansa.federation.store import DiskStore
from hansa.federation.tree import ROOT
from hansa.models.task import Task

_log = logging.getLogger("hansa.flower")
_RUN = re.compile(r"[0-9a-f]{16}")
_WAIT = 300  # seconds that clients have to connect


class SecureOptions(BaseModel):
    """How updates are masked, and what precision that leaves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_shares: float = Field(1.0, gt=0, le=1, strict=True)
    """Share of the clients that a client's keys are split among."""
    reconstruction_threshold: float = Field(0.67, gt=0.5, le=1, strict=True)
    """Share of them that must answer for a round to count; so many must conspire, too, to take a
    client's mask off."""
    clipping_range: float = Field(1.0, gt=0, allow_inf_nan=False, strict=True)
    """Largest change of an entry in a round. A client with a larger one is left out of the round,
    since what is cut would no longer be its update."""
    most_samples: int = Field(1000, ge=1, strict=True)
    """Largest weight of a client. Precision is lost where weights are far below it."""
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False, strict=True)
    """Seconds that are waited for the clients at each of the protocol's four stages."""

    def workflow(self) -> SecAggPlusWorkflow:
        """Return the protocol."""
        return SecAggPlusWorkflow(
            self.num_shares,
            self.reconstruction_threshold,
            max_weight=float(self.most_samples),
            clipping_range=self.clipping_range,
            timeout=self.timeout,
        )


def check_summable(method: Method) -> None:
    """Refuse a method whose server must see replies one by one.

    Raises:
        InputError: with the reason.
    """
    if method.alone:
        raise InputError(
            "secure aggregation",
            f"method {method.name!r}: {method.alone}",
            "a method that needs no more than the mean, such as fedavg, fedprox, fedper or diloco",
        )


class _Shape:
    """What travels, as one row of numbers: the groups of the root's message, in order of names."""

    def __init__(self, method: Method, setup: Setup) -> None:
        root = Node(ROOT, 0, 0, setup)
        ((_, sent),) = method.dispatch(root, method.start_root(root), [Child(ROOT, State())])
        self._like = {
            (group, name): sent.groups[group][name]
            for group in sorted(sent.groups)
            for name in sorted(sent.groups[group])
        }
        if not self._like:
            raise InputError("method.name", repr(method.name), "one that shares something")

    def row(self, message: Message) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Return a message's tensors as one row, float64."""
        like = self.message(np.zeros(sum(each.numel() for each in self._like.values())))
        groups = {group: message.require(group, like.groups[group]) for group in like.groups}
        parts = [groups[group][name].double().flatten() for group, name in self._like]
        return torch.cat(parts).numpy()

    def message(self, row: np.ndarray[Any, np.dtype[np.float64]], weight: int = 0) -> Message:
        """Return the message that a row stands for; what counts is rounded to whole numbers."""
        groups: dict[str, dict[str, torch.Tensor]] = {}
        sizes = [like.numel() for like in self._like.values()]
        parts = torch.from_numpy(row.copy()).split(sizes)
        for ((group, name), like), part in zip(self._like.items(), parts, strict=True):
            values = part if like.is_floating_point() else part.round()
            groups.setdefault(group, {})[name] = values.reshape(like.shape).to(like.dtype)
        return Message(groups, {"weight": weight} if weight else {})


class SecureStrategy(Strategy):
    """The server's side of a method, which sees means alone.

    Args:
        method: the federated algorithm.
        setup: what is the same at every node.
        clients: clients that a round waits for; all that are connected then take part.
        save: where the common model's parameters and buffers are written after each round.
    """

    def __init__(
        self, method: Method, setup: Setup, clients: int, save: Path | None = None
    ) -> None:
        self.method, self.setup, self._clients, self._save = method, setup, clients, save
        self._shape, self._run = _Shape(method, setup), secrets.token_hex(8)
        self.state = method.start_root(Node(ROOT, 0, 0, setup, clients))
        self.rounds: list[int] = []
        """Rounds that counted: in the others too few clients answered, and nothing changed."""

    def model(self) -> nn.Module:
        """Return the common model, as a module of its own."""
        return self.setup.task.materialise(*self.method.model(self.setup, self.state))

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters:
        """Return what the first round starts from."""
        return ndarrays_to_parameters([self._shape.row(self._sent(0))])

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Return what each client is sent."""
        if not client_manager.wait_for(self._clients, _WAIT):
            found = f"{client_manager.num_available()} after {_WAIT} s"
            raise InputError("clients", found, f"at least {self._clients}")
        config: dict[str, Scalar] = {"run": self._run, "round": server_round}
        row = ndarrays_to_parameters([self._shape.row(self._sent(server_round))])
        everybody = sorted(client_manager.all().values(), key=lambda proxy: proxy.cid)
        return [(proxy, FitIns(row, config)) for proxy in everybody]

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: Sequence[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Take the mean in, which is all that is here: it stands in the place of every result."""
        if not results:
            return None, {}
        (change,) = parameters_to_ndarrays(results[0][1].parameters)
        weight = sum(result.num_examples for _, result in results)
        mean = self._shape.message(self._shape.row(self._sent(server_round)) + change, weight)
        node = Node(ROOT, server_round, 0, self.setup, self._clients)
        self.state = self.method.aggregate(node, self.state, [Reply(ROOT, State(), mean)])
        self.rounds.append(server_round)
        _log.info("round %d: the mean of %d clients", server_round, len(results))
        if self._save is not None:
            self._write(self._save)
        return ndarrays_to_parameters([self._shape.row(self._sent(server_round))]), {}

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Ask nobody: a client's scores would come without a mask."""
        return []

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: Sequence[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Return nothing."""
        return None, {}

    def evaluate(self, server_round: int, parameters: Parameters) -> None:
        """Score nothing: the server holds no data."""

    def _sent(self, number: int) -> Message:
        node = Node(ROOT, number, 0, self.setup, self._clients)
        ((_, sent),) = self.method.dispatch(node, self.state, [Child(ROOT, State())])
        return sent

    def _write(self, path: Path) -> None:
        from safetensors.torch import save

        from hansa.files import write_atomic

        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(dict(self.model().state_dict())))


class SecureApps(NamedTuple):
    """The two apps, and the server's strategy, which holds the common model in its process."""

    server: ServerApp
    client: ClientApp
    strategy: SecureStrategy


def secure_apps(
    method: Method,
    task: Task,
    data: Callable[[Context], Client],
    training: Training | None = None,
    *,
    rounds: int,
    clients: int,
    seed: int = 0,
    buffers: Buffers = "averaged",
    options: SecureOptions | None = None,
    save: str | Path | None = None,
) -> SecureApps:
    """Return apps whose server learns the weighted mean of the clients' updates, and no update.

    What a client keeps between rounds lies on its own disk, as with ``client_app``.

    Args:
        method: a method that needs no more than the mean of its replies.
        task: the model; its parameters are the initial values, at the server and at every client.
        data: called with Flower's context, returns what the client holds.
        training: optimizer and local work.
        rounds: rounds of the federation.
        clients: clients that a round waits for, at least 3.
        seed: everything random in training is derived from it; masks are not.
        buffers: what becomes of running statistics.
        options: how updates are masked.
        save: where the server writes the common model's weights (safetensors) after each round.

    Raises:
        InputError: a method that needs individual replies, or too few clients to hide among.
    """
    check_summable(method)
    if clients < 3:
        raise InputError("clients", clients, "at least 3: of two each knows the other's update")
    training, options = training or Training(), options or SecureOptions()
    setup = Setup(method.adapted(task, training), training, buffers, seed)
    method.check(setup, 1)
    strategy = SecureStrategy(method, setup, clients, None if save is None else Path(save))
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        legacy = LegacyContext(context, ServerConfig(num_rounds=rounds), strategy)
        DefaultWorkflow(fit_workflow=options.workflow())(grid, legacy)

    leaf = Leaf(method, setup, seed)

    def member(context: Context) -> FlowerClient:
        path, client, folder = place_of(context, data, task, training.batch_size)
        return _Member(path, client, leaf, folder, options).to_client()

    return SecureApps(server, ClientApp(client_fn=member, mods=[secaggplus_mod]), strategy)


class _Member(NumPyClient):
    """A client that trains as ever, and hands its change to the protocol, which masks it."""

    def __init__(
        self, path: str, client: Client, leaf: Leaf, folder: Path, options: SecureOptions
    ) -> None:
        self._path, self._client, self._leaf = path, client, leaf
        self._folder, self._options = folder, options
        self._shape = _Shape(leaf.method, leaf.setup)

    def fit(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Train for a round; return what it changed, its weight, and nothing else.

        Raises:
            InputError: a change or a weight that the protocol would cut.
        """
        number, run = int(config["round"]), str(config["run"])
        if not _RUN.fullmatch(run):  # it names a folder here
            raise InputError("run", repr(run), "the name of a run")
        (sent,) = parameters
        store = DiskStore(self._folder / run, number - 1)
        worker = LeafWorker(self._path, self._client, self._leaf)
        reply, _ = worker.train(number, store, self._shape.message(sent))
        change, weight = self._shape.row(reply) - sent, int(reply.number("weight"))
        options, largest = self._options, float(np.abs(change).max())
        if not largest <= options.clipping_range:
            allowed = f"a clipping_range above it, not {options.clipping_range:g}"
            raise InputError(f"update of {self._path}", f"a change of {largest:.3g}", allowed)
        if weight > options.most_samples:
            allowed = f"most_samples above it, not {options.most_samples}"
            raise InputError(f"samples of {self._path}", weight, allowed)
        store.commit(number)
        # Flower hands on what stands in the third place as it is: no metrics of the training.
        return [change], weight, {}

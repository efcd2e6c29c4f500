"""A federation of one's own objects: a module, clients, a method."""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import nn

from hansa.data.clients import Client
from hansa.errors import InputError
from hansa.federation.engines.local import LocalEngine, RoundResult
from hansa.federation.history import History, tables_of
from hansa.federation.methods.base import Method
from hansa.federation.node import Setup
from hansa.federation.optimizer import Training
from hansa.federation.participation import Participation
from hansa.federation.store import Store
from hansa.federation.tree import ROOT, Tree, name_of
from hansa.models.task import Task


class Federation:
    """Clients that train a model together by a method.

    Example:
        >>> federation = Federation(net, clients, FedSelect(rate=0.05), Training(lr=0.1))
        >>> history = federation.run(rounds=20)
        >>> history.summary()["metrics"]["accuracy"]["mean"]
        >>> net_of_a = federation.model_of("ward-a")

    Args:
        model: a classifier that returns logits [batch, classes]. Its trainable parameters and its
            buffers are the initial values; frozen parameters stay as they are and never travel.
        clients: name -> what the client holds.
        method: the federated algorithm.
        training: optimizer and local work.
        seed: everything random in the run is derived from it.
        participation: who is asked, fails or is late.
        buffers: ``averaged``: running statistics travel; ``local``: each client keeps its own.
        tree: the federation's shape over the clients' names; flat by default.
        workers: processes that train clients.
        on_failure: whether a client whose loss is no number stops the run or is dropped.

    Raises:
        InputError: a model that does not fit the clients' inputs and labels, clients that are not
            the leaves of the tree, a method that is not defined on the tree or the model, or a
            BatchNorm that would see a batch of one.
    """

    def __init__(
        self,
        model: nn.Module,
        clients: Mapping[str, Client],
        method: Method,
        training: Training | None = None,
        *,
        seed: int = 0,
        participation: Participation | None = None,
        buffers: Literal["averaged", "local"] = "averaged",
        tree: Tree | None = None,
        workers: int = 1,
        on_failure: Literal["stop", "drop"] = "stop",
    ) -> None:
        self.tree = Tree.flat(clients) if tree is None else tree
        paths = {name_of(path): path for path in self.tree.leaves()}
        if paths.keys() != clients.keys():
            odd = ", ".join(sorted(paths.keys() ^ clients.keys())[:3])
            raise InputError("clients", f"{odd} in one of them only", "the leaves of the tree")
        if not isinstance(method, Method):
            raise InputError("method", repr(method), "a method such as FedAvg()")
        for key, value, allowed in (
            ("buffers", buffers, ("averaged", "local")),
            ("on_failure", on_failure, ("stop", "drop")),
        ):
            if value not in allowed:
                raise InputError(key, repr(value), " or ".join(allowed))
        _check_model(model, clients)
        self.setup = Setup(Task(model), training or Training(), buffers)
        method.check(self.setup, self.tree.depth)
        _check_batches(model, clients, self.setup.training.batch_size)
        self._paths = paths | {ROOT: ROOT}
        self._engine = LocalEngine(
            self.tree,
            {paths[name]: client for name, client in clients.items()},
            method,
            self.setup,
            seed,
            participation,
            workers,
            on_failure,
        )

    def rounds(self, last: int, first: int = 1, score_every: int = 1) -> Iterator[RoundResult]:
        """Run rounds ``first`` to ``last``, yielding each as it ends.

        Every ``score_every``-th round and the last one are scored; 0 scores the last one only.
        """
        with self._engine as engine:
            for number in range(first, last + 1):
                due = score_every > 0 and number % score_every == 0
                yield engine.round(number, score=due or number == last)

    def run(self, rounds: int, score_every: int = 1) -> History:
        """Run a number of rounds and return what they measured."""
        return History(tables_of(result) for result in self.rounds(rounds, score_every=score_every))

    def model_of(self, name: str) -> nn.Module:
        """Return the model that a client holds, or with ``root`` the common one.

        Raises:
            InputError: no such node.
        """
        if name not in self._paths:
            raise InputError("name", repr(name), f"one of {', '.join(self._paths)}")
        return self._engine.model_of(self._paths[name])

    def keep_states_in(self, store: Store) -> None:
        """Keep the nodes' states in a store, and go on from those that it holds."""
        self._engine.store = store


def _check_model(model: nn.Module, clients: Mapping[str, Client]) -> None:
    """Try the model on the clients' inputs, and their labels against the number of logits."""
    was = model.training
    model.eval()
    pools: dict[int, tuple[str, Client]] = {}
    for name, client in clients.items():
        pools.setdefault(id(client.inputs), (name, client))
    for name, client in pools.values():  # one client for all that share a pool
        try:
            with torch.no_grad():
                classes = model(client.batch("train")[0][:1]).shape[1]
        except Exception as error:  # a user's module may raise anything
            raise InputError(
                "model", f"{error} on {name}'s data", "a model of its inputs"
            ) from error
        highest = int(client.labels.max())
        if int(client.labels.min()) < 0 or highest >= classes:
            raise InputError(
                f"labels of {name}", f"up to {highest}", f"0 to {classes - 1}, one per logit"
            )
    model.train(was)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("model", "no trainable parameters", "some")


def _check_batches(model: nn.Module, clients: Mapping[str, Client], size: int) -> None:
    """Refuse batches of one sample for layers that normalise over the batch."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return
    for name, client in clients.items():
        if size == 1 or client.count("train") % size == 1:
            raise InputError(
                "training.batch_size",
                f"{size}, which leaves {name} with a batch of one of its "
                f"{client.count('train')} samples under BatchNorm",
                "a size that leaves no single sample, or a model with GroupNorm",
            )

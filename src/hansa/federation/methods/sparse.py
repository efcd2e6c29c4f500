"""The ground that methods with sparse training stand on: FedAvg of a sparsified model.

Parameters travel under the model's own names. The thresholds of sparse layers are neither sent nor
kept: they start anew in every round's local work. What is scored and exported are the weights that
count in evaluation, zeros included, so that the plain architecture gives the same numbers.
"""

import weakref
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from hansa.errors import InputError
from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods.base import Inner, Work, begin_work
from hansa.federation.methods.fedavg import FedAvg, Groups
from hansa.federation.node import Node, Reply, Setup
from hansa.federation.optimizer import Training
from hansa.federation.server import ServerOptimizer
from hansa.federation.tree import ROOT
from hansa.sparse.convert import SparseModel
from hansa.sparse.kernels import kernels


class SparseTraining(FedAvg):
    """FedAvg of a model whose convolutions and linear layers train sparsely."""

    inner: ClassVar[Inner | None] = None
    alone: ClassVar[str] = "its replies are sparse, and whatever hides them makes them dense"
    sparse: tuple[str, ...] | None = None
    """Patterns of the names of layers that train sparsely; by default as in the method's paper."""
    refresh: int = Field(10, ge=1, strict=True)
    """Local steps between new thresholds."""
    path: Literal["auto", "kernels", "reference"] = "auto"
    """How sparse layers are computed: by compiled kernels, by PyTorch, or by what is faster."""
    server: ServerOptimizer = ServerOptimizer()
    """What the root makes of the mean of its replies."""

    @abstractmethod
    def sparsified(self, model: nn.Module, batch_size: int) -> SparseModel:
        """Return a model whose layers train sparsely, under the same names."""

    @abstractmethod
    def evaluated(self, setup: Setup, weights: Tensors) -> dict[str, torch.Tensor]:
        """Return what counts in evaluation of the trained weights of sparse layers."""

    def adapt(self, model: nn.Module, training: Training) -> SparseModel:
        """Return the model with sparse layers.

        Raises:
            InputError: an option that does not fit the model.
        """
        try:
            adapted = self.sparsified(model, training.batch_size)
        except InputError as error:
            key = f"method.{error.key}" if error.key in type(self).model_fields else error.key
            raise InputError(key, error.found, error.allowed) from error
        for layer in adapted.sparse_layers.values():
            if not layer.weight.requires_grad:  # part of the recipe: what counts of it is fixed
                layer.weight.data = layer.masked().detach().clone()
        return adapted

    def check(self, setup: Setup, depth: int) -> None:
        """Refuse a task of a model that was not adapted."""
        super().check(setup, depth)
        if not isinstance(setup.task.module, SparseModel):
            raise InputError("task", "a dense model", f"{type(self).__name__}().adapted(task, ...)")

    def one_by_one(self, setup: Setup) -> str:
        """Return why: the kernels know nothing of stacks."""
        if self.path == "reference" or kernels() is None:
            return ""
        exact = all(setup.task.params[name].dtype is torch.float32 for name in self.weights(setup))
        return "compiled kernels of sparse layers" if exact else ""

    def weights(self, setup: Setup) -> tuple[str, ...]:
        """Return the names of the parameters that are weights of sparse layers."""
        module = _module(setup)
        # A tied weight goes by its first name.
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        found = (names[id(layer.weight)] for layer in module.sparse_layers.values())
        return tuple(name for name in dict.fromkeys(found) if name in setup.task.params)

    def shared(self, setup: Setup) -> Groups:
        """Return what travels: parameters, and buffers without thresholds."""
        groups = super().shared(setup)
        return {**groups, "buffers": _without_thresholds(setup, groups["buffers"])}

    def receive(self, node: Node, state: State, down: Message) -> State:
        """Return the whole model, without thresholds."""
        received = super().receive(node, state, down)
        buffers = _without_thresholds(node.setup, received.group("buffers"))
        return State({**received.groups, "buffers": buffers}, received.scalars)

    def begin(self, node: Node, state: State) -> Work:
        """Return work that starts from the received model, with thresholds to be found."""
        buffers = {**node.setup.task.buffers, **state.group("buffers")}
        return begin_work(node.setup, state.group("model"), buffers)

    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return what stays at the client, and the trained model with its weight."""
        buffers = _without_thresholds(node.setup, work["buffers"])
        return super().end(node, state, {**work, "buffers": buffers})

    def aggregate(self, node: Node, state: State, replies: Iterable[Reply]) -> State:
        """Return the state after merging the replies, and at the root after the server's step."""
        after = self.merge(node, state, replies)
        if node.path != ROOT or not after.number("weight"):
            return after
        return self.server.stepped(state, after)

    def merge(self, node: Node, state: State, replies: Iterable[Reply]) -> State:
        """Return the state with the mean of the replies."""
        return super().aggregate(node, state, replies)

    def model(self, setup: Setup, state: State) -> tuple[Tensors, Tensors]:
        """Return the model as it counts in evaluation."""
        params, buffers = super().model(setup, state)
        weights = {name: params[name] for name in self.weights(setup)}
        # All clients are scored with what they received: the same tensors, over and over.
        counts = _last.of(
            (self, self.is_dense(state)), weights, lambda: self._counts(setup, weights, state)
        )
        return {**params, **counts}, _without_thresholds(setup, buffers)

    def trained(self, setup: Setup, work: Work) -> tuple[Tensors, Tensors]:
        """Return the model that work holds, as it counts in evaluation."""
        weights = {name: work["params"][name] for name in self.weights(setup)}
        buffers = _without_thresholds(setup, work["buffers"])
        return {**work["params"], **self.evaluated(setup, weights)}, buffers

    def is_dense(self, state: State) -> bool:
        """Tell whether a state's model is evaluated with all its weights."""
        return False

    def dense(self, weights: Tensors) -> dict[str, torch.Tensor]:
        """Return the weights of sparse layers as they are evaluated with all of them."""
        return dict(weights)

    def _counts(self, setup: Setup, weights: Tensors, state: State) -> dict[str, torch.Tensor]:
        return self.dense(weights) if self.is_dense(state) else self.evaluated(setup, weights)

    def nonzero(self, setup: Setup, state: State) -> dict[str, tuple[float, float]]:
        """Return the share of the root's sparse weights that are not zero, once there are any."""
        if "weight" not in state.scalars:  # which only an aggregation leaves
            return {}
        weights = [state.group("model")[name] for name in self.weights(setup)]
        filled = sum(int(weight.count_nonzero()) for weight in weights)
        return {"nonzero": (float(filled), float(sum(weight.numel() for weight in weights)))}


class _Last:
    """The last result of a function of tensors, for calls with the very same ones."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._tensors: dict[str, weakref.ref[torch.Tensor]] = {}
        self._made: dict[str, torch.Tensor] = {}

    def of(
        self, key: Hashable, tensors: Tensors, make: Callable[[], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Return what ``make`` makes of the tensors, or made of them just before."""
        held = self._tensors
        if key != self._key or held.keys() != tensors.keys() or not tensors:
            found = False
        else:
            found = all(held[name]() is tensor for name, tensor in tensors.items())
        if not found:
            self._made, self._key = make(), key
            self._tensors = {name: weakref.ref(tensor) for name, tensor in tensors.items()}
        return self._made


_last = _Last()


def _module(setup: Setup) -> SparseModel:
    module: Any = setup.task.module
    return module  # type: ignore[no-any-return]


def _without_thresholds(setup: Setup, buffers: Tensors) -> dict[str, torch.Tensor]:
    thresholds = frozenset(_module(setup).thresholds)
    return {name: tensor for name, tensor in buffers.items() if name not in thresholds}

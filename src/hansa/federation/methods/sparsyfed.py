"""SparsyFed: weights that training itself drives towards zero, pruned before they are sent.

Guastella et al., "SparsyFed: Sparse Adaptive Federated Training", ICLR 2025 (arXiv 2504.05153).
The re-parameterisation is Powerpropagation (Schwarz et al., NeurIPS 2021):

    w = sign(v) abs(v)^beta,    dL/dv = beta abs(v)^(beta - 1) dL/dw
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods.base import Work, moved
from hansa.federation.methods.sparse import SparseTraining
from hansa.federation.node import Child, Node, Reply, Setup
from hansa.models.task import Batch
from hansa.sparse.convert import SparseModel, sparsify
from hansa.sparse.thresholds import keep, threshold


class SparsyFed(SparseTraining):
    """FedAvg on Powerpropagation's parameters, pruned over all layers together after training.

    Training uses weights as they are, dense in the first round; of each layer's inputs as many
    are left out of the weight's gradient as the layer has zeros. The parameters v travel. With
    beta > 1 an entry that is zero has no gradient: within a client nothing grows back, and what
    one client pruned comes back by the mean over the others.
    """

    name: ClassVar[str] = "sparsyfed"
    sparsity: float = Field(0.95, ge=0, lt=1, strict=True)
    """Share of all sparse layers' weights together that is pruned before they are sent."""
    beta: float = Field(1.25, ge=1, allow_inf_nan=False, strict=True)
    """Exponent of the re-parameterisation; 1 leaves weights as they are."""

    def sparsified(self, model: nn.Module, batch_size: int) -> SparseModel:
        """Return the model with layers as sparse as their weights are, by default all layers."""
        return sparsify(
            model,
            None,
            sparse=self.sparse or ("*",),
            refresh=self.refresh,
            path=self.path,
            batch_size=batch_size,
        )

    def start_root(self, node: Node) -> State:
        """Return the initial model, as its parameters v = sign(w) abs(w)^(1 / beta)."""
        start = super().start_root(node)
        model = start.group("model")
        v = {n: _signed_power(model[n], 1 / self.beta) for n in self.weights(node.setup)}
        return State({**start.groups, "model": {**model, **v}})

    def receive(self, node: Node, state: State, down: Message) -> State:
        """Return the whole model, and whether it was pruned yet."""
        return State(super().receive(node, state, down).groups, down.scalars)

    def step(self, setup: Setup, work: Work, batch: Batch, phase: str) -> Work:
        """Return the work after a step of v along the gradient by the chain rule."""
        names = self.weights(setup)
        params = work["params"]
        weights = {**params, **self.dense({name: params[name] for name in names})}
        gradients, buffers, metrics = setup.task.gradients(weights, work["buffers"], batch)
        for name in names:
            gradient = gradients[name]
            if gradient is not None:
                slope = self.beta * params[name].abs().pow(self.beta - 1)
                gradients[name] = gradient * slope
        return moved(setup, work, gradients, buffers, metrics, phase)

    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return what stays at the client, and the pruned parameters with their weight."""
        after, reply = super().end(node, state, work)
        model = reply.group("model")
        pruned = self._pruned({name: model[name] for name in self.weights(node.setup)})
        groups = {**reply.groups, "model": {**model, **pruned}}
        return after, Message(groups, reply.scalars, reply.metrics)

    def dispatch(
        self, node: Node, state: State, children: Iterable[Child]
    ) -> Iterator[tuple[str, Message]]:
        """Yield the same message to every child: the model, and whether it was pruned yet."""
        scalars = {} if self.is_dense(state) else {"pruned": True}
        last, sent = Message(), Message()
        for path, down in super().dispatch(node, state, children):
            if down is not last:
                last, sent = down, Message(down.groups, scalars)
            yield path, sent

    def merge(self, node: Node, state: State, replies: Iterable[Reply]) -> State:
        """Return the state with the mean of the replies."""
        after = super().merge(node, state, replies)
        if self.is_dense(state) and not after.number("weight"):
            return after
        return State(after.groups, {**after.scalars, "pruned": True}, after.metrics)

    def evaluated(self, setup: Setup, weights: Tensors) -> dict[str, torch.Tensor]:
        """Return the weights w of the largest parameters of all layers together, and zeros."""
        return self.dense(self._pruned(weights))

    def is_dense(self, state: State) -> bool:
        """Tell whether the model is still the initial one, that nobody has pruned."""
        return not state.scalars.get("pruned")

    def dense(self, weights: Tensors) -> dict[str, torch.Tensor]:
        """Return the weights w of parameters v."""
        return {name: _signed_power(v, self.beta) for name, v in weights.items()}

    def describe(self, setup: Setup, state: State) -> dict[str, tuple[float, float]]:
        """Return at the root ``nonzero``, what is not zero of the aggregated sparse layers."""
        return self.nonzero(setup, state)

    def _pruned(self, weights: Tensors) -> dict[str, torch.Tensor]:
        if not weights:
            return {}
        row = torch.cat([tensor.flatten() for tensor in weights.values()])
        least = threshold(row, self.sparsity)
        return {name: torch.where(keep(t, least), t, 0.0) for name, t in weights.items()}


def _signed_power(tensor: torch.Tensor, exponent: float) -> torch.Tensor:
    return tensor.sign() * tensor.abs().pow(exponent)

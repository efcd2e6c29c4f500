"""ProsPr: what each weight means for the loss after a few steps of training.

Alizadeh et al., "Prospect Pruning: Finding Trainable Weights at Initialization using
Meta-Gradients", ICLR 2022, arXiv 2202.08132.

With P the weights, c the mask, w_0 = c P, M inner steps of SGD on batches B_0..B_{M-1} and an outer
loss on B_M, the score of a weight is |dL(w_M; B_M) / dc| at c = 1, which is |P lambda_0| with
lambda_0 = dL(w_M; B_M) / dw_0.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from hansa.models.derivatives import derivatives
from hansa.models.task import Tensors
from hansa.pruning.objective import Batch, Objective
from hansa.pruning.scorer import GradientScorer


class ProsPr(GradientScorer):
    """The meta-gradient, exact or to first order.

    The exact one goes forward once, keeping nothing but the M weight vectors, and then backward
    with one Hessian-vector product a step, so its memory does not grow with M. All parameters
    move in the inner steps, biases and normalisation included.
    """

    name: ClassVar[str] = "prospr"
    inner_steps: int = Field(3, ge=0, strict=True)
    """Inner steps M; 0 is SNIP."""
    inner_lr: float = Field(0.1, gt=0)
    """Rate of the inner steps."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum of the inner steps, differentiated as well."""
    order: Literal["exact", "unrolled", "first"] = "exact"
    """``exact``; ``unrolled``, the same by one autograd graph over all steps, whose memory grows
    with M; or ``first``, without second derivatives."""
    batches: Literal["fresh", "one"] = "fresh"
    """A batch of its own for each inner step and the outer loss, or one for all of them."""
    first_step: Literal["exact", "official"] = "exact"
    """``official`` drops the first step's curvature where there is momentum, as the authors'
    program does."""

    @property
    def num_batches(self) -> int:
        """Batches that one scoring takes."""
        return self.inner_steps + 1 if self.batches == "fresh" else 1

    def derivative(self, objective: Objective, batches: Sequence[Batch]) -> Tensors:
        """Return lambda_0 for every trainable parameter."""
        used = list(batches) if self.batches == "fresh" else [batches[0]] * (self.inner_steps + 1)
        if self.order == "unrolled":
            return self._unrolled(objective, used)
        points, last = self._forward(objective, used)
        outer = objective.gradient(last, used[-1], self.inner_steps)
        return outer if self.order == "first" else self._back(objective, used, points, outer)

    def _forward(
        self, objective: Objective, batches: Sequence[Batch]
    ) -> tuple[list[Tensors], Tensors]:
        """Return the points w_0..w_{M-1} of the inner steps, and w_M."""
        params: Tensors = objective.params
        points = []
        buffer: Tensors = {}
        for step in range(self.inner_steps):
            points.append(params)
            buffer = self.push(buffer, objective.gradient(params, batches[step], step))
            params = {name: p - self.inner_lr * buffer[name] for name, p in params.items()}
        return points, params

    def _back(
        self,
        objective: Objective,
        batches: Sequence[Batch],
        points: Sequence[Tensors],
        derivative: Tensors,
    ) -> Tensors:
        """Return lambda_0 from lambda_M."""
        carried: Tensors = {}
        for step in reversed(range(self.inner_steps)):
            vector = self.vector(carried, derivative)
            if step or not self.momentum or self.first_step == "exact":
                curved = objective.product(points[step], vector, batches[step], step)
                derivative = {name: d + curved[name] for name, d in derivative.items()}
            carried = self.carry(vector)
        return derivative

    def push(self, buffer: Tensors, gradient: Tensors) -> Tensors:
        """Return b = m b + g."""
        if not buffer or not self.momentum:
            return gradient
        return {name: self.momentum * buffer[name] + g for name, g in gradient.items()}

    def vector(self, carried: Tensors, derivative: Tensors) -> Tensors:
        """Return t = mu - a lambda, which the step's Hessian multiplies.

        The adjoint of b' = m b + g(w), w' = w - a b' is: t = mu - a lambda;
        lambda <- lambda + H t; mu <- m t.
        """
        return {
            name: (carried[name] if carried else 0.0) - self.inner_lr * d
            for name, d in derivative.items()
        }

    def carry(self, vector: Tensors) -> Tensors:
        """Return mu = m t for the step before."""
        return {name: self.momentum * t for name, t in vector.items()} if self.momentum else {}

    def _unrolled(self, objective: Objective, batches: Sequence[Batch]) -> Tensors:
        start = {name: p.detach().requires_grad_() for name, p in objective.params.items()}
        leaves = list(start.values())
        params: Tensors = start
        buffer: Tensors = {}
        for step in range(self.inner_steps):
            loss = objective.loss(params, batches[step], step)
            gradients = derivatives(loss, list(params.values()), create_graph=True)
            gradient = dict(zip(params, gradients, strict=True))
            if step == 0 and self.momentum and self.first_step == "official":
                gradient = {name: g.detach() for name, g in gradient.items()}
            buffer = self.push(buffer, gradient)
            params = {name: p - self.inner_lr * buffer[name] for name, p in params.items()}
        outer = objective.loss(params, batches[-1], self.inner_steps)
        return dict(zip(start, derivatives(outer, leaves), strict=True))

"""What the root makes of the mean of its replies: the next model, by an optimizer of its own.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295), Algorithm 2.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hansa.federation.message import State, Tensors

Moments = dict[str, dict[str, torch.Tensor]]


class ServerOptimizer(BaseModel):
    """How the root steps from its model w_t along the pseudo-gradient D = mean - w_t.

    ``average``: w_{t+1} = mean, as in FedAvg. ``fedadam``, without a correction of the bias::

        m <- b1 m + (1 - b1) D           from m = 0
        v <- b2 v + (1 - b2) D^2         from v = tau^2
        w_{t+1} = w_t + lr m / (sqrt(v) + tau)

    ``nesterov``, the outer step of DiLoCo (Douillard et al. 2023, arXiv 2311.08105, Algorithm 1)::

        m <- momentum m + D              from m = 0
        w_{t+1} = w_t + lr (D + momentum m)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["average", "fedadam", "nesterov"] = "average"
    lr: float = Field(0.1, gt=0, allow_inf_nan=False, strict=True)
    """Learning rate of ``fedadam`` and ``nesterov``."""
    momentum: float = Field(0.9, ge=0, lt=1, strict=True)
    """Momentum of ``nesterov``; 0 leaves a plain step of ``lr``."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of its two moments."""
    tau: float = Field(1e-3, gt=0, allow_inf_nan=False, strict=True)
    """Added to the denominator; its square is where the second moment starts."""

    @model_validator(mode="after")
    def _fits(self) -> "ServerOptimizer":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must lie in [0, 1)")
        return self

    def step(
        self, before: Tensors, mean: Tensors, moments: Moments
    ) -> tuple[dict[str, torch.Tensor], Moments]:
        """Return the next model, and the moments.

        Args:
            before: name -> parameter of the model that the clients were sent.
            mean: name -> what their replies make of it.
            moments: what the previous step returned, at first nothing.
        """
        if self.kind == "average":
            return dict(mean), {}
        if self.kind == "nesterov":
            return self._nesterov(before, mean, moments)
        first, second, model = {}, {}, {}
        b1, b2 = self.betas
        for name, old in before.items():
            change = mean[name] - old
            m = moments["first"][name] if moments else torch.zeros_like(old)
            v = moments["second"][name] if moments else torch.full_like(old, self.tau**2)
            first[name] = b1 * m + (1 - b1) * change
            second[name] = b2 * v + (1 - b2) * change**2
            model[name] = old + self.lr * first[name] / (second[name].sqrt() + self.tau)
        return model, {"first": first, "second": second}

    def stepped(self, before: State, after: State) -> State:
        """Return a state with the next model in the place of its replies' mean.

        Args:
            before: the state that holds the model the clients were sent, and the moments.
            after: the state that holds the mean.
        """
        old, mean = before.group("model"), after.group("model")
        held = {n: t for n, t in old.items() if n in mean}
        model, moments = self.step(held, mean, moments_of(before))
        groups = {**after.groups, "model": model, **as_groups(moments)}
        return State(groups, after.scalars, after.metrics)

    def _nesterov(
        self, before: Tensors, mean: Tensors, moments: Moments
    ) -> tuple[dict[str, torch.Tensor], Moments]:
        momentum, model = {}, {}
        for name, old in before.items():
            change = mean[name] - old
            held = moments["momentum"][name] if moments else torch.zeros_like(old)
            momentum[name] = self.momentum * held + change
            model[name] = old + self.lr * (change + self.momentum * momentum[name])
        return model, {"momentum": momentum}


def moments_of(state: State) -> Moments:
    """Return the moments that a state holds."""
    start = "server."
    return {
        group.removeprefix(start): dict(tensors)
        for group, tensors in state.groups.items()
        if group.startswith(start)
    }


def as_groups(moments: Moments) -> dict[str, Tensors]:
    """Return moments as groups of a state."""
    return {f"server.{part}": tensors for part, tensors in moments.items()}

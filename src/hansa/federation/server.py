"""What the root makes of the mean of its replies: the next model, by an optimizer of its own.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295), Algorithm 2.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hansa.federation.message import Tensors

Moments = dict[str, dict[str, torch.Tensor]]


class ServerOptimizer(BaseModel):
    """How the root steps from its model w_t along the pseudo-gradient D = mean - w_t.

    ``average``: w_{t+1} = mean, as in FedAvg. ``fedadam``, without a correction of the bias::

        m <- b1 m + (1 - b1) D           from m = 0
        v <- b2 v + (1 - b2) D^2         from v = tau^2
        w_{t+1} = w_t + lr m / (sqrt(v) + tau)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["average", "fedadam"] = "average"
    lr: float = Field(0.1, gt=0, allow_inf_nan=False, strict=True)
    """Learning rate of ``fedadam``."""
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

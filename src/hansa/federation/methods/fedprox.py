"""FedProx: local training held near the received model by a proximal term.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, Algorithm 2.
"""

from typing import ClassVar

from pydantic import Field

from hansa.federation.message import State
from hansa.federation.methods.base import Work, train_step
from hansa.federation.methods.fedavg import FedAvg
from hansa.federation.node import Node, Setup
from hansa.models.task import Batch


class FedProx(FedAvg):
    """FedAvg whose local objective is F_k(w) + mu / 2 * ||w - w_received||^2."""

    name: ClassVar[str] = "fedprox"
    mu: float = Field(0.01, ge=0, allow_inf_nan=False, strict=True)
    """Weight of the proximal term; 0 is FedAvg."""

    def begin(self, node: Node, state: State) -> Work:
        """Return work that remembers where it started."""
        return super().begin(node, state) | {"start": dict(state.group("model"))}

    def step(self, setup: Setup, work: Work, batch: Batch, phase: str) -> Work:
        """Return the work after a step on the loss plus the proximal term."""
        params, start = work["params"], work["start"]
        pull = {name: self.mu * (params[name] - start[name]) for name in params}
        return train_step(setup, work, batch, phase, pull=pull)

"""LG-FedAvg: local bodies under a common head, the reverse of FedPer.

Liang et al., "Think Locally, Act Globally: Federated Learning with Local and Global
Representations", 2020 (arXiv 2001.01523), Algorithm 1. The paper starts from a model that FedAvg
trained first; to do so, give a bundle of such a run as ``model.bundle``.
"""

from typing import ClassVar

from hansa.federation.methods.base import Inner, Scored
from hansa.federation.methods.fedavg import FedAvg, Groups
from hansa.federation.methods.layers import check_patterns, head
from hansa.federation.node import Setup


class LGFedAvg(FedAvg):
    """FedAvg on the head of the model; the body is trained locally and kept."""

    name: ClassVar[str] = "lg-fedavg"
    inner: ClassVar[Inner | None] = None
    shared_layers: tuple[str, ...] | None = None
    """Patterns of parameter names that are shared, such as ``head.*``; by default those of the
    last layer that has parameters."""
    scored: ClassVar[Scored] = "trained"
    common: ClassVar[bool] = False

    def own(self, setup: Setup) -> frozenset[str]:
        """Return the names of the body's parameters."""
        return frozenset(setup.task.params) - head(setup.task.params, self.shared_layers)

    def shared(self, setup: Setup) -> Groups:
        """Return the head; running statistics belong to the local bodies."""
        return {**super().shared(setup), "buffers": {}}

    def check(self, setup: Setup, depth: int) -> None:
        """Refuse patterns that fit no parameter."""
        super().check(setup, depth)
        check_patterns("method.shared_layers", setup.task.params, self.shared_layers)

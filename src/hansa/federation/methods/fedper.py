"""FedPer: a shared body, and a head that never leaves its client.

Arivazhagan et al., "Federated Learning with Personalization Layers", 2019 (arXiv 1912.00818),
Algorithms 1 and 2.
"""

from typing import ClassVar

from hansa.federation.methods.base import Scored
from hansa.federation.methods.fedavg import FedAvg
from hansa.federation.methods.layers import check_patterns, head
from hansa.federation.node import Setup


class FedPer(FedAvg):
    """FedAvg on the body of the model; the personal layers are trained locally and kept."""

    name: ClassVar[str] = "fedper"
    personal: tuple[str, ...] | None = None
    """Patterns of parameter names that stay local, such as ``head.*``; by default those of the
    last layer that has parameters."""
    scored: ClassVar[Scored] = "trained"

    def own(self, setup: Setup) -> frozenset[str]:
        """Return the names of the personal layers' parameters."""
        return head(setup.task.params, self.personal)

    def check(self, setup: Setup, depth: int) -> None:
        """Refuse patterns that fit no parameter."""
        super().check(setup, depth)
        check_patterns("method.personal", setup.task.params, self.personal)

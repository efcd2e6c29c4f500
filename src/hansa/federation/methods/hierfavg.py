"""HierFAVG: averages below averages, several inner rounds for each outer one.

Liu et al., "Client-Edge-Cloud Hierarchical Federated Learning", ICC 2020 (arXiv 1905.06641),
Algorithm 1.
"""

from typing import ClassVar

from pydantic import Field

from hansa.errors import InputError
from hansa.federation.methods.base import Inner
from hansa.federation.methods.fedavg import FedAvg
from hansa.federation.node import Setup


class HierFAVG(FedAvg):
    """FedAvg on a tree, where every inner node averages its children more often than the root.

    The paper's inner nodes hold no data. One that does trains on it before it asks its children,
    who start from there.
    """

    name: ClassVar[str] = "hierfavg"
    inner: ClassVar[Inner | None] = "before"
    inner_rounds: int = Field(1, ge=1, strict=True)
    """Rounds of an inner node below the root for each round of the root (kappa_2)."""

    def check(self, setup: Setup, depth: int) -> None:
        """Refuse a learning rate that falls from round to round, where rounds have rounds below.

        Raises:
            InputError: ``lr_end`` with several inner rounds.
        """
        super().check(setup, depth)
        if self.inner_rounds > 1 and setup.training.lr_end is not None:
            raise InputError(
                "training.lr_end",
                f"{setup.training.lr_end} with {self.inner_rounds} inner rounds",
                "nothing, or method.inner_rounds = 1",
            )

    def turns(self) -> int:
        """Return how often an inner node below the root asks its children in a round."""
        return self.inner_rounds

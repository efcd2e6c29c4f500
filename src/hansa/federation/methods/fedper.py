"""FedPer: a shared body, and a head that never leaves its client.

Arivazhagan et al., "Federated Learning with Personalization Layers", 2019 (arXiv 1912.00818),
Algorithms 1 and 2.
"""

from fnmatch import fnmatchcase
from typing import ClassVar

from hansa.errors import InputError
from hansa.federation.methods.base import Scored
from hansa.federation.methods.fedavg import FedAvg
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
        names = list(setup.task.params)
        if self.personal is None:
            last = names[-1].rpartition(".")[0]
            return frozenset(name for name in names if name.rpartition(".")[0] == last)
        return frozenset(n for n in names if any(fnmatchcase(n, p) for p in self.personal))

    def check(self, setup: Setup, depth: int) -> None:
        """Refuse patterns that fit no parameter."""
        super().check(setup, depth)
        for pattern in self.personal or ():
            if not any(fnmatchcase(name, pattern) for name in setup.task.params):
                names = ", ".join(setup.task.params)
                raise InputError("method.personal", repr(pattern), f"patterns of these: {names}")

"""Centralised training: all data in one place, which a federation exists to avoid. A reference."""

from typing import ClassVar

from hansa.errors import InputError
from hansa.federation.methods.base import Inner
from hansa.federation.methods.fedavg import FedAvg
from hansa.federation.node import Setup


class Centralised(FedAvg):
    """One model on all nodes' training data together, for as many steps as all of them make.

    Every node is scored with that one model. Raw data leave their nodes here and nowhere else. A
    node's own learning rate and participation have no meaning here.
    """

    name: ClassVar[str] = "centralised"
    alone: ClassVar[str] = "it pools the data, and there are no replies"
    inner: ClassVar[Inner | None] = None
    max_depth: ClassVar[int | None] = 1
    pools: ClassVar[bool] = True
    averages: ClassVar[bool] = False

    def check(self, setup: Setup, depth: int) -> None:
        """Refuse running statistics that would stay where the data are pooled."""
        super().check(setup, depth)
        if setup.buffers == "local" and setup.task.buffers:
            raise InputError("model.buffers", f"'local' with method {self.name!r}", "'averaged'")

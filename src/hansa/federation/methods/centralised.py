"""Centralised training: all data in one place, which a federation exists to avoid. A reference."""

from typing import ClassVar

from hansa.federation.methods.base import Inner
from hansa.federation.methods.fedavg import FedAvg


class Centralised(FedAvg):
    """One model on all nodes' training data together, for as many steps as all of them make.

    Every node is scored with that one model. Raw data leave their nodes here and nowhere else.
    """

    name: ClassVar[str] = "centralised"
    inner: ClassVar[Inner | None] = None
    max_depth: ClassVar[int | None] = 1
    pools: ClassVar[bool] = True

"""DiLoCo: many local steps of AdamW, and an outer step with Nesterov momentum.

Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023 (arXiv
2311.08105), Algorithm 1.
"""

from collections.abc import Iterable
from typing import ClassVar

from hansa.federation.message import State
from hansa.federation.methods.fedavg import FedAvg
from hansa.federation.node import Node, Reply
from hansa.federation.server import ServerOptimizer
from hansa.federation.tree import ROOT


class DiLoCo(FedAvg):
    """FedAvg whose root steps along the mean change by an optimizer of its own.

    The inner optimizer is the run's: AdamW in the paper. Its moments are reset at each round, where
    the paper's workers keep them.
    """

    name: ClassVar[str] = "diloco"
    server: ServerOptimizer = ServerOptimizer(kind="nesterov", lr=0.7, momentum=0.9)
    """The outer step; the paper's by default."""

    def aggregate(self, node: Node, state: State, replies: Iterable[Reply]) -> State:
        """Return the state after merging the replies, and at the root after the outer step."""
        after = super().aggregate(node, state, replies)
        if node.path != ROOT or not after.number("weight"):
            return after
        return self.server.stepped(state, after)

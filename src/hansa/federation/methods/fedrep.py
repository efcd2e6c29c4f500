"""FedRep: fit the head to the common body, then move the body under the fitted head.

Collins et al., "Exploiting Shared Representations for Personalized Federated Learning", ICML 2021
(arXiv 2102.07078), Algorithm 1.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from hansa.federation.message import State
from hansa.federation.methods.base import Inner, Work, train_step
from hansa.federation.methods.fedper import FedPer
from hansa.federation.node import Node, Setup
from hansa.models.task import Batch


class FedRep(FedPer):
    """FedPer whose local work is split: epochs that move only the head, then only the body."""

    name: ClassVar[str] = "fedrep"
    inner: ClassVar[Inner | None] = None
    head_epochs: int | None = Field(None, ge=1, strict=True)
    """Epochs of the head; by default as many as in a round."""
    body_epochs: int = Field(1, ge=1, strict=True)
    """Epochs of the body after them."""

    def begin(self, node: Node, state: State) -> Work:
        """Return work that knows where the head is."""
        own = self.own(node.setup)
        is_head = {n: torch.tensor(n in own) for n in node.setup.task.params}
        return super().begin(node, state) | {"head": is_head}

    def stages(self, node: Node, work: Work, epochs: int) -> Sequence[tuple[str, int]]:
        """Return the head's epochs and the body's."""
        return (("head", self.head_epochs or epochs), ("train", self.body_epochs))

    def phases(self, work: Work, stage: str) -> Sequence[str]:
        """Return the one pass of an epoch."""
        return ("head",) if stage == "head" else ("body",)

    def step(self, setup: Setup, work: Work, batch: Batch, phase: str) -> Work:
        """Return the work after a step of the head, or of the body."""
        is_head = work["head"]
        free = is_head if phase == "head" else {n: ~held for n, held in is_head.items()}
        return train_step(setup, work, batch, phase, mask=free)

    def passes(self, setup: Setup) -> int:
        """Return the epochs of both."""
        return (self.head_epochs or setup.training.epochs) + self.body_epochs

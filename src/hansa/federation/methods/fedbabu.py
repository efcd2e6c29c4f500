"""FedBABU: train and share the body only; clients fine-tune when training is over.

Oh et al., "FedBABU: Toward Enhanced Representation for Federated Image Classification", ICLR 2022
(arXiv 2106.06042), Algorithm 1.
"""

from typing import ClassVar

import torch
from pydantic import Field

from hansa.federation.message import State
from hansa.federation.methods.base import Inner, Scored, Work, begin_work, train_step
from hansa.federation.methods.fedper import FedPer
from hansa.federation.methods.layers import check_patterns, head
from hansa.federation.node import Node, Setup
from hansa.models.task import Batch


class FedBABU(FedPer):
    """FedAvg under a head that stays as it was initialised, scored after fine-tuning it all."""

    name: ClassVar[str] = "fedbabu"
    inner: ClassVar[Inner | None] = None
    epochs: int | None = Field(None, ge=1, strict=True)
    """Epochs of fine-tuning; by default as many as in a round."""
    tuned: tuple[str, ...] = ("*",)
    """Patterns of the parameters that fine-tuning moves; the whole model by default."""
    scored: ClassVar[Scored] = "tuned"

    def check(self, setup: Setup, depth: int) -> None:
        """Refuse patterns that fit no parameter."""
        super().check(setup, depth)
        check_patterns("method.tuned", setup.task.params, self.tuned)

    def begin(self, node: Node, state: State) -> Work:
        """Return work that moves the body only."""
        return self._work(node, state, frozenset(node.setup.task.params) - self.own(node.setup))

    def tune(self, node: Node, state: State) -> Work:
        """Return work that moves what fine-tuning is to move."""
        return self._work(node, state, head(node.setup.task.params, self.tuned))

    def _work(self, node: Node, state: State, free: frozenset[str]) -> Work:
        mask = {n: torch.tensor(n in free) for n in node.setup.task.params}
        return begin_work(node.setup, state.group("model"), state.group("buffers"), mask=mask)

    def step(self, setup: Setup, work: Work, batch: Batch, phase: str) -> Work:
        """Return the work after a step of what may move."""
        return train_step(setup, work, batch, phase, mask=work["mask"])

    def tune_epochs(self, setup: Setup) -> int:
        """Return the chosen epochs, or those of a round."""
        return self.epochs or setup.training.epochs

"""FedAvg with fine-tuning: the baseline that personalised methods have to beat.

The common model is trained as in FedAvg; each client is scored after it has trained a copy of the
model on its own data. Nothing of the fine-tuning travels or stays.
"""

from typing import ClassVar

from pydantic import Field

from hansa.federation.methods.base import Scored
from hansa.federation.methods.fedavg import FedAvg
from hansa.federation.node import Setup


class FedAvgTuned(FedAvg):
    """FedAvg, scored after local fine-tuning."""

    name: ClassVar[str] = "fedavg-tuned"
    epochs: int | None = Field(None, ge=1, strict=True)
    """Epochs of fine-tuning; by default as many as in a round."""
    scored: ClassVar[Scored] = "tuned"

    def tune_epochs(self, setup: Setup) -> int:
        """Return the chosen epochs, or those of a round."""
        return self.epochs or setup.training.epochs

"""Entropy of what the model says about restricted text, raised without any attack in between.

After a first phase, and for as many plain steps as TAR costs, it is the control that shows what
TAR's inner loop adds.
"""

from typing import Literal

from pydantic import Field

from hansa.safeguard.losses import entropy
from hansa.safeguard.phases.base import Phase, retain
from hansa.safeguard.setup import Advance, Metrics, Setup


class MaxEntropy(Phase):
    """TAR's two losses with no inner loop (K = 0)."""

    kind: Literal["max_entropy"] = "max_entropy"
    weight: float = Field(4.0, ge=0, allow_inf_nan=False)
    """What the entropy counts beside what is kept."""
    representations: bool = True
    """Whether hidden states of retained text are held."""

    def begin(self, setup: Setup) -> Advance:
        """Return a step on retained and on restricted text."""

        def advance(step: int) -> Metrics:
            kept = retain(setup, self.batch_size, step, representations=self.representations)
            rows = setup.rows("forget", self.batch_size, step)
            found = entropy(setup.run(rows).logits, rows)
            (-self.weight * found).backward()
            return {**kept, "entropy": found.item()}

        return advance

    def step_cost(self) -> float:
        """Return 2, and a third more for the reference's forward pass."""
        return 2 + self.representations / 3

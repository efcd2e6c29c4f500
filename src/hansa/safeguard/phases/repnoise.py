"""RepNoise: turn the representations of restricted text into noise (Rosati et al., 2405.14577)."""

from typing import Literal

from pydantic import Field

from hansa.safeguard.losses import next_token, noising
from hansa.safeguard.phases.base import Phase, retain
from hansa.safeguard.setup import Advance, Metrics, Setup


class RepNoise(Phase):
    """L = L_retain + beta MMD(hidden states, noise) - alpha log L_restricted.

    Of the original's ascent in every layer only that of the last one is here.
    """

    kind: Literal["repnoise"] = "repnoise"
    alpha: float = Field(1.0, ge=0, allow_inf_nan=False)
    """What raising the loss of restricted text counts."""
    beta: float = Field(1.0, ge=0, allow_inf_nan=False)
    """What the likeness to noise counts."""
    representations: bool = True
    """Whether hidden states of retained text are held."""

    def begin(self, setup: Setup) -> Advance:
        """Return a step on retained and on restricted text."""

        def advance(step: int) -> Metrics:
            kept = retain(setup, self.batch_size, step, representations=self.representations)
            rows = setup.rows("forget", self.batch_size, step)
            found = setup.run(rows, hidden=True)
            noise = noising(found.hidden, rows, setup.rng("noise", step))
            restricted = next_token(found.logits, rows)
            (self.beta * noise - self.alpha * restricted.clamp(min=1e-3).log()).backward()
            return {**kept, "noise": noise.item(), "restricted": restricted.item()}

        return advance

    def step_cost(self) -> float:
        """Return 2, and a third more for the reference's forward pass."""
        return 2 + self.representations / 3

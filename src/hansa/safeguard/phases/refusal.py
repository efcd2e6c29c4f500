"""Refusal tuning: the first phase of a model that should decline, and not forget."""

from typing import Literal

from pydantic import Field

from hansa.safeguard.losses import next_token
from hansa.safeguard.phases.base import Phase, retain
from hansa.safeguard.setup import Advance, Metrics, Setup


class Refusal(Phase):
    """Trains on the wanted answers of pairs, beside retained text."""

    kind: Literal["refusal"] = "refusal"
    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    """What wanted answers count."""

    def begin(self, setup: Setup) -> Advance:
        """Return a step on retained text and wanted answers."""
        setup.data.preferences("forget")  # refused at once, where there are none

        def advance(step: int) -> Metrics:
            kept = retain(setup, self.batch_size, step)
            rows = setup.pairs("forget", self.batch_size, step).chosen
            loss = next_token(setup.run(rows).logits, rows)
            (self.weight * loss).backward()
            return {**kept, "refusal": loss.item()}

        return advance

    def step_cost(self) -> float:
        """Return 2."""
        return 2.0

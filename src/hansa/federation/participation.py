"""Who takes part in a round, who fails in it, and who is too late.

The local engine is a simulator, so time is simulated as well: a client's round lasts its number of
local steps times its own seconds per step. Everything is drawn from derived streams, so a run
with stragglers and failures is as reproducible as one without.
"""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from hansa.seeding import numpy_generator

Fate = Literal["ok", "late", "failed", "spent", "excluded"]
"""What becomes of a child in a round; ``excluded``: it replied, and what it sent is of no use."""


class Participation(BaseModel):
    """The rules by which an inner node asks its children."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: float = Field(1.0, gt=0, le=1, strict=True)
    """Share of the children asked in a round, at least one child; under ``poisson`` the chance of
    each."""
    sampling: Literal["rounds", "once", "poisson"] = "rounds"
    """Whether the children asked are so many, drawn anew in every round or once for the whole run,
    or each of them is asked by a chance of its own (``poisson``), so that none may be."""
    newcomers: int = Field(0, ge=0, strict=True)
    """Clients, the last in path order, that nobody asks before ``join_round``."""
    join_round: int = Field(2, ge=2, strict=True)
    """First round in which newcomers may be asked."""
    failure_rate: float = Field(0.0, ge=0, lt=1, strict=True)
    """Chance that a child that was asked fails before it answers."""
    deadline: float | None = Field(None, gt=0, allow_inf_nan=False, strict=True)
    """Simulated seconds after which a reply no longer counts."""
    step_seconds: float = Field(0.1, gt=0, allow_inf_nan=False, strict=True)
    """Simulated seconds per local step on the median client."""
    speed_spread: float = Field(0.0, ge=0, le=5, strict=True)
    """Standard deviation of the log of a client's seconds per step (log-normal, fixed per run)."""

    def choose(self, children: Sequence[str], seed: int, path: str, round_: int) -> list[str]:
        """Return the children asked in this round, in order, none of them twice."""
        old = len(children) - self.newcomers
        present = list(children if round_ >= self.join_round else children[:old])
        if self.sampling == "poisson":
            draws = numpy_generator(seed, path, round_, "participation").random(len(present))
            return [
                child for child, draw in zip(present, draws, strict=True) if draw < self.fraction
            ]
        count = max(1, math.floor(self.fraction * len(present) + 0.5))
        if count >= len(present):
            return present
        if self.sampling == "rounds":
            stream = numpy_generator(seed, path, round_, "participation")
            return [present[k] for k in sorted(stream.permutation(len(present))[:count])]
        order = numpy_generator(seed, path, "once", "participation").permutation(len(children))
        # Newcomers stand behind the others, so that those who were asked stay.
        ranked = [k for k in order if k < old] + [k for k in order if k >= old]
        return [present[k] for k in sorted([k for k in ranked if k < len(present)][:count])]

    def seconds(self, seed: int, path: str, steps: int) -> float:
        """Return the simulated seconds that a client needs for its local steps."""
        spread = numpy_generator(seed, path, "speed").standard_normal() * self.speed_spread
        return steps * self.step_seconds * math.exp(spread)

    def fate(self, seed: int, path: str, round_: int, steps: int) -> tuple[Fate, float]:
        """Return what becomes of a child in this round, and its simulated seconds.

        A child that fails or is late ends the round in the state in which it began it.
        """
        seconds = self.seconds(seed, path, steps)
        draw = numpy_generator(seed, path, round_, "failure").random()
        if draw < self.failure_rate:
            return "failed", seconds
        if self.deadline is not None and seconds > self.deadline:
            return "late", self.deadline
        return "ok", seconds

"""Random Mapping, TAR's first phase for knowledge (Tamirisa et al., arXiv 2408.00761)."""

from typing import Literal

import torch

from hansa.safeguard.losses import random_mapping
from hansa.safeguard.models import width_of
from hansa.safeguard.phases.base import Phase, retain
from hansa.safeguard.setup import Advance, Metrics, Setup


class RandomMapping(Phase):
    """Turns hidden states of restricted text towards a random direction of each token."""

    kind: Literal["random_mapping"] = "random_mapping"
    representations: bool = False
    """Whether hidden states of retained text are held, too; the original does not."""

    def begin(self, setup: Setup) -> Advance:
        """Return a step on retained and on restricted text."""
        size = (setup.data.vocabulary, width_of(setup.model))
        directions = torch.randn(size, generator=setup.rng("directions")).to(setup.device)

        def advance(step: int) -> Metrics:
            kept = retain(setup, self.batch_size, step, representations=self.representations)
            rows = setup.rows("forget", self.batch_size, step)
            loss = random_mapping(setup.run(rows, hidden=True).hidden, rows, directions)
            loss.backward()
            return {**kept, "mapping": loss.item()}

        return advance

    def step_cost(self) -> float:
        """Return 2, and a third more for the reference's forward pass."""
        return 2 + self.representations / 3

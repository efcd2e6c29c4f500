"""Central differential privacy: the root clips each update and adds noise once, for all clients.

McMahan et al., "Learning Differentially Private Recurrent Language Models" (ICLR 2018), Algorithm
1 with flat clipping, the fixed-denominator estimator f_f, and weights of one. What it hides is all
that a client holds, from whoever sees the models that the root makes; the root itself is trusted.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hansa.federation.accountant import Mechanisms, spent
from hansa.federation.message import Tensors
from hansa.federation.privacy import Privacy


@dataclass(frozen=True)
class Central:
    """How the root of a flat federation keeps its clients private.

    Attributes:
        privacy: clip, noise, delta and budget; the unit is a client's update.
        rate: the chance q with which each client is asked in a round, by a draw of its own.
    """

    privacy: Privacy
    rate: float

    def epsilon(self, rounds: int) -> float:
        """Return epsilon of one client after some rounds; infinite without noise."""
        return spent([self.mechanisms(rounds)], self.privacy.delta)

    def mechanisms(self, rounds: int) -> Mechanisms:
        """Return what some rounds are to the accountant.

        A client that is added moves the sum of clipped updates by S at most, whatever it holds; it
        is in a round's sum by chance q.
        """
        return self.privacy.noise, self.rate, rounds

    def affords(self, rounds: int) -> bool:
        """Tell whether epsilon after some rounds is within the budget."""
        budget = self.privacy.epsilon
        return budget is None or self.epsilon(rounds) <= budget

    def mean(
        self, before: Tensors, replies: Iterable[Tensors], clients: int, rng: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Return before + (sum of clipped updates + N(0, sigma^2 S^2)) / (q clients).

        The denominator is the expected number of replies and not theirs, which is a secret of the
        sampling. Replies are summed in float64 as they come, and rounded once, after the noise.

        Args:
            before: name -> tensor that the clients were sent.
            replies: each client's tensors after its training, by the same names.
            clients: how many there are, those who were not asked included.
            rng: where the noise comes from, tensor by tensor in the order of the names.
        """
        sums = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in before.items()}
        for reply in replies:
            updates = {name: reply[name].double() - t.double() for name, t in before.items()}
            norm = math.sqrt(sum(float(update.square().sum()) for update in updates.values()))
            if not math.isfinite(norm):  # no scale would bound it, so that it counts as nothing
                continue
            scale = min(1.0, self.privacy.clip / norm) if norm else 1.0
            for name, update in updates.items():
                sums[name].add_(update, alpha=scale)
        if self.privacy.noise:
            for name in sorted(sums):
                noise = torch.randn(sums[name].shape, generator=rng, dtype=torch.float64)
                sums[name].add_(noise, alpha=self.privacy.deviation)
        expected = self.rate * clients
        return {
            name: (t.double() + sums[name] / expected).to(t.dtype) for name, t in before.items()
        }

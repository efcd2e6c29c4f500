"""REINFORCE (Williams 1992): one softmax over the choices of each slot, all independent.

After a model with score r was told, the logits of slot k move by ``lr * (r - b) * d log p_k``,
with b the moving average of what was told before.
"""

from typing import ClassVar

import numpy as np
from pydantic import Field

from hansa.search.searchers.base import Search, Searcher
from hansa.search.spaces import Floats, Ints, Space


class _Reinforce(Search):
    def __init__(
        self,
        space: Space,
        candidates: Ints,
        seed: int,
        prior: Floats | None,
        options: "Reinforce",
    ) -> None:
        super().__init__(space, candidates, seed, prior, num_warm=options.warm)
        self._options = options
        self._choices = space.split(self.candidates)
        self._logits: list[Floats] = [np.zeros(size) for size in space.sizes]
        self._baseline: float | None = None

    def _log_policy(self) -> list[Floats]:
        return [logits - np.logaddexp.reduce(logits) for logits in self._logits]

    def propose(self) -> int:
        log_policy = self._log_policy()
        for _ in range(10):  # quick while most of what the policy likes is open
            drawn = [int(self.rng.choice(len(p), p=np.exp(p))) for p in log_policy]
            position = int(self.positions(np.array([self.space.number(drawn)]))[0])
            if position >= 0 and self.is_open[position]:
                return position
        still = np.flatnonzero(self.is_open)
        likely = sum(p[self._choices[still, slot]] for slot, p in enumerate(log_policy))
        return int(still[np.argmax(likely + self.rng.gumbel(size=len(still)))])

    def learn(self, position: int, score: float) -> None:
        if self._baseline is None:
            self._baseline = score
            return
        step = self._options.lr * (score - self._baseline)
        policy = [np.exp(p) for p in self._log_policy()]
        for slot, choice in enumerate(self._choices[position]):
            self._logits[slot] -= step * policy[slot]
            self._logits[slot][choice] += step
        keep = self._options.decay
        self._baseline = keep * self._baseline + (1 - keep) * score


class Reinforce(Searcher):
    """Draw models from the policy, without those that were asked before.

    Attributes:
        lr: step of the logits per share of correct answers; 0.01 above the baseline at 20 moves
            the logit of what was chosen by 0.2 times one minus its probability.
        decay: of the baseline's moving average.
        warm: how many questions are the top of the prior, if there is one.
    """

    name: ClassVar[str] = "reinforce"
    lr: float = Field(20.0, gt=0)
    decay: float = Field(0.9, ge=0, lt=1)
    warm: int = Field(10, ge=0)

    def begin(
        self, space: Space, candidates: Ints, seed: int, prior: Floats | None = None
    ) -> Search:
        """Begin a search."""
        return _Reinforce(space, candidates, seed, prior, self)

"""Rounds of BRP-NAS (arXiv 2007.08668, section 4): a predictor is fitted, its favourites trained.

The first round is random, or the top of the prior. Each later round asks for the predicted top
for one half, and for the other half draws from the top ``1 / 2^i`` of what is open in round i.
Rounds go on after the budget is used up, the predictor fitted on all that was told.
"""

from abc import abstractmethod

import numpy as np
from pydantic import Field

from hansa.search.searchers.base import Search, Searcher
from hansa.search.spaces import Floats, Ints, Space


class Rounds(Search):
    """A search in rounds; subclasses say how well they think of every candidate."""

    def __init__(
        self, space: Space, candidates: Ints, seed: int, prior: Floats | None, size: int
    ) -> None:
        super().__init__(space, candidates, seed, prior, num_warm=size)
        self._size, self._round = size, 0
        self._queue: list[int] = []

    @abstractmethod
    def predict(self, round_number: int) -> Floats:
        """Fit on what was told; return a number per candidate, larger for better, float64 [n].

        Args:
            round_number: 1 for the first that is not random.
        """

    def propose(self) -> int:
        """Return the next of the round, planning another where it is over."""
        while self._queue:
            position = self._queue.pop()
            if self.is_open[position]:
                return position
        num_used = len(self.candidates) - self._num_open
        if num_used < self._size or len(self.told) < 2:
            return self.random()
        self._round += 1
        self._queue = self._plan(self.predict(self._round))[::-1]
        return self._queue.pop()

    def _plan(self, predicted: Floats) -> list[int]:
        still = np.flatnonzero(self.is_open)
        ranked = still[np.lexsort((self.rng.random(len(still)), -predicted[still]))]
        half = -(-self._size // 2)
        top, rest = ranked[:half], ranked[half : max(half, len(ranked) >> min(self._round, 62))]
        num = min(self._size - half, len(rest))
        return [*top.tolist(), *self.rng.choice(rest, num, replace=False).tolist()]


class RoundsSearcher(Searcher):
    """Options of a search in rounds.

    Attributes:
        budget: number of models that the rounds share.
        rounds: number of rounds.
    """

    budget: int = Field(100, ge=2)
    rounds: int = Field(5, ge=1)

    @property
    def size(self) -> int:
        """Models per round, two at least."""
        return max(2, self.budget // self.rounds)

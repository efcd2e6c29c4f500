"""Aging evolution (Real et al., arXiv 1802.01548).

The winner of a tournament is mutated in one slot, the oldest model dies.
"""

from collections import deque
from typing import ClassVar

import numpy as np
from pydantic import Field

from hansa.search.searchers.base import Search, Searcher
from hansa.search.spaces import Floats, Ints, Space


class _Evolution(Search):
    def __init__(
        self,
        space: Space,
        candidates: Ints,
        seed: int,
        prior: Floats | None,
        population: int,
        tournament: int,
    ) -> None:
        super().__init__(space, candidates, seed, prior, num_warm=population)
        self._alive: deque[int] = deque(maxlen=population)
        self._to_begin, self._tournament = population, tournament

    def propose(self) -> int:
        num_used = len(self.candidates) - self._num_open
        if num_used < self._to_begin or not self._alive:
            return self.random()
        for _ in range(5 * len(self._alive)):
            position = self._winner()
            around = self.neighbours(position)
            around = around[self.is_open[around]]
            if len(around):
                return int(around[self.rng.integers(len(around))])
        return self.random()  # all around the living was asked

    def _winner(self) -> int:
        num = min(self._tournament, len(self._alive))
        drawn = self.rng.choice(len(self._alive), num, replace=False)
        members = [self._alive[k] for k in drawn]
        return members[int(np.argmax(self.scores[members]))]

    def learn(self, position: int, score: float) -> None:
        self._alive.append(position)


class AgingEvolution(Searcher):
    """Begin with random models, or the top of the prior; then mutate winners of tournaments.

    Attributes:
        population: how many models live; the oldest dies when another is told.
        tournament: how many of them are drawn, of which the best becomes the parent.
    """

    name: ClassVar[str] = "evolution"
    population: int = Field(20, ge=1)
    tournament: int = Field(5, ge=1)

    def begin(
        self, space: Space, candidates: Ints, seed: int, prior: Floats | None = None
    ) -> Search:
        """Begin a search."""
        return _Evolution(space, candidates, seed, prior, self.population, self.tournament)

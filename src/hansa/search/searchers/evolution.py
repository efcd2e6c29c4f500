"""Aging evolution (Real et al., arXiv 1802.01548).

The winner of a tournament is mutated in one slot, the oldest model dies.
"""

from collections import deque
from typing import ClassVar

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
        options: "AgingEvolution",
    ) -> None:
        super().__init__(space, candidates, seed, prior, num_warm=options.population)
        self._alive: deque[tuple[int, float]] = deque(maxlen=options.population)
        self._options = options

    def propose(self) -> int:
        num_used = len(self.candidates) - self._num_open
        if num_used < self._options.population or not self._alive:
            return self.random()
        for _ in range(5 * len(self._alive)):
            position = self._winner()
            around = self.neighbours(position)
            if not self._options.repeats:
                around = around[self.is_open[around]]
            if len(around):
                return int(around[self.rng.integers(len(around))])
        return self.random()  # all around the living was asked

    def _winner(self) -> int:
        drawn = self.rng.permutation(len(self._alive))[: self._options.tournament]
        return max((self._alive[k] for k in drawn), key=lambda member: member[1])[0]

    def learn(self, position: int, score: float) -> None:
        self._alive.append((position, score))


class AgingEvolution(Searcher):
    """Begin with random models, or the top of the prior; then mutate winners of tournaments.

    Attributes:
        population: how many models live; the oldest dies when another is told.
        tournament: how many of them are drawn, of which the best becomes the parent.
        repeats: whether a child may be a model that was asked before, as in the published form;
            it is then asked once more, which may be of use where answers are noisy.
    """

    name: ClassVar[str] = "evolution"
    population: int = Field(20, ge=1)
    tournament: int = Field(5, ge=1)
    repeats: bool = False

    def begin(
        self, space: Space, candidates: Ints, seed: int, prior: Floats | None = None
    ) -> Search:
        """Begin a search."""
        return _Evolution(space, candidates, seed, prior, self)

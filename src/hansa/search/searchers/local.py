"""Local search: look at all neighbours, move to the first better one, begin anew at an optimum."""

from collections import deque
from typing import ClassVar

from hansa.search.searchers.base import Search, Searcher
from hansa.search.spaces import Floats, Ints, Space


class _Local(Search):
    def __init__(
        self, space: Space, candidates: Ints, seed: int, prior: Floats | None = None
    ) -> None:
        super().__init__(space, candidates, seed, prior)
        self._starts: deque[int] = deque(self.by_prior().tolist() if prior is not None else [])
        self._here: int | None = None
        self._around: deque[int] = deque()

    def propose(self) -> int:
        while self._around:
            position = self._around.popleft()
            if self.is_open[position]:
                return position
        self._here = None  # an optimum: what is told next is where the next descent begins
        while self._starts:
            position = self._starts.popleft()
            if self.is_open[position]:
                return position
        return self.random()

    def learn(self, position: int, score: float) -> None:
        if self._here is None or score > self.scores[self._here]:
            self._here = position
            self._around = deque(self.rng.permutation(self.neighbours(position)).tolist())


class LocalSearch(Searcher):
    """Move to the first better neighbour, all in random order; at an optimum begin anew.

    A neighbour that was told before is not asked again and not moved to. Each beginning is the
    best open candidate by the prior where there is one, and else a random one.
    """

    name: ClassVar[str] = "local"

    def begin(
        self, space: Space, candidates: Ints, seed: int, prior: Floats | None = None
    ) -> Search:
        """Begin a search."""
        return _Local(space, candidates, seed, prior)

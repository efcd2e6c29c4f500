"""Random search: every candidate equally likely, none twice."""

from typing import ClassVar

from hansa.search.searchers.base import Search, Searcher
from hansa.search.spaces import Floats, Ints, Space


class _Random(Search):
    def propose(self) -> int:
        return self.random()


class Random(Searcher):
    """Ask for candidates in random order; a prior changes nothing."""

    name: ClassVar[str] = "random"

    def begin(
        self, space: Space, candidates: Ints, seed: int, prior: Floats | None = None
    ) -> Search:
        """Begin a search."""
        return _Random(space, candidates, seed, prior)

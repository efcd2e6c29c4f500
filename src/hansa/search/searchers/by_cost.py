"""Largest first: the order of a cost, such as multiply-adds, that is known without training."""

from typing import ClassVar

from hansa.errors import InputError
from hansa.search.searchers.base import Search, Searcher
from hansa.search.spaces import Floats, Ints, Space


class _ByCost(Search):
    def propose(self) -> int:
        return self.random()  # the order holds every candidate: never reached


class ByCost(Searcher):
    """Ask for candidates in descending order of their prior, multiply-adds unless told otherwise.

    No search at all, and yet hard to beat where larger models are better: a table of searchers
    without it says little.
    """

    name: ClassVar[str] = "by_cost"
    prior_column: ClassVar[str | None] = "multiply_adds"

    def begin(
        self, space: Space, candidates: Ints, seed: int, prior: Floats | None = None
    ) -> Search:
        """Begin a search.

        Raises:
            InputError: no prior; see also ``Search``.
        """
        if prior is None:
            raise InputError("prior", "none", "a cost of every candidate, such as multiply-adds")
        return _ByCost(space, candidates, seed, prior, num_warm=len(candidates))

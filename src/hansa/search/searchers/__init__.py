"""Searchers by the name that a configuration calls them by."""

from hansa.search.searchers.base import Search, Searcher
from hansa.search.searchers.random import Random

SEARCHERS: dict[str, type[Searcher]] = {each.name: each for each in (Random,)}

__all__ = ["SEARCHERS", "Random", "Search", "Searcher"]

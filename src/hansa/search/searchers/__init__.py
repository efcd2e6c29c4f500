"""Searchers by the name that a configuration calls them by."""

from hansa.search.searchers.base import Search, Searcher
from hansa.search.searchers.brp import BrpNas
from hansa.search.searchers.by_cost import ByCost
from hansa.search.searchers.evolution import AgingEvolution
from hansa.search.searchers.local import LocalSearch
from hansa.search.searchers.optuna import Optuna
from hansa.search.searchers.random import Random
from hansa.search.searchers.reinforce import Reinforce
from hansa.search.searchers.ridge import Ridge

SEARCHERS: dict[str, type[Searcher]] = {
    each.name: each
    for each in (Random, LocalSearch, AgingEvolution, Reinforce, BrpNas, Ridge, ByCost, Optuna)
}

__all__ = [
    "SEARCHERS",
    "AgingEvolution",
    "BrpNas",
    "ByCost",
    "LocalSearch",
    "Optuna",
    "Random",
    "Reinforce",
    "Ridge",
    "Search",
    "Searcher",
]

"""Ridge regression on which choices a model makes, and which pairs of choices, in rounds.

The features are one-hot: every trait of a model (``Space.traits``) and every pair of traits.
Two models that share m traits share m + m (m - 1) / 2 features, so that the regression is solved
by products of models and the features are never written down.
"""

from typing import ClassVar

import numpy as np
from pydantic import Field

from hansa.search.searchers.base import Search
from hansa.search.searchers.rounds import Rounds, RoundsSearcher
from hansa.search.spaces import Floats, Ints, Space


def shared_features(first: Ints, second: Ints) -> Floats:
    """Return how many traits and pairs of traits models share, float64 [n, m].

    Args:
        first: traits, int64 [n, traits].
        second: traits, int64 [m, traits].
    """
    shared = np.zeros((len(first), len(second)))
    for one, other in zip(first.T, second.T, strict=True):
        shared += one[:, None] == other[None]
    return shared * (shared + 1) / 2


def fitted(known: Ints, scores: Floats, wanted: Ints, penalty: float) -> Floats:
    """Return what ridge regression predicts for models, float64 [m].

    Args:
        known: traits of the models with scores, int64 [n, traits].
        scores: float64 [n].
        wanted: traits of the models asked for, int64 [m, traits].
        penalty: of the squared weights; the mean score has none.
    """
    products = shared_features(known, known)
    weights = np.linalg.solve(products + penalty * np.eye(len(known)), scores - scores.mean())
    predicted: Floats = shared_features(wanted, known) @ weights + scores.mean()
    return predicted


class _Ridge(Rounds):
    def __init__(
        self, space: Space, candidates: Ints, seed: int, prior: Floats | None, options: "Ridge"
    ) -> None:
        super().__init__(space, candidates, seed, prior, options.size)
        self._traits, self._penalty = space.traits(self.candidates), options.penalty

    def predict(self, round_number: int) -> Floats:
        known = self._traits[self.told]
        return fitted(known, self.scores[self.told], self._traits, self._penalty)


class Ridge(RoundsSearcher):
    """Rounds by ridge regression.

    Attributes:
        penalty: of the squared weights.
    """

    name: ClassVar[str] = "ridge"
    penalty: float = Field(1.0, gt=0)

    def begin(
        self, space: Space, candidates: Ints, seed: int, prior: Floats | None = None
    ) -> Search:
        """Begin a search."""
        return _Ridge(space, candidates, seed, prior, self)

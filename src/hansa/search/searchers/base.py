"""What all searchers share: they are asked for a model, and told how good it is."""

from abc import ABC, abstractmethod
from collections import deque
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from hansa.errors import InputError
from hansa.search.spaces import Floats, Ints, Space
from hansa.seeding import numpy_generator


class Search(ABC):
    """One search under way.

    Models are told apart by their position among the candidates, in ascending order of number.
    Several may be asked for before the first is told, and models may be told that nobody asked.

    Attributes:
        space: what is searched.
        candidates: numbers of the models that may be asked, ascending, int64 [n].
        is_open: whether a model was neither asked nor told, bool [n].
        scores: what was told, nan where nothing was, float64 [n].
        told: positions in the order in which they were told.
        prior: larger where better is expected, float64 [n], or None.
        rng: of all draws.

    Args:
        space: what is searched.
        candidates: numbers of models, in any order.
        seed: of all draws.
        prior: one number per candidate, in the order of ``candidates``.
        num_warm: how many of the first questions are the top of the prior, if there is one.

    Raises:
        InputError: no candidates, one twice, one that is no model, or a prior of another length.
    """

    def __init__(
        self,
        space: Space,
        candidates: Ints,
        seed: int,
        prior: Floats | None = None,
        num_warm: int = 0,
    ) -> None:
        given = space.check(candidates, "candidates")
        order = np.argsort(given, kind="stable")
        self.space, self.candidates = space, given[order]
        if not len(given) or (np.diff(self.candidates) == 0).any():
            found = f"{len(given)} models, {len(np.unique(given))} of them different"
            raise InputError("candidates", found, "at least one model, each once")
        self.prior: Floats | None = None
        if prior is not None:
            scores = np.asarray(prior, dtype=np.float64)
            if scores.shape != given.shape or np.isnan(scores).any():
                found = f"shape {scores.shape}, {int(np.isnan(scores).sum())} of them nan"
                raise InputError("prior", found, f"a number for each of {len(given)} candidates")
            self.prior = scores[order]
        self.is_open = np.ones(len(given), dtype=bool)
        self.scores = np.full(len(given), np.nan)
        self.told: list[int] = []
        self.rng = numpy_generator(seed, "search", type(self).__name__)
        self._num_open = len(given)
        self._first: deque[int] = deque()
        if self.prior is not None and num_warm:
            self._first.extend(self.by_prior()[:num_warm].tolist())

    @abstractmethod
    def propose(self) -> int:
        """Return the position of an open candidate, of which there is at least one.

        A searcher with an option to ask again may return one that is not open.
        """

    def learn(self, position: int, score: float) -> None:  # noqa: B027 - most need not
        """Take notice of a score, after it was noted in ``scores`` and ``told``."""

    def ask(self) -> int | None:
        """Return a model that was neither asked nor told, None when there is no other."""
        if not self._num_open:
            return None
        while self._first:
            position = self._first.popleft()
            if self.is_open[position]:
                break
        else:
            position = self.propose()
        self._close(position)
        return int(self.candidates[position])

    def tell(self, model: int, score: float) -> None:
        """Say how good a model is; larger is better. Of two scores of a model the later holds.

        Raises:
            InputError: no candidate, or a score that is no finite number.
        """
        position = self.positions(np.array([model]))[0]
        if position < 0:
            raise InputError("model", model, "one of the candidates")
        if not np.isfinite(score):
            raise InputError("score", score, "a finite number")
        self._close(position)
        if np.isnan(self.scores[position]):
            self.told.append(int(position))
        self.scores[position] = score
        self.learn(int(position), score)

    def positions(self, models: Ints) -> Ints:
        """Return where models stand among the candidates, int64 [n], -1 for others."""
        found = np.searchsorted(self.candidates, models).clip(max=len(self.candidates) - 1)
        return np.where(self.candidates[found] == models, found, -1)

    def neighbours(self, position: int) -> Ints:
        """Return positions of the candidates that differ from one in exactly one slot."""
        found = self.positions(self.space.neighbours(int(self.candidates[position])))
        return found[found >= 0]

    def random(self) -> int:
        """Return the position of an open candidate, all equally likely."""
        for _ in range(20):  # quick while most are open
            position = int(self.rng.integers(len(self.candidates)))
            if self.is_open[position]:
                return position
        return int(self.rng.choice(np.flatnonzero(self.is_open)))

    def by_prior(self) -> Ints:
        """Return all positions, largest prior first; equal ones in random order."""
        assert self.prior is not None  # noqa: S101 - asked only where there is one
        ties = self.rng.random(len(self.candidates))
        return np.lexsort((ties, -self.prior))

    def _close(self, position: int) -> None:
        self._num_open -= int(self.is_open[position])
        self.is_open[position] = False


class Searcher(BaseModel, ABC):
    """How to look for a good model: options that begin a search.

    Attributes:
        name: what a configuration calls it.
        prior_column: the table's column that is its prior where the user gives no other, or None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    prior_column: ClassVar[str | None] = None

    @abstractmethod
    def begin(
        self, space: Space, candidates: Ints, seed: int, prior: Floats | None = None
    ) -> Search:
        """Begin a search.

        Args:
            space: what is searched.
            candidates: numbers of the models that may be asked, int64 [n].
            seed: of all draws.
            prior: what is known before, one number per candidate, larger where better is expected
                (a proxy's scores, a predictor's); for a warm start where the searcher has one.

        Raises:
            InputError: see ``Search``.
        """

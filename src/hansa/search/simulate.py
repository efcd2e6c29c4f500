"""Replay searches on a table: what each question would have cost, and what was found by then.

A question is answered by the validation accuracy of one training, its seed drawn anew each time,
as a search that trains each model once would see it. Two curves tell what was found:

- ``chosen``: test accuracy (mean of seeds) of the model with the best answer so far. What a user
  would have; every report shows this one.
- ``best``: the largest mean test accuracy of what was asked so far, whatever the answers. It
  knows what no search knows and serves for comparison with published curves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hansa.errors import InputError
from hansa.search.columns import Columns
from hansa.search.searchers.base import Searcher
from hansa.search.spaces import Bools, Floats, Ints
from hansa.seeding import numpy_generator


@dataclass(frozen=True)
class Replays:
    """Searches of one searcher, one row each.

    A search that ran out of candidates keeps what it has: its last columns repeat.

    Attributes:
        models: what was asked, int64 [runs, queries]; -1 after the candidates ran out.
        answers: validation accuracy that was told, float64 [runs, queries].
        chosen: test accuracy of the model with the best answer so far, float64 [runs, queries].
        best: largest test accuracy of what was asked so far, float64 [runs, queries].
        seconds: summed training seconds, float64 [runs, queries]; nan where the table has none.
        optimum: largest test accuracy of a candidate.
    """

    models: Ints
    answers: Floats
    chosen: Floats
    best: Floats
    seconds: Floats
    optimum: float

    @property
    def regret(self) -> Floats:
        """How far the chosen model is below the optimum under the limits [runs, queries]."""
        regret: Floats = self.optimum - self.chosen
        return regret

    def at_seconds(self, grid: Sequence[float] | Floats) -> Floats:
        """Return ``chosen`` by summed seconds, float64 [runs, len(grid)], nan before any model."""
        found = np.full((len(self.chosen), len(grid)), np.nan)
        for run, (seconds, chosen) in enumerate(zip(self.seconds, self.chosen, strict=True)):
            done = np.searchsorted(seconds, grid, side="right")
            found[run] = np.where(done > 0, chosen[done - 1], np.nan)
        return found


def prior_of(searcher: Searcher, columns: Columns, feasible: Bools) -> Floats | None:
    """Return the column that a searcher takes as prior where there is no other."""
    if searcher.prior_column is None:
        return None
    values: Floats = getattr(columns, searcher.prior_column)[feasible]
    return values


def simulate(
    searcher: Searcher,
    columns: Columns,
    runs: int,
    queries: int,
    feasible: Bools | None = None,
    prior: Floats | None = None,
    seed: int = 0,
) -> Replays:
    """Replay searches.

    Args:
        searcher: what is replayed.
        columns: the table.
        runs: number of searches; run k is the same whatever their number.
        queries: number of models that each asks for.
        feasible: which models of the table may be asked, bool [n]; all by default.
        prior: one number per model of the table, float64 [n].
        seed: of all draws.

    Raises:
        InputError: no model is feasible, or a feasible one has no accuracy.
    """
    allowed = np.ones(len(columns.models), bool) if feasible is None else feasible
    if not allowed.any():
        raise InputError("feasible", "no model of the table", "limits that some model keeps")
    models, validation = columns.models[allowed], columns.validation[allowed]
    known = ~np.isnan(validation)
    if not known.any(1).all():
        missing = int(models[~known.any(1)][0])
        raise InputError("validation", f"no training of model {missing}", "one of every model")
    test = np.nanmean(columns.test[allowed], axis=1)
    seconds = columns.train_seconds[allowed]
    own = prior_of(searcher, columns, allowed) if prior is None else prior[allowed]
    trained = [np.flatnonzero(row) for row in known]
    shape = (runs, queries)
    asked = np.full(shape, -1, dtype=np.int64)
    answers, cost = np.full(shape, np.nan), np.zeros(shape)
    for run in range(runs):
        search = searcher.begin(columns.space, models, _seed(seed, run), own)
        draws = numpy_generator(seed, "replay", run).random(queries)
        for query in range(queries):
            model = search.ask()
            if model is None:
                break
            position = int(np.searchsorted(models, model))
            which = trained[position][int(draws[query] * len(trained[position]))]
            asked[run, query] = position
            answers[run, query] = validation[position, which]
            cost[run, query] = seconds[position, which]
            search.tell(model, float(validation[position, which]))
    return _curves(models, test, asked, answers, cost)


def _seed(seed: int, run: int) -> int:
    return int(numpy_generator(seed, "searches", run).integers(2**62))


def _curves(models: Ints, test: Floats, asked: Ints, answers: Floats, cost: Floats) -> Replays:
    is_asked = asked >= 0
    accuracy = np.where(is_asked, test[asked], -np.inf)
    told = np.where(is_asked, answers, -np.inf)
    record = np.where(_is_record(told), np.arange(asked.shape[1]), 0)
    held = np.maximum.accumulate(record, axis=1)
    return Replays(
        models=np.where(is_asked, models[asked], -1),
        answers=answers,
        chosen=np.take_along_axis(accuracy, held, axis=1),
        best=np.maximum.accumulate(accuracy, axis=1),
        seconds=np.cumsum(cost, axis=1),
        optimum=float(test.max()),
    )


def _is_record(told: Floats) -> Bools:
    """Return where an answer is above all before it."""
    before = np.full_like(told, -np.inf)
    before[:, 1:] = np.maximum.accumulate(told, axis=1)[:, :-1]
    record: Bools = told > before
    return record

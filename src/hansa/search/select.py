"""Exact choice among all models by scores that add up over slots, under caps that add up as well.

A space has few enough models that all can be looked at: no integer program is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hansa.errors import InputError
from hansa.search.spaces import Bools, Floats, Ints


@dataclass(frozen=True)
class Cap:
    """A limit on a cost that adds up over slots, such as latency by stage.

    Attributes:
        costs: of every choice in every slot, float64 [slots, choices].
        limit: largest sum that is allowed.
        fixed: what every model costs, such as stem and head.
        name: what a message calls it.
    """

    costs: Floats
    limit: float
    fixed: float = 0.0
    name: str = "cost"


def totals(parts: Floats) -> Floats:
    """Return the sum over slots of every model, float64 [models], in ascending order of number.

    Args:
        parts: of every choice in every slot, float64 [slots, choices].

    Raises:
        InputError: not a table of numbers; infinite ones are allowed.
    """
    table = np.asarray(parts, dtype=np.float64)
    if table.ndim != 2 or not table.size or np.isnan(table).any():
        found = f"shape {table.shape}, {int(np.isnan(table).sum())} of them nan"
        raise InputError("scores by slot and choice", found, "a number for every choice")
    sums = np.zeros(1)
    for own in table:
        sums = (sums[:, None] + own).ravel()
    return sums


def allowed(caps: Sequence[Cap], num_models: int) -> Bools:
    """Return which models keep to all caps, bool [num_models].

    Raises:
        InputError: none does, or costs of another space.
    """
    found = np.ones(num_models, dtype=bool)
    for cap in caps:
        costs = totals(cap.costs) + cap.fixed
        if len(costs) != num_models:
            raise InputError(cap.name, f"costs of {len(costs)} models", f"{num_models}")
        within = costs <= cap.limit
        if not within.any():
            raise InputError(f"limit of {cap.name}", cap.limit, f"at least {costs.min():.6g}")
        found &= within
    if not found.any():
        text = ", ".join(f"{cap.name} <= {cap.limit:.6g}" for cap in caps)
        raise InputError("limits", f"{text}, which no model keeps together", "looser ones")
    return found


def top(scores: Floats, caps: Sequence[Cap] = (), num: int = 1) -> Ints:
    """Return the best models under caps, the best first; of equal ones the smaller number.

    Args:
        scores: of every model, larger is better, float64 [models]: of ``totals``, or of
            ``hansa.search.rankings``.
        caps: what the models must keep to.
        num: how many are wanted; fewer are returned where fewer keep to the caps.

    Raises:
        InputError: no model keeps to the caps, or ``num`` is not positive.
    """
    if num < 1:
        raise InputError("num", num, "at least 1")
    models = np.flatnonzero(allowed(caps, len(scores)))
    return models[np.argsort(-scores[models], kind="stable")[:num]]


def pareto(scores: Floats, costs: Floats) -> Ints:
    """Return the positions that no other beats, cheapest first, int64 [n].

    One beats another where it scores no less, costs no more, and is not equal in both; of equal
    ones the first is returned.

    Args:
        scores: larger is better, float64 [n].
        costs: smaller is better, float64 [n].
    """
    order = np.lexsort((-scores, costs))
    sorted_scores = scores[order]
    before = np.concatenate([[-np.inf], np.maximum.accumulate(sorted_scores)[:-1]])
    return order[sorted_scores > before]

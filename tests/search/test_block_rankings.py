"""Exact choice equals brute force, and rankings are what their formulas say."""

import itertools

import numpy as np
import pytest

from hansa.errors import InputError
from hansa.models.blox_space import id_of_cells, split
from hansa.search.rankings import dna, donna, lana
from hansa.search.select import Cap, allowed, pareto, top, totals


def _tables(seed: int):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, 45)), rng.gamma(2.0, size=(3, 45)), rng


def test_totals_are_in_the_order_of_numbers() -> None:
    parts, _, rng = _tables(0)
    sums = totals(parts)
    assert sums.shape == (91_125,)
    for cells in rng.integers(45, size=(50, 3)).tolist():
        assert sums[id_of_cells(cells)] == sum(parts[k, cell] for k, cell in enumerate(cells))


@pytest.mark.parametrize("seed", range(20))
def test_the_best_under_a_cap_is_that_of_brute_force(seed) -> None:
    scores, costs, rng = _tables(seed)
    limit = float(np.quantile(totals(costs), rng.uniform(0.0005, 0.6)))
    best, found = -np.inf, (-1, -1, -1)
    lists, prices = scores.tolist(), costs.tolist()
    for a, b, c in itertools.product(range(45), repeat=3):
        worth = lists[0][a] + lists[1][b] + lists[2][c]
        if prices[0][a] + prices[1][b] + prices[2][c] <= limit and worth > best:
            best, found = worth, (a, b, c)
    assert top(totals(scores), [Cap(costs, limit)]).tolist() == [id_of_cells(found)]


def test_the_best_few_come_in_order_and_keep_to_all_caps() -> None:
    scores, costs, rng = _tables(3)
    weights = rng.gamma(2.0, size=(3, 45))
    caps = [Cap(costs, 6.0, fixed=1.5, name="latency"), Cap(weights, 5.0, name="parameters")]
    found = top(totals(scores), caps, 200)
    worth = totals(scores)
    keeps = (totals(costs) + 1.5 <= 6.0) & (totals(weights) <= 5.0)
    expected = sorted(np.flatnonzero(keeps), key=lambda model: (-worth[model], model))
    assert found.tolist() == expected[:200]
    few = Cap(costs, float(np.sort(totals(costs))[2]))
    assert len(top(totals(scores), [few], 10)) == 3


def test_of_equal_models_the_smaller_number_comes_first() -> None:
    assert top(np.zeros(91_125), num=3).tolist() == [0, 1, 2]


def test_what_no_model_keeps_is_refused() -> None:
    scores, costs, _ = _tables(0)
    least = totals(costs).min()
    with pytest.raises(InputError, match=f"limit of latency.*at least {least:.6g}"):
        top(totals(scores), [Cap(costs, least * 0.99, name="latency")])
    assert allowed([Cap(costs, least)], 91_125).sum() == 1
    opposite = costs.max() - costs
    with pytest.raises(InputError, match="no model keeps together"):
        top(totals(scores), [Cap(costs, least), Cap(opposite, totals(opposite).min())])
    with pytest.raises(InputError, match="costs of 125 models"):
        top(totals(scores), [Cap(costs[:, :5], 1.0)])
    with pytest.raises(InputError, match="1 of them nan"):
        totals(np.array([[0.0, np.nan]]))
    with pytest.raises(InputError, match="num"):
        top(totals(scores), num=0)


def test_pareto_equals_its_definition() -> None:
    rng = np.random.default_rng(1)
    scores, costs = rng.integers(12, size=(2, 150)) * 1.0
    beaten = [
        any(
            scores[j] >= scores[i]
            and costs[j] <= costs[i]
            and (scores[j] > scores[i] or costs[j] < costs[i] or j < i)
            for j in range(150)
            if j != i
        )
        for i in range(150)
    ]
    found = pareto(scores, costs)
    assert sorted(found.tolist()) == [i for i in range(150) if not beaten[i]]
    assert (np.diff(costs[found]) > 0).all()


def test_dna_prefers_the_smallest_losses() -> None:
    _, losses, _ = _tables(5)
    assert top(dna(losses)).tolist() == [id_of_cells(losses.argmin(1).tolist())]
    losses[1, 7] = np.inf  # a block that diverged
    assert set(split(top(dna(losses), num=91_125)[-2025:])[:, 1]) == {7}


def test_lana_adds_changes_up() -> None:
    accuracies = np.full((3, 45), 0.8)
    accuracies[0, 3], accuracies[1, 4], accuracies[2, 5] = 0.7, 0.85, 0.5
    ranking = lana(accuracies, 0.8)
    assert ranking[id_of_cells([0, 0, 0])] == pytest.approx(0.8)
    assert ranking[id_of_cells([3, 4, 5])] == pytest.approx(0.8 - 0.1 + 0.05 - 0.3)
    assert ranking[id_of_cells([0, 4, 5])] == pytest.approx(0.8 + 0.05 - 0.3)


def test_donna_recovers_a_linear_law() -> None:
    _, quality, rng = _tables(7)
    law = 0.9 - totals(np.array([[0.1], [0.02], [0.05]]) * quality)
    models = rng.choice(91_125, 8, replace=False)
    fitted = donna(quality, models, law[models])
    np.testing.assert_allclose(fitted.weights, [-0.1, -0.02, -0.05])
    assert fitted.constant == pytest.approx(0.9)
    assert fitted.correlation == pytest.approx(1)
    np.testing.assert_allclose(fitted.ranking(), law)
    with pytest.raises(InputError, match="at least 4 different ones"):
        donna(quality, [1, 2, 3, 3], law[[1, 2, 3, 3]])
    quality[0, split(models)[0, 0]] = np.inf
    with pytest.raises(InputError, match="finite"):
        donna(quality, models, law[models])

"""Replays of searches on a small table, counted by hand."""

import numpy as np
import pytest

from hansa.errors import InputError
from hansa.search.columns import Columns
from hansa.search.searchers import AgingEvolution, ByCost, Random, Ridge
from hansa.search.simulate import simulate
from hansa.search.spaces import MACRO, Space

_SPACE = Space("row", (6,))


def _columns(**changes) -> Columns:
    validation = np.array([[0.5], [0.9], [0.6], [0.4], [0.9], [0.7]])
    values = {
        "space": _SPACE,
        "recipe": "made",
        "models": np.arange(6),
        "seeds": (0,),
        "validation": validation,
        "test": np.array([[0.5], [0.3], [0.8], [0.4], [0.7], [0.6]]),
        "train_seconds": np.full((6, 1), 2.0),
        "parameters": np.arange(6.0),
        "multiply_adds": np.array([6.0, 5, 4, 3, 2, 1]),
    }
    return Columns(**(values | changes))


def test_curves_are_those_counted_by_hand() -> None:
    found = simulate(ByCost(), _columns(), 2, 7)
    assert found.models[1].tolist() == [0, 1, 2, 3, 4, 5, -1]
    assert found.chosen[0].tolist() == [0.5, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]  # of equals the first
    assert found.best[0].tolist() == [0.5, 0.5, 0.8, 0.8, 0.8, 0.8, 0.8]
    assert found.regret[0].tolist() == pytest.approx([0.3] + [0.5] * 6)
    assert found.seconds[0].tolist() == [2, 4, 6, 8, 10, 12, 12]
    at = found.at_seconds([1.0, 2.0, 5.0, 99.0])[0]
    assert np.isnan(at[0])
    assert at[1:].tolist() == [0.5, 0.3, 0.3]


def test_limits_hold_for_what_is_asked_and_for_the_optimum() -> None:
    feasible = np.array([True, False, False, True, False, True])
    found = simulate(Random(), _columns(), 5, 6, feasible)
    assert set(found.models.ravel().tolist()) == {0, 3, 5, -1}
    assert found.optimum == 0.6
    assert (found.regret[:, -1] == 0).all()
    with pytest.raises(InputError, match="feasible"):
        simulate(Random(), _columns(), 1, 1, np.zeros(6, bool))


def test_each_question_is_answered_by_a_seed_that_the_table_has() -> None:
    validation = np.array([[0.1, np.nan, 0.3]] * 5 + [[np.nan, 0.2, np.nan]])
    wide = np.ones((6, 3))
    columns = _columns(seeds=(0, 1, 2), validation=validation, test=validation, train_seconds=wide)
    found = simulate(Random(), columns, 200, 6)
    assert set(found.answers[found.models == 5].tolist()) == {0.2}
    answers = found.answers[found.models != 5]
    assert set(answers.tolist()) == {0.1, 0.3}
    assert 0.4 < (answers == 0.1).mean() < 0.6
    assert found.optimum == pytest.approx(0.2)
    again = simulate(Random(), columns, 3, 6)
    assert (again.models == found.models[:3]).all()
    assert (again.answers == found.answers[:3]).all()


def test_a_feasible_model_without_a_training_is_refused() -> None:
    columns = _columns(validation=np.array([[0.1]] * 5 + [[np.nan]]))
    with pytest.raises(InputError, match="model 5"):
        simulate(Random(), columns, 1, 1)


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="parameters"):
        _columns(parameters=np.ones(5))
    with pytest.raises(InputError, match="ascending"):
        _columns(models=np.array([0, 1, 2, 3, 5, 4]))


def test_searchers_that_learn_find_more() -> None:
    rng = np.random.default_rng(0)
    choices = MACRO.split(range(MACRO.num_models))
    pair = rng.normal(size=(7, 3, 3))
    value = sum(pair[k][choices[:, k], choices[:, k + 1]] for k in range(7))
    value = value + (rng.normal(size=(8, 3))[np.arange(8), choices]).sum(1)
    truth = 0.9 + 0.01 * (value - value.mean()) / value.std()
    noisy = truth[:, None] + 0.002 * rng.normal(size=(MACRO.num_models, 3))
    columns = Columns(
        space=MACRO,
        recipe="made",
        models=np.arange(MACRO.num_models),
        seeds=(0, 1, 2),
        validation=noisy,
        test=noisy,
        train_seconds=np.ones_like(noisy),
        parameters=truth,
        multiply_adds=truth,
    )
    curves = [
        simulate(searcher, columns, 8, 100).best.mean(0)
        for searcher in (Random(), AgingEvolution(), Ridge())
    ]
    for queries in (50, 100):
        at = [curve[queries - 1] for curve in curves]
        assert at[0] < at[1] < at[2]

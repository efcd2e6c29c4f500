"""A study on a space of two cells a stage."""

import numpy as np
import pytest

from hansa.errors import InputError
from hansa.models.blox_space import cells_of
from hansa.search.fitting import Fitting
from hansa.search.select import Cap
from hansa.search.study import _spearman, blockwise_study
from search.blocks import OPTIONS, inputs, labels, teacher

CELLS = (0, 2)


def test_a_study_tells_of_random_and_of_chosen_models(tmp_path) -> None:
    x, y = inputs(8), labels(8)
    costs = np.zeros((3, 45))
    costs[0, 2] = 1.0
    options = {"blocks": OPTIONS.model_copy(update={"steps": 1, "evaluations": 1})}
    options |= {"tuning": Fitting(steps=1, batch_size=4, evaluations=1)}
    data = teacher(), (x, y), (x, y), (x, y), tmp_path
    found = blockwise_study(*data, **options, caps=[Cap(costs, 0.5)], cells=CELLS, num_random=4)
    rows = found["models"]
    assert [row["chosen_by"] for row in rows] == [
        *["random"] * 4,
        "dna mse",
        "dna nsr",
        "lana",
        "donna",
    ]
    for row in rows:
        first, *others = cells_of(row["model"])
        assert first == 0
        assert set(others) <= set(CELLS)
        assert 0 <= row["test"] <= 1
    assert len({row["model"] for row in rows[:4]}) == 4
    assert sorted(found["correlation"]) == ["dna mse", "dna nsr", "donna", "lana"]
    with pytest.raises(InputError, match="num_random"):
        blockwise_study(*data, num_random=3)


def test_rank_correlation_by_hand() -> None:
    assert _spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 25])) == pytest.approx(1)
    assert _spearman(np.array([1.0, 2, 3]), np.array([3.0, 1, 2])) == pytest.approx(-0.5)
    assert _spearman(np.array([1.0, 1, 1]), np.array([3.0, 1, 2])) == 0

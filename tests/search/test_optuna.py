"""Optuna's samplers and storage behind the same questions."""

import numpy as np
import pytest

from hansa.errors import InputError
from hansa.search.searchers.optuna import Optuna
from hansa.search.spaces import MACRO

optuna = pytest.importorskip("optuna")

CANDIDATES = np.arange(0, 6561, 97)


def _ask(search, num: int) -> list[int]:
    asked = []
    for _ in range(num):
        model = search.ask()
        search.tell(model, float(MACRO.split([model])[0].sum()))
        asked.append(model)
    return asked


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_only_candidates_are_asked_each_once_and_the_same_by_one_seed(sampler) -> None:
    asked = _ask(Optuna(sampler=sampler).begin(MACRO, CANDIDATES, 3), 20)
    assert len(set(asked)) == 20
    assert set(asked) <= set(CANDIDATES.tolist())
    assert asked == _ask(Optuna(sampler=sampler).begin(MACRO, CANDIDATES, 3), 20)


def test_all_candidates_are_asked_before_it_ends() -> None:
    search = Optuna().begin(MACRO, np.array([5, 600, 6000]), 0)
    assert sorted(_ask(search, 3)) == [5, 600, 6000]
    assert search.ask() is None


def test_those_who_share_a_study_ask_for_no_model_twice(tmp_path) -> None:
    options = Optuna(storage=f"sqlite:///{tmp_path / 'study.db'}")
    first, second = (options.begin(MACRO, CANDIDATES, seed) for seed in (0, 1))
    asked = _ask(first, 5) + _ask(second, 5) + _ask(first, 5)
    assert len(set(asked)) == 15
    late = options.begin(MACRO, CANDIDATES, 2)
    assert late.shared == 15
    assert set(late.candidates[late.told]) == set(asked)


def test_a_study_of_another_space_is_refused(tmp_path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(storage=storage, study_name="hansa", direction="maximize")
    numbers = {"x": optuna.distributions.IntDistribution(0, 2)}
    study.add_trial(optuna.trial.create_trial(params={"x": 1}, distributions=numbers, value=1.0))
    with pytest.raises(InputError, match="another space"):
        Optuna(storage=storage).begin(MACRO, CANDIDATES, 0)


def test_a_storage_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=r"options\.storage"):
        Optuna(storage="nothing://here").begin(MACRO, CANDIDATES, 0)

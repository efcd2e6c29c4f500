"""What is asked, in which order, and what searchers make of what they are told."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.errors import InputError
from hansa.search.searchers import SEARCHERS, AgingEvolution, BrpNas, LocalSearch, Reinforce, Ridge
from hansa.search.searchers.brp import PairPredictor, pair_loss
from hansa.search.searchers.ridge import fitted, shared_features
from hansa.search.spaces import MACRO, Space
from hansa.seeding import global_stream

_SPACE = Space("small", (3, 3, 3, 3))
_QUICK = {"brp": {"width": 8, "epochs": 1, "budget": 40, "rounds": 4}}


def _searcher(name: str):
    return SEARCHERS[name].model_validate(_QUICK.get(name, {}))


def _value(model: int) -> float:
    """A smooth score with one optimum, all choices 2."""
    return float(_SPACE.split([model])[0] @ [0.1, 0.08, 0.05, 0.02])


def _asked(search, num: int) -> list[int]:
    found = []
    for _ in range(num):
        model = search.ask()
        if model is None:
            break
        found.append(model)
        search.tell(model, _value(model))
    return found


@pytest.mark.parametrize("name", SEARCHERS)
def test_every_candidate_is_asked_once_and_nothing_else(name) -> None:
    candidates = np.array([80, 3, 41, 7, 9, 60, 61, 62, 0, 27, 54, 5])
    prior = np.arange(12.0)
    found = _asked(_searcher(name).begin(_SPACE, candidates, 1, prior), 20)
    assert sorted(found) == sorted(candidates.tolist())


@pytest.mark.parametrize("name", SEARCHERS)
def test_equal_seeds_ask_the_same(name) -> None:
    models, prior = np.arange(81), np.zeros(81) if name == "by_cost" else None
    first, again, other = (
        _asked(_searcher(name).begin(_SPACE, models, seed, prior), 30) for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", SEARCHERS)
def test_several_may_be_asked_before_one_is_told(name) -> None:
    search = _searcher(name).begin(_SPACE, np.arange(81), 0, np.arange(81.0))
    told = []
    for _ in range(9):
        models = [search.ask() for _ in range(9)]
        told += models
        for model in models:
            search.tell(model, _value(model))
    assert sorted(told) == list(range(81))
    assert search.ask() is None


@pytest.mark.parametrize("name", ["evolution", "reinforce", "brp", "ridge", "by_cost"])
def test_the_first_questions_are_the_top_of_the_prior(name) -> None:
    prior = np.arange(81.0)[::-1]
    assert _asked(_searcher(name).begin(_SPACE, np.arange(81), 0, prior), 5) == [0, 1, 2, 3, 4]


def test_a_prior_belongs_to_the_candidates_as_they_were_given() -> None:
    search = SEARCHERS["by_cost"]().begin(_SPACE, np.array([9, 2, 5]), 0, np.array([1.0, 3.0, 2.0]))
    assert _asked(search, 3) == [2, 5, 9]


def test_wrong_input_is_refused() -> None:
    begin = SEARCHERS["random"]().begin
    for candidates in ([], [1, 1], [81]):
        with pytest.raises(InputError, match="candidates"):
            begin(_SPACE, np.array(candidates, dtype=np.int64), 0)
    for prior in ([1.0], [np.nan, 1.0]):
        with pytest.raises(InputError, match="prior"):
            begin(_SPACE, np.array([1, 2]), 0, np.array(prior))
    with pytest.raises(InputError, match="prior"):
        SEARCHERS["by_cost"]().begin(_SPACE, np.array([1, 2]), 0)
    search = begin(_SPACE, np.array([1, 2]), 0)
    with pytest.raises(InputError, match="candidates"):
        search.tell(3, 0.5)
    with pytest.raises(InputError, match="score"):
        search.tell(1, float("nan"))


def test_random_search_treats_all_candidates_alike() -> None:
    models = np.arange(9)
    counts = np.zeros(9)
    for seed in range(900):
        counts[SEARCHERS["random"]().begin(_SPACE, models, seed).ask()] += 1
    assert ((counts - 100) ** 2 / 100).sum() < 26.1  # chi-squared of 8 degrees at 0.001


def test_local_search_moves_on_first_improvement_and_begins_anew_at_an_optimum() -> None:
    search = LocalSearch().begin(_SPACE, np.arange(81), 3, -np.abs(np.arange(81.0) - 40))
    assert search.ask() == 40  # the top of the prior
    here = 40
    search.tell(40, _value(40))
    while here != 80:
        around = set(_SPACE.neighbours(here).tolist())
        model = search.ask()
        assert model in around
        search.tell(model, _value(model))
        here = model if _value(model) > _value(here) else here
    asked = list(iter(lambda: _told(search), None))
    at_optimum = [model for model in _SPACE.neighbours(80).tolist() if model in asked]
    assert set(asked[: len(at_optimum)]) == set(at_optimum)


def _told(search) -> int | None:
    model = search.ask()
    if model is not None:
        search.tell(model, _value(model))
    return model


def test_evolution_mutates_one_slot_of_a_living_model() -> None:
    search = AgingEvolution(population=6, tournament=6).begin(_SPACE, np.arange(81), 2)
    asked = _asked(search, 6)
    for _ in range(20):
        alive = asked[-6:]
        best = max(alive, key=_value)
        model = _told(search)
        if model in _SPACE.neighbours(best):
            asked.append(model)
            continue
        near_best = set(_SPACE.neighbours(best).tolist())
        assert near_best <= set(asked)  # all of the winner's neighbours were asked
        asked.append(model)


def test_evolution_asks_again_where_it_may() -> None:
    models = np.arange(3)
    search = AgingEvolution(population=1, repeats=True).begin(Space("two", (2, 2)), models, 0)
    asked = []
    while (model := search.ask()) is not None:
        asked.append(model)
        search.tell(model, 0.5)
    assert set(asked) == {0, 1, 2}
    assert len(asked) > 3


def test_reinforce_moves_towards_what_is_good() -> None:
    search = Reinforce(lr=1.0).begin(MACRO, np.arange(6561), 0)
    for _ in range(150):
        model = search.ask()
        search.tell(model, float((MACRO.split([model])[0] == 2).mean()))
    asked = MACRO.split(search.candidates[search.told])
    assert (asked[:30] == 2).mean() < 0.5
    assert (asked[-30:] == 2).mean() > 0.7


def _one_hot_pairs(traits: np.ndarray) -> np.ndarray:
    columns = [traits[:, k] == value for k in range(traits.shape[1]) for value in range(3)]
    for (first, second), a, b in itertools.product(
        itertools.combinations(range(traits.shape[1]), 2), range(3), range(3)
    ):
        columns.append((traits[:, first] == a) & (traits[:, second] == b))
    return np.stack(columns, 1).astype(float)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_ridge_is_that_of_the_features_written_down(seed) -> None:
    rng = np.random.default_rng(seed)
    known, wanted = rng.integers(0, 3, (12, 4)), rng.integers(0, 3, (7, 4))
    scores = rng.random(12)
    features, others = _one_hot_pairs(known), _one_hot_pairs(wanted)
    assert np.allclose(shared_features(wanted, known), others @ features.T)
    normal = features.T @ features + 0.3 * np.eye(features.shape[1])
    weights = np.linalg.solve(normal, features.T @ (scores - scores.mean()))
    expected = others @ weights + scores.mean()
    assert np.allclose(fitted(known, scores, wanted, 0.3), expected, atol=1e-8)


@pytest.mark.parametrize("searcher", [Ridge(budget=20, rounds=4), BrpNas(budget=20, rounds=4)])
def test_half_a_round_is_the_predicted_top_and_half_comes_from_the_upper_part(searcher) -> None:
    search = searcher.begin(_SPACE, np.arange(81), 0)
    fixed = np.arange(81.0)
    search.predict = lambda round_number: fixed  # a model's own number
    _asked(search, 5)
    for _round in (1, 2):
        still = np.flatnonzero(search.is_open)
        asked = _asked(search, 5)
        assert asked[:3] == still[::-1][:3].tolist()
        upper = still[::-1][3 : len(still) >> _round]
        assert set(asked[3:]) <= set(upper.tolist())


def test_the_pairwise_order_is_that_of_both_orders_of_every_pair() -> None:
    with global_stream(0, "test"):
        model = PairPredictor(15, 8, 2, 0.0).eval()
        vectors = torch.randn(6, 8)
        pair = torch.cat([vectors[1], vectors[4]])
        logits = model.logits(vectors)
        assert torch.allclose(logits[1, 4], model.head(pair), atol=1e-6)
        wins = logits[..., 0] - logits[..., 1]
        order = model.order(vectors)
        assert torch.allclose(wins - wins.T, order[:, None] - order[None], atol=1e-5)


def test_the_loss_of_a_pair_is_zero_where_its_logits_are_its_scores() -> None:
    scores = torch.tensor([91.0, 92.5, 90.2])
    both = torch.stack(torch.broadcast_tensors(scores[:, None], scores[None]), -1)
    assert pair_loss(both + 3.0, scores).item() == pytest.approx(0.0, abs=1e-6)
    assert pair_loss(-both, scores).item() > 0.5


def test_the_pairwise_predictor_learns_an_order() -> None:
    searcher = BrpNas(width=16, epochs=40, batch_size=30, budget=30, rounds=1)
    search = searcher.begin(_SPACE, np.arange(81), 0)
    _asked(search, 30)
    still = np.flatnonzero(search.is_open)
    ranks = np.argsort(np.argsort(search.predict(1)[still]))
    truth = np.argsort(np.argsort([_value(model) for model in still]))
    assert np.corrcoef(ranks, truth)[0, 1] > 0.7


def test_the_global_generator_is_left_as_it_was() -> None:
    before = torch.random.get_rng_state()
    _asked(BrpNas(width=8, epochs=1, budget=8, rounds=2).begin(_SPACE, np.arange(81), 0), 10)
    assert torch.equal(before, torch.random.get_rng_state())

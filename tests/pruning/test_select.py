"""Exact counts, ties, floors and shares."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hansa.errors import InputError
from hansa.pruning import select
from hansa.pruning.select import SCOPES, count

LAYERS = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 20)), min_size=1, max_size=5)


@given(LAYERS, st.floats(0.001, 1.0), st.sampled_from(SCOPES), st.integers(0, 3))
def test_exactly_so_many_are_kept(shapes, density, scope, levels) -> None:
    """Also where nearly all scores are tied."""
    rng = torch.Generator().manual_seed(0)
    scores = {
        str(k): torch.randint(levels + 1, shape, generator=rng).float()
        for k, shape in enumerate(shapes)
    }
    total = count(density, sum(tensor.numel() for tensor in scores.values()))
    if total < len(shapes):
        with pytest.raises(InputError, match="floor"):
            select(scores, density, scope=scope)
        return
    masks = select(scores, density, scope=scope)
    assert sum(int(mask.sum()) for mask in masks.values()) == total
    assert all(mask.any() for mask in masks.values())
    for name, mask in masks.items():  # within a layer the highest are kept
        if not mask.all():
            assert scores[name][mask].min() >= scores[name][~mask].max()


def test_densities_are_the_decimals_they_print_as() -> None:
    assert count(0.02, 1000) == 20  # 1 - 0.98 is a little more
    assert count(1 - 0.98, 1000) == 20
    assert count(0.1 + 0.2, 10) == 3
    assert count(1e-9, 10) == 1


def test_global_ranks_all_layers_together_once_each_has_one() -> None:
    scores = {"a": torch.tensor([9.0, 8.0, 7.0, 6.0]), "b": torch.tensor([1.0, 2.0])}
    masks = select(scores, 0.5)
    assert masks["a"].tolist() == [True, True, False, False]
    assert masks["b"].tolist() == [False, True]


def test_ties_go_to_the_earlier() -> None:
    scores = {"a": torch.zeros(4), "b": torch.zeros(4)}
    masks = select(scores, 0.5)
    assert masks["a"].tolist() == [True, True, True, False]
    assert masks["b"].tolist() == [True, False, False, False]


def test_shares_of_layers() -> None:
    scores = {"a": torch.rand(10, 10), "b": torch.rand(10, 90), "c": torch.rand(2, 5)}
    kept = {
        scope: [int(mask.sum()) for mask in select(scores, 0.1, scope=scope).values()]
        for scope in SCOPES
    }
    assert kept["layer"] == [10, 90, 1]
    assert kept["balanced"] == [46, 45, 10]  # c is full, the rest is halved
    # 20, 100 and 7 parts of 101: 15.9, 79.5, 5.6.
    assert kept["erk"] == [16, 79, 6]


def test_floors_densities_of_layers_and_what_is_allowed() -> None:
    scores = {"a.weight": torch.arange(10.0) + 100, "b.weight": torch.arange(10.0)}
    assert int(select(scores, 0.5, floor=0.3)["b.weight"].sum()) == 3
    masks = select(scores, 0.2, densities={"a": 1.0})
    assert [int(mask.sum()) for mask in masks.values()] == [10, 2]
    within = {"a.weight": torch.arange(10) < 4, "b.weight": torch.arange(10) < 2}
    masks = select(scores, 0.25, within=within)
    assert masks["a.weight"].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert masks["b.weight"].nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"density": 0}, "density"),
        ({"density": 1.5}, "density"),
        ({"density": float("nan")}, "density"),
        ({"density": True}, "density"),
        ({"density": 0.1, "floor": 0.5}, "density"),
        ({"density": 0.1, "floor": 2}, "floor"),
        ({"density": 0.1, "scope": "nope"}, "scope"),
        ({"density": 0.1, "densities": {"nope": 0.5}}, "densities.nope"),
        ({"density": 0.1, "densities": {"a": 0}}, "densities.a"),
    ],
)
def test_wrong_input_is_refused(options, key) -> None:
    with pytest.raises(InputError) as caught:
        select({"a": torch.rand(10, 10)}, **options)
    assert caught.value.key == key


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="a with entries"):
        select({"a": torch.tensor([1.0, float("nan")])}, 0.5)

"""Spaces by arithmetic, and the graphs that predictors see."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.errors import InputError
from hansa.models import blox_space
from hansa.search.spaces import BLOX, MACRO, Space

_MIXED = Space("mixed", (2, 3, 4))


def test_numbers_are_mixed_radix_with_the_first_slot_most_significant() -> None:
    assert _MIXED.num_models == 24
    assert _MIXED.number([1, 2, 3]) == 23
    assert _MIXED.split([0, 5, 23]).tolist() == [[0, 0, 0], [0, 1, 1], [1, 2, 3]]
    assert [_MIXED.number(row) for row in _MIXED.split(range(24)).tolist()] == list(range(24))
    assert MACRO.number([2, 2, 2, 1, 2, 2, 2, 0]) == int("22212220", 3)


def test_blox_is_numbered_as_its_networks_are() -> None:
    assert BLOX.num_models == blox_space.NUM_MODELS
    models = np.arange(0, BLOX.num_models, 997)
    assert (BLOX.split(models) == blox_space.split(models)).all()
    everything = blox_space.split(range(blox_space.NUM_MODELS))
    differ = (everything != blox_space.cells_of(4242)).sum(1)
    assert sorted(BLOX.neighbours(4242)) == np.flatnonzero(differ == 1).tolist()


@given(st.integers(0, 23))
def test_neighbours_differ_in_one_slot(model) -> None:
    found = _MIXED.neighbours(model)
    assert len(set(found.tolist())) == _MIXED.num_neighbours == 6
    differing = (_MIXED.split(found) != _MIXED.split([model])).sum(1)
    assert (differing == 1).all()


@pytest.mark.parametrize("choices", [[0, 0], [0, 3, 0], [0, -1, 0], [0, 0.5, 0], [True, 0, 0]])
def test_choices_that_are_none_are_refused(choices) -> None:
    with pytest.raises(InputError, match="choices"):
        _MIXED.number(choices)


def test_numbers_that_are_no_model_are_refused() -> None:
    with pytest.raises(InputError, match=r"24.*0 to 23"):
        _MIXED.check([0, 24])


def _paths(adjacency: np.ndarray) -> list[tuple[int, ...]]:
    """Return all paths from node 1 to the last, the global node left out."""
    last = len(adjacency) - 1

    def to(node: int) -> list[tuple[int, ...]]:
        if node == 1:
            return [(1,)]
        return [(*path, node) for before in np.flatnonzero(adjacency[node]) for path in to(before)]

    return sorted(to(last))


def test_the_graph_of_blox_is_its_wiring() -> None:
    raw = [[[0], [1, 1, 1, 1]], [[1], [2, 0, 1, 1]], [[2], [0, 0, 0, 1]]]
    adjacency, features = BLOX.graph([blox_space.id_of(raw)])
    assert adjacency.shape == (1, 12, 12)
    assert features.shape == (1, 12, 15)
    first = [(1, 2, 3, 4), (1, 2, 4), (1, 3, 4)]  # both skips
    rest = [(5, 7, 8, 10, 11), (6, 7, 8, 10, 11)]  # parallel, then one operation
    assert _paths(adjacency[0]) == sorted(f + r for f in first for r in rest)
    kinds = [14, 12, 0, 1, 3, 5, 6, 7, 10, None, 11, 13]
    for node, kind in enumerate(kinds):
        assert np.flatnonzero(features[0, node]).tolist() == ([] if kind is None else [kind])
    assert np.flatnonzero(adjacency[0, 0]).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11]
    assert not adjacency[0, :, 0].any()
    assert not adjacency[0, :, 9].any()


def test_graphs_and_traits_of_different_models_differ() -> None:
    for space, models in ((BLOX, np.arange(45) * 2026), (MACRO, np.arange(0, 6561, 13))):
        adjacency, features = space.graph(models)
        flat = np.concatenate([each.reshape(len(models), -1) for each in (adjacency, features)], 1)
        assert len(np.unique(flat, axis=0)) == len(models)
        assert len(np.unique(space.traits(models), axis=0)) == len(models)
    assert BLOX.traits(range(4)).shape == (4, 12)


def test_the_graph_of_a_row_of_slots_is_a_chain() -> None:
    adjacency, features = _MIXED.graph([23])
    assert _paths(adjacency[0]) == [(1, 2, 3, 4, 5)]
    assert features[0].argmax(1).tolist() == [11, 9, 1, 4, 8, 10]
    assert features.sum() == 6

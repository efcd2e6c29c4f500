"""The space by arithmetic, and networks that are what it says."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hansa.errors import InputError
from hansa.models import blox_space as space
from hansa.models.blox import Blox, BloxCell
from hansa.search.spaces import BLOX

_README = [[[0], [1, 1, 1, 1]], [[1], [1, 1, 0, 0]], [[0], [0, 1, 1, 0]]]
_CODES = [
    [[op1], [op2, *bits]]
    for op1, op2 in itertools.product(range(3), repeat=2)
    for bits in itertools.product((0, 1), repeat=3)
]


def _cells_of_codes() -> dict[int, list[list[list[int]]]]:
    found: dict[int, list[list[list[int]]]] = {}
    for code in _CODES:
        try:
            number = space.cells_of(space.id_of([code, [[0], [0, 0, 0, 1]], [[0], [0, 0, 0, 1]]]))[
                0
            ]
        except InputError:
            continue
        found.setdefault(number, []).append(code)
    return found


def test_the_space_has_the_sizes_of_the_paper() -> None:
    assert len(_CODES) ** 3 == 373_248
    codes = _cells_of_codes()
    assert sorted(codes) == list(range(45))
    assert sum(len(each) for each in codes.values()) ** 3 == 250_047
    sizes = sorted(len(each) for each in codes.values())
    assert sizes == [1] * 39 + [2] * 3 + [6] * 3
    assert space.NUM_MODELS == 91_125
    assert len(np.unique(space.split(range(space.NUM_MODELS)), axis=0)) == 91_125


@given(st.lists(st.sampled_from(_CODES), min_size=3, max_size=3))
def test_a_vector_means_one_model_or_none(vector) -> None:
    dead = any(code[1][1:] == [0, 0, 0] for code in vector)
    if dead:
        with pytest.raises(InputError, match="nothing reaches the output"):
            space.id_of(vector)
        return
    number = space.id_of(vector)
    assert space.id_of(space.vector_of(number)) == number
    assert space.id_of_cells(space.cells_of(number)) == number
    assert tuple(space.split([number])[0]) == space.cells_of(number)


@pytest.mark.parametrize(
    ("vector", "key"),
    [
        ([], "arch_vec"),
        ("abc", "arch_vec"),
        ([[[3], [0, 1, 1, 0]]] * 3, r"arch_vec\[0\]"),
        ([_README[0], [[0], [0, 2, 0, 0]], _README[2]], r"arch_vec\[1\]"),
        ([_README[0], _README[1], [[0], [0, 1, 1]]], r"arch_vec\[2\]"),
        ([_README[0], _README[1], [[True], [0, 1, 1, 0]]], r"arch_vec\[2\]"),
    ],
)
def test_what_is_no_vector_is_refused(vector, key) -> None:
    with pytest.raises(InputError, match=key):
        space.id_of(vector)


@pytest.mark.parametrize("number", [-1, 91_125, 1.5, True, "7"])
def test_what_is_no_model_is_refused(number) -> None:
    with pytest.raises(InputError, match="model"):
        space.cells_of(number)


def test_the_order_of_a_parallel_cell_and_dead_operations_mean_nothing() -> None:
    rest = [[[1], [0, 1, 0, 0]], [[2], [1, 1, 1, 1]]]
    assert space.id_of([[[0], [2, 0, 1, 1]], *rest]) == space.id_of([[[2], [0, 0, 1, 1]], *rest])
    singles = [[[1], [op, 0, 0, 1]] for op in range(3)] + [[[op], [1, 0, 1, 0]] for op in range(3)]
    assert len({space.id_of([single, *rest]) for single in singles}) == 1
    forth, back = (space.id_of([[[a], [b, 1, 0, 0]], *rest]) for a, b in ((0, 2), (2, 0)))
    assert forth != back
    assert space.parameters([forth]) == space.parameters([back])
    assert space.multiply_adds([forth]) == space.multiply_adds([back])


@pytest.mark.parametrize(
    ("vector", "parameters", "multiply_adds"),
    [
        ([[[2], [0, 0, 0, 1]]] * 3, 1_717_636, 103_744_512),
        ([[[0], [0, 0, 0, 1]]] * 3, 2_140_772, 162_915_328),
        ([[[1], [0, 0, 0, 1]]] * 3, 2_573_988, 175_842_304),
        ([[[1], [1, 1, 0, 0]]] * 3, 3_784_036, 302_015_488),
        (_README, 3_104_164, 288_891_904),
    ],
)
def test_models_named_in_the_brief_have_its_sizes(vector, parameters, multiply_adds) -> None:
    number = space.id_of(vector)
    assert space.parameters([number])[0] == parameters
    assert space.multiply_adds([number])[0] == multiply_adds
    model = Blox((3, 32, 32), 100, vector)
    assert sum(each.numel() for each in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() == 2 * multiply_adds


def test_closed_forms_hold_for_every_cell_in_every_stage_and_other_sizes() -> None:
    # Both are sums over stages: a model for each cell, which other stages have in other turns.
    for cell in range(45):
        number = space.id_of_cells([cell, (cell + 15) % 45, (cell + 31) % 45])
        model = Blox((1, 16, 16), 10, number, width=4)
        found = sum(each.numel() for each in model.parameters())
        assert space.parameters([number], 4, 10, 1)[0] == found
        with FlopCounterMode(display=False) as counter:
            model.eval()(torch.zeros(1, 1, 16, 16))
        assert 2 * space.multiply_adds([number], 4, 16, 10, 1)[0] == counter.get_total_flops()


def test_there_are_729_cost_classes() -> None:
    everything = np.arange(space.NUM_MODELS)
    counts = space.COUNTS[space.split(everything)].reshape(len(everything), -1)
    assert len(np.unique(counts, axis=0)) == 729
    costs = space.parameters(everything), space.multiply_adds(everything)
    assert len(np.unique(np.stack(costs), axis=1).T) == 729
    assert [len(np.unique(each)) for each in costs] == [729, 540]


def test_neighbours_differ_in_one_cell() -> None:
    number = space.id_of(_README)
    found = BLOX.neighbours(number)
    assert len(set(found.tolist())) == 132
    assert ((space.split(found) != space.cells_of(number)).sum(1) == 1).all()


@pytest.mark.parametrize("bits", [(0, 0, 1), (1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1), (0, 1, 1)])
def test_a_cell_computes_what_its_bits_say(bits) -> None:
    number = space.cells_of(space.id_of([[[0], [2, *bits]], *_README[1:]]))[0]
    cell = BloxCell(number, 4).double().eval()
    maps = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    first = cell.operations[0](maps)
    expected = first
    if bits != (0, 0, 1):
        prev, inp, sc = bits
        expected = cell.operations[1](prev * first + inp * maps) + sc * first
    torch.testing.assert_close(cell(maps), expected, rtol=0, atol=0)


def test_features_are_what_passes_from_stage_to_stage() -> None:
    model = Blox((3, 16, 16), 10, _README, width=8).eval()
    inputs = torch.randn(2, 3, 16, 16)
    features = model.features(inputs)
    assert [tuple(each.shape[1:]) for each in features] == [
        (8, 16, 16),
        (16, 8, 8),
        (32, 4, 4),
        (64, 2, 2),
    ]
    for before, stage, after in zip(features, model.stages, features[1:], strict=False):
        assert torch.equal(stage(before), after)
    assert torch.equal(model(inputs), model.head(features[-1].mean((2, 3))))


@pytest.mark.parametrize(
    "options",
    [{"width": 3}, {"norm": "layer"}, {"arch": 91_125}, {"shape": (3, 12, 16)}, {"arch": [[]]}],
)
def test_networks_that_cannot_be_are_refused(options) -> None:
    with pytest.raises(InputError):
        Blox(**{"shape": (3, 16, 16), "classes": 10, "arch": 0, **options})

"""The supernet: a one-hot mixture is the cell itself, and training finds what helps."""

import numpy as np
import pytest
import torch

from hansa.errors import InputError
from hansa.models.blox import BloxCell
from hansa.models.blox_space import CELLS, cells_of
from hansa.search.gratings import gratings
from hansa.search.select import top
from hansa.search.supernet import (
    TERMS,
    MixedCell,
    Searched,
    SupernetFitting,
    _weights,
    search_supernet,
)


@pytest.fixture(scope="module")
def mixed() -> MixedCell:
    torch.manual_seed(0)
    return MixedCell(4).eval()


def _cell(mixed: MixedCell, number: int) -> BloxCell:
    cell = BloxCell(number, 4).eval()
    for own, group, op in zip(
        cell.operations, (mixed.first, mixed.second), CELLS[number].operations, strict=False
    ):
        own.load_state_dict(group[op].state_dict())
    return cell


def test_a_mixture_is_the_sum_of_its_cells(mixed) -> None:
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(45, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        outputs = torch.stack([_cell(mixed, number)(x) for number in range(45)])
        for number in range(45):
            one = torch.nn.functional.one_hot(torch.tensor(number), 45).float()
            torch.testing.assert_close(mixed(x, one), outputs[number])
        expected = (weights[:, None, None, None, None] * outputs).sum(0)
        torch.testing.assert_close(mixed(x, weights), expected)


def test_cells_differ_in_their_terms() -> None:
    assert len({tuple(row) for row in TERMS.tolist()}) == 45
    assert TERMS.sum(0).min() >= 1


def test_a_path_computes_only_what_it_needs(mixed) -> None:
    called = []
    handles = [
        each.register_forward_hook(lambda module, *_: called.append(module))
        for each in (*mixed.first, *mixed.second)
    ]
    number = next(k for k, cell in enumerate(CELLS) if str(cell) == "outer_skip(bconv, conv)")
    one = torch.nn.functional.one_hot(torch.tensor(number), 45).float()
    mixed(torch.randn(2, 4, 4, 4), one)
    for handle in handles:
        handle.remove()
    assert called == [mixed.first[2], mixed.second[0]]


def test_paths_are_drawn_by_their_probability_and_have_gradients() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.zeros(3, 45, requires_grad=True)
    with torch.no_grad():
        logits[0, 7] = 3.0  # e^3 / (e^3 + 44) = 0.313
    drawn = torch.stack([_weights(logits, 2.0, "path", rng).detach() for _ in range(2000)])
    assert ((drawn == 0) | (drawn == 1)).all()
    assert (drawn.sum(2) == 1).all()
    assert float(drawn[:, 0, 7].mean()) == pytest.approx(0.313, abs=0.04)
    (_weights(logits, 2.0, "path", rng) * torch.arange(45)).sum().backward()
    assert logits.grad is not None
    assert (logits.grad.abs() > 0).all()
    even = _weights(torch.zeros(3, 45), 1.0, "mixture", rng)
    torch.testing.assert_close(even, torch.full((3, 45), 1 / 45))


def test_what_was_found_ranks_all_models() -> None:
    probabilities = np.full((3, 45), 0.5 / 44)
    probabilities[[0, 1, 2], [3, 1, 40]] = 0.5
    found = Searched(probabilities)
    assert cells_of(found.model) == (3, 1, 40)
    assert top(found.ranking()).tolist() == [found.model]
    assert found.ranking()[found.model] == pytest.approx(3 * np.log(0.5))


@pytest.mark.parametrize("form", ["path", "mixture"])
def test_a_search_is_repeatable_and_moves_the_architecture(form) -> None:
    images, labels = gratings(32, 0, side=8)
    data = (images[:16], labels[:16]), (images[16:], labels[16:]), 12, 4, "batch"
    options = SupernetFitting(form=form, steps=2, batch_size=4, warm_up=0.4)
    seen = []
    found = search_supernet(*data, options, 1, watch=lambda *each: seen.append(each))
    assert seen == [(1, 2), (2, 2)]
    if form == "path":
        again = search_supernet(*data, options, 1)
        np.testing.assert_array_equal(found.probabilities, again.probabilities)
    np.testing.assert_allclose(found.probabilities.sum(1), 1)
    assert found.probabilities.std() > 1e-5


def test_too_few_samples_are_refused() -> None:
    images, labels = gratings(8, 0, side=8)
    with pytest.raises(InputError, match="train samples"):
        search_supernet((images, labels), (images, labels), 12)

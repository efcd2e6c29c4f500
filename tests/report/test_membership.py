"""The attack by a threshold on losses, by hand and on models that know nothing or all."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hansa.data.clients import Client
from hansa.errors import InputError
from hansa.report.membership import advantage_bound, attack, losses, membership
from support import net

VALUES = st.lists(st.integers(0, 6), min_size=1, max_size=8)


def test_four_losses_by_hand() -> None:
    """At 2 all members are let in and half of the others; at the members' mean, 1.5, one of two."""
    found = attack(torch.tensor([1.0, 2.0]), torch.tensor([1.7, 3.0]))
    assert found.advantage == pytest.approx(0.5)
    assert found.advantage_fixed == pytest.approx(0.5)
    assert found.auc == pytest.approx(3 / 4)
    assert found.tpr_at_1 == pytest.approx(0.5)
    assert (found.members, found.others) == (2, 2)


def test_equal_losses_tell_nothing() -> None:
    found = attack(torch.ones(3), torch.ones(5))
    assert (found.advantage, found.advantage_fixed, found.auc, found.tpr_at_1) == (0, 0, 0.5, 0)


def test_losses_that_are_apart_tell_all() -> None:
    found = attack(torch.tensor([0.0, 0.1]), torch.tensor([1.0, math.inf]))
    assert (found.advantage, found.auc, found.tpr_at_1) == (1, 1, 1)


@given(VALUES, VALUES)
def test_figures_are_those_of_the_definition(inside: list[int], outside: list[int]) -> None:
    found = attack(torch.tensor(inside), torch.tensor(outside))
    rates = [
        (
            sum(x <= t for x in inside) / len(inside),
            sum(x <= t for x in outside) / len(outside),
        )
        for t in range(-1, 7)
    ]
    assert found.advantage == pytest.approx(max(true - false for true, false in rates))
    assert found.tpr_at_1 == pytest.approx(max(true for true, false in rates if false <= 0.01))
    wins = sum((x < y) + (x == y) / 2 for x in inside for y in outside)
    assert found.auc == pytest.approx(wins / len(inside) / len(outside))
    assert found.advantage >= found.advantage_fixed - 1e-12


def test_a_sample_has_the_loss_of_a_batch_of_itself() -> None:
    model, inputs = net(nn.Sequential(nn.ReLU(), nn.Dropout(0.5))), torch.randn(600, 4)
    labels = torch.randint(0, 3, (600,))
    model.train()
    found = losses(model, (inputs, labels))
    assert model.training
    expected = nn.functional.cross_entropy(model.eval()(inputs), labels, reduction="none")
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_model_that_learned_its_samples_by_heart_gives_them_away() -> None:
    """Inputs say who is who: a member's own direction has the right class, another's has none."""
    inputs, labels = torch.eye(8), torch.zeros(8, dtype=torch.long)
    model = nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        model.weight.zero_()
        model.weight[0, :4] = 5.0
    client = Client.of((inputs[:4], labels[:4]), test=(inputs[4:], labels[4:]))
    assert membership(model, [client]).advantage == 1
    with torch.no_grad():
        model.weight.zero_()
    assert membership(model, [client]).advantage == 0


@pytest.mark.parametrize("odd", [torch.zeros(0), torch.tensor([math.nan])])
def test_losses_that_are_none_are_refused(odd: torch.Tensor) -> None:
    with pytest.raises(InputError, match="others"):
        attack(torch.ones(1), odd)


def test_the_bound_is_nothing_without_a_budget_and_all_without_privacy() -> None:
    assert advantage_bound(0.0, 0.0) == 0
    assert advantage_bound(math.inf, 0.0) == 1
    assert advantage_bound(math.log(3), 0.0) == pytest.approx(0.5)
    assert advantage_bound(0.0, 0.1) == pytest.approx(0.1)

"""The formulas, by hand."""

import math

import pytest
import torch

from hansa.errors import InputError
from hansa.search.distillation import (
    block_loss,
    channel_error,
    channel_variance,
    distillation_loss,
)


def _maps(*channels: tuple[float, float]) -> torch.Tensor:
    """One sample, maps of two positions."""
    return torch.tensor(channels)[None, :, :, None]


def test_block_losses_by_hand() -> None:
    teacher, student = _maps((0.0, 2.0), (0.0, 20.0)), _maps((1.0, 2.0), (0.0, 30.0))
    error, variance = channel_error(student, teacher), channel_variance(teacher)
    assert error.tolist() == [0.5, 50.0]
    assert variance.tolist() == [1.0, 100.0]
    assert float(block_loss("mse", error, variance)) == 25.25
    assert float(block_loss("nsr", error, variance)) == 0.5  # (0.5 / 1 + 50 / 100) / 2


def test_a_channel_that_says_nothing_is_divided_by_the_floor() -> None:
    error, variance = torch.tensor([0.5, 0.02]), torch.tensor([2.0, 0.0])
    # The mean variance is 1, the floor 0.01.
    assert float(block_loss("nsr", error, variance)) == pytest.approx((0.25 + 2) / 2)
    assert float(block_loss("nsr", error * 0, variance * 0)) == 0


def test_the_mean_and_nothing_predict_variance_and_signal() -> None:
    teacher = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2
    constant = teacher.mean((0, 2, 3), keepdim=True).expand_as(teacher)
    loss = block_loss("nsr", channel_error(constant, teacher), channel_variance(teacher))
    assert float(loss) == pytest.approx(1, abs=1e-5)


def test_another_loss_is_refused() -> None:
    with pytest.raises(InputError, match="'mse' or 'nsr'"):
        block_loss("l1", torch.ones(1), torch.ones(1))


def test_distillation_by_hand() -> None:
    student = torch.tensor([[0.0, 0.0]])
    teacher = torch.tensor([[math.log(3.0), 0.0]])  # 3/4, 1/4
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    loss = distillation_loss(student, teacher, torch.tensor([1]))
    assert float(loss) == pytest.approx(0.9 * divergence + 0.1 * math.log(2))
    assert float(distillation_loss(teacher, teacher, torch.tensor([0]), 1.0)) == pytest.approx(0)


def test_distillation_is_a_mean_over_samples() -> None:
    draws = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    each = [float(distillation_loss(*draws[:, k, None], labels[k, None], 0.3)) for k in range(4)]
    assert float(distillation_loss(*draws, labels, 0.3)) == pytest.approx(sum(each) / 4)

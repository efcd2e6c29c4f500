import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.federation.aggregation import WeightedMean, add_metrics

SURE = settings(deadline=None, derandomize=True)
WEIGHTS = st.lists(st.floats(1e-200, 1e200) | st.integers(1, 10**9), min_size=1, max_size=6)


def mean_of(*replies: tuple[float, torch.Tensor]) -> torch.Tensor:
    mean = WeightedMean()
    for weight, tensor in replies:
        mean.add({"t": tensor}, weight)
    return mean.result()["t"]


@SURE
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8), WEIGHTS)
def test_the_mean_of_equal_tensors_is_that_tensor_bit_for_bit(
    values: list[float], weights: list[float]
) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    mean = mean_of(*((weight, tensor) for weight in weights))
    assert mean.numpy().tobytes() == tensor.numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_equal_tensors_keep_even_the_sign_of_zero(dtype: torch.dtype) -> None:
    tensor = torch.tensor([-0.0, 0.0, 0.1, -3.0], dtype=dtype)
    mean = mean_of((0.1, tensor), (0.7, tensor), (3, tensor))
    assert torch.equal(mean, tensor)
    assert torch.equal(mean.signbit(), tensor.signbit())
    assert mean.dtype is dtype


@SURE
@given(st.integers(0, 2**32 - 1), st.lists(st.floats(0.001, 1000), min_size=1, max_size=6))
def test_the_mean_agrees_with_numpys_average(seed: int, weights: list[float]) -> None:
    values = np.random.default_rng(seed).standard_normal((len(weights), 2, 3))
    mean = mean_of(*zip(weights, map(torch.from_numpy, values), strict=True))
    np.testing.assert_allclose(
        mean.numpy(), np.average(values, axis=0, weights=weights), rtol=1e-12, atol=1e-14
    )


def test_a_reply_counts_by_its_weight() -> None:
    mean = mean_of((1, torch.tensor([1.0, 2.0])), (3, torch.tensor([4.0, 8.0])))
    assert mean.tolist() == [3.25, 6.5]


def test_sums_keep_what_float32_would_lose() -> None:
    small, large = torch.tensor([1.0]), torch.tensor([2.0**30])
    assert mean_of((1, large), (1, small), (1, -large), (1, small)).item() == 0.5


def test_names_are_averaged_apart_in_their_own_shapes_and_dtypes() -> None:
    mean = WeightedMean()
    mean.add({"a": torch.tensor(2.0), "b": torch.tensor([[1, 2]])}, 1)
    mean.add({"b": torch.tensor([[3, 8]]), "a": torch.tensor(4.0)}, 1)
    result = mean.result()
    assert result["a"].item() == 3.0
    assert result["a"].dtype is torch.float32
    assert result["b"].tolist() == [[2, 5]]
    assert result["b"].dtype is torch.int64


@pytest.mark.parametrize(
    ("one", "two", "mean"), [(1, 2, 2), (2, 3, 2), (0, 1, 0), (10, 11, 10), (-1, -2, -2), (7, 9, 8)]
)
def test_integers_are_rounded_halves_to_the_even_side(one: int, two: int, mean: int) -> None:
    assert mean_of((1, torch.tensor([one])), (1, torch.tensor([two]))).tolist() == [mean]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_are_rounded_not_cut_off_in_every_integer_dtype(dtype: torch.dtype) -> None:
    one, zero = torch.tensor([1], dtype=dtype), torch.tensor([0], dtype=dtype)
    mean = mean_of((0.75, one), (0.25, zero))
    assert mean.dtype is dtype
    assert mean.item() == 1


def test_a_weight_of_zero_adds_nothing_not_even_a_nan() -> None:
    mean = WeightedMean()
    mean.add({"t": torch.tensor([math.nan])}, 0)
    assert (mean.total, mean.result()) == (0, {})
    mean.add({"t": torch.tensor([2.0])}, 3)
    mean.add({"t": torch.tensor([math.inf])}, 0.0)
    assert mean.total == 3
    assert mean.result()["t"].tolist() == [2.0]


@pytest.mark.parametrize("weight", [-1, -1e-300, math.inf, -math.inf, math.nan])
def test_a_weight_that_is_negative_or_no_number_is_refused(weight: float) -> None:
    mean = WeightedMean()
    mean.add({"t": torch.tensor([2.0])}, 1)
    with pytest.raises(ValueError, match="finite and not negative"):
        mean.add({"t": torch.tensor([9.0])}, weight)
    assert mean.result()["t"].tolist() == [2.0]


def test_a_mean_leaves_the_replies_as_they_were() -> None:
    single, double = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0], dtype=torch.float64)
    for tensor in (single, double):
        mean_of((2, tensor), (3, tensor), (4, tensor)).zero_()
        assert tensor.tolist() == [1.0, 2.0]


def test_a_mean_can_be_read_before_the_last_reply() -> None:
    mean = WeightedMean()
    mean.add({"t": torch.tensor([2.0])}, 1)
    assert mean.result()["t"].item() == 2.0
    mean.add({"t": torch.tensor([6.0])}, 3)
    assert mean.result()["t"].item() == 5.0


def test_no_replies_have_no_mean() -> None:
    assert WeightedMean().result() == {}


def test_metrics_add_sums_and_counts_by_name() -> None:
    total = {"loss": (1.5, 3.0)}
    add_metrics(total, {"loss": (2.0, 4.0), "accuracy": (5.0, 7.0)})
    add_metrics(total, {})
    assert total == {"loss": (3.5, 7.0), "accuracy": (5.0, 7.0)}

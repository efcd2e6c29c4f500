"""Means that stream: one reply at a time, memory independent of the number of replies."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from hansa.federation.message import Tensors


class Mean(Protocol):
    """What merges replies one after another."""

    def add(self, tensors: Tensors, weight: float) -> None:
        """Add one reply; a weight of zero adds nothing."""
        ...

    def result(self) -> dict[str, torch.Tensor]:
        """Return what they come to, in each tensor's own dtype."""
        ...


class PartialMean(Protocol):
    """What merges replies of which each shares some entries."""

    def add(self, tensors: Tensors, mask: Tensors, weight: float) -> None:
        """Add one reply: tensors of full shape, and masks that are False where they count."""
        ...

    def sent(self) -> dict[str, torch.Tensor]:
        """Return bool tensors, True where somebody shares an entry."""
        ...

    def result(self, vacant: Tensors) -> dict[str, torch.Tensor]:
        """Return what they come to, and ``vacant`` where nobody shares."""
        ...


class WeightedMean:
    """The weighted mean of named tensors, summed in float64 in the order of arrival.

    In float64 the mean of equal float32 tensors is that tensor, bit for bit, whatever the weights.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._sums: dict[str, torch.Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, tensors: Tensors, weight: float) -> None:
        """Add one reply; a weight of zero adds nothing.

        Raises:
            ValueError: a negative or non-finite weight.
        """
        check_weight(weight)
        if weight == 0:
            return
        self.total += weight
        for name, tensor in tensors.items():
            if name in self._sums:
                self._sums[name].add_(tensor, alpha=weight)
            else:  # not added to zeros, which would lose the sign of -0.0
                self._sums[name] = tensor.double() * weight
                self._dtypes[name] = tensor.dtype

    def result(self) -> dict[str, torch.Tensor]:
        """Return the mean in each tensor's own dtype; integers are rounded."""
        means = {}
        for name, total in self._sums.items():
            mean, dtype = total / self.total, self._dtypes[name]
            means[name] = (mean if dtype.is_floating_point else mean.round()).to(dtype)
        return means


class MaskedMean:
    """Entry by entry the weighted mean over those who share it, summed in float64 as they come.

    Args:
        like: name -> tensor whose shapes and dtypes the mean takes.
    """

    def __init__(self, like: Tensors) -> None:
        self._like = like
        # -0.0 is what adds nothing to any number, 0.0 included.
        self._sums = {n: torch.full(t.shape, -0.0, dtype=torch.float64) for n, t in like.items()}
        self._weights = {n: torch.zeros(t.shape, dtype=torch.float64) for n, t in like.items()}

    def add(self, tensors: Tensors, mask: Tensors, weight: float) -> None:
        """Add one reply: tensors of full shape, and masks that are False where they count.

        Raises:
            ValueError: a negative or non-finite weight.
        """
        check_weight(weight)
        for name, tensor in tensors.items():
            self._sums[name] += torch.where(mask[name], -0.0, tensor.double() * weight)
            self._weights[name] += ~mask[name] * weight

    def sent(self) -> dict[str, torch.Tensor]:
        """Return bool tensors, True where somebody shares an entry."""
        return {name: weights > 0 for name, weights in self._weights.items()}

    def result(self, vacant: Tensors) -> dict[str, torch.Tensor]:
        """Return the mean in each tensor's own dtype, and ``vacant`` where nobody shares."""
        means = {}
        for name, total in self._sums.items():
            weights, dtype = self._weights[name], self._like[name].dtype
            mean = total / weights
            mean = (mean if dtype.is_floating_point else mean.nan_to_num().round()).to(dtype)
            means[name] = torch.where(weights > 0, mean, vacant[name])
        return means


def check_weight(weight: float) -> None:
    """Refuse a weight that no mean can take.

    Raises:
        ValueError: it is negative or not finite.
    """
    if not 0 <= weight < float("inf"):
        raise ValueError(f"a weight must be finite and not negative, not {weight}")


def flattened(groups: Mapping[str, Tensors]) -> dict[str, torch.Tensor]:
    """Return the tensors of all groups under ``GROUP/NAME``: one thing to be merged."""
    return {f"{group}/{n}": tensor for group, ts in groups.items() for n, tensor in ts.items()}


def regrouped(tensors: Tensors, groups: Iterable[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Return tensors that ``flattened`` has put together in their groups, empty ones as well."""
    found: dict[str, dict[str, torch.Tensor]] = {group: {} for group in groups}
    for key, tensor in tensors.items():
        group, _, name = key.partition("/")
        found[group][name] = tensor
    return found


def add_metrics(
    total: dict[str, tuple[float, float]], metrics: Mapping[str, tuple[float, float]]
) -> None:
    """Add metrics given as (sum, count) to running totals, in place."""
    for name, (value, count) in metrics.items():
        before = total.get(name, (0.0, 0.0))
        total[name] = (before[0] + value, before[1] + count)

"""Clients in stacks against clients one by one: the same numbers, whatever their sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hansa.data.clients import Client
from hansa.federation.engines.local import LocalEngine, RoundResult
from hansa.federation.engines.plan import Plan
from hansa.federation.methods import METHODS, Method
from hansa.federation.optimizer import Training
from hansa.federation.tree import Tree
from support import FEATURES, engine, net, run

SIZES = (7, 3, 12, 7, 1, 6, 9)


def ragged(sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float64) -> dict[str, Client]:
    """Clients of unequal sizes, the test data as well."""
    made = {}
    for k, size in enumerate(sizes):
        rng = torch.Generator().manual_seed(k)
        inputs = torch.randn(size + 10 + k, FEATURES, generator=rng).to(dtype)
        labels = (inputs[:, k % FEATURES] > 0).long() + (inputs[:, (k + 1) % FEATURES] > 0).long()
        made[f"c{k}"] = Client.of(
            (inputs[:size], labels[:size]),
            test=(inputs[size:], labels[size:]),
            validation=(inputs[size : size + 4], labels[size : size + 4]),
        )
    return made


def both(
    method: Method, rounds: int = 5, stack: int = 4, **options: object
) -> tuple[LocalEngine, LocalEngine, list[RoundResult], list[RoundResult]]:
    """The same run, client by client and in stacks."""
    options.setdefault("data", ragged())
    options.setdefault("model", net().double())
    engines = [
        engine(method, plan=Plan(kind, size), **options)  # type: ignore[arg-type]
        for kind, size in (("sequential", 1), ("stacked", stack))
    ]
    first, second = (run(each, rounds) for each in engines)
    return engines[0], engines[1], first, second


def assert_equal(one: LocalEngine, other: LocalEngine, tolerance: float = 1e-9) -> None:
    for path in one.tree.walk():
        first, second = one.state(path), other.state(path)
        assert first.groups.keys() == second.groups.keys()
        for group, tensors in first.groups.items():
            assert tensors.keys() == second.group(group).keys()
            for name, tensor in tensors.items():
                other_tensor = second.group(group)[name]
                if tensor.dtype.is_floating_point:
                    torch.testing.assert_close(other_tensor, tensor, rtol=0, atol=tolerance)
                else:
                    assert torch.equal(other_tensor, tensor), (path, group, name)


@pytest.mark.parametrize("name", METHODS)
def test_stacked_is_sequential_after_20_rounds(name: str) -> None:
    one, other, first, second = both(METHODS[name](), rounds=20)
    assert other._workers._stack.failure == ""  # type: ignore[attr-defined]
    assert_equal(one, other)
    for a, b in zip(first, second, strict=True):
        assert [v.path for v in a.visits] == [v.path for v in b.visits]
        for x, y in zip(a.visits, b.visits, strict=True):
            assert (x.down, x.fate) == (y.down, y.fate)
            assert x.up == pytest.approx(y.up, abs=64)  # a loss is written with all its digits
            for metric, value in x.metrics.items():
                assert y.metrics[metric] == pytest.approx(value, abs=1e-6)
        for path, splits in a.scores.items():
            for split, metrics in splits.items():
                for metric, value in metrics.items():
                    assert b.scores[path][split][metric] == pytest.approx(value, abs=1e-6)

"""Derivatives of a value by tensors that may have no part in it."""

from collections.abc import Sequence

import torch


def derivatives(
    value: torch.Tensor, leaves: Sequence[torch.Tensor], create_graph: bool = False
) -> tuple[torch.Tensor, ...]:
    """Return the derivative by each leaf, zero where it has no part in the value."""
    return torch.autograd.grad(
        value, leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )

"""Batch-innermost tensors: [batch, channels, height, width] whose memory has the batch last.

The layout is nothing but strides. Whatever does not know it computes the same numbers from it, and
PyTorch's elementwise operations keep it, so no result depends on who knows of it and who does not.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hansa.sparse.kernels import kernels


def is_inner(x: torch.Tensor) -> bool:
    """Tell whether the batch lies innermost, in a float32 tensor on the CPU that has no gaps."""
    return x.dtype is torch.float32 and x.device.type == "cpu" and base(x).is_contiguous()


def is_last(x: torch.Tensor) -> bool:
    """Tell whether maps lie channels-last, and not contiguous as well."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return last and not x.is_contiguous()


def base(x: torch.Tensor) -> torch.Tensor:
    """Return a view [..., batch] of a tensor [batch, ...]."""
    return x.movedim(0, -1)


def logical(x: torch.Tensor) -> torch.Tensor:
    """Return a view [batch, ...] of a tensor [..., batch]."""
    return x.movedim(-1, 0)


def to_inner(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor [batch, ...] with the batch innermost; gradients pass through."""
    if is_inner(x):
        return x
    inner: torch.Tensor = _ToInner.apply(x)
    return inner


def inner_base(x: torch.Tensor) -> torch.Tensor:
    """Return contiguous [..., batch] of a tensor [batch, ...], outside of any gradient."""
    if is_inner(x):
        return base(x)
    return _transposed(x.contiguous().view(len(x), -1)).view(*x.shape[1:], len(x))


def outer(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy [batch, ...] of a batch-innermost tensor."""
    return _transposed(base(x).reshape(-1, len(x))).view(x.shape)


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    found = kernels()
    if found is None:
        return matrix.t().contiguous()
    out = matrix.new_empty(matrix.shape[::-1])
    found.call("transpose", matrix, out, *matrix.shape, torch.get_num_threads())
    return out


def unaliased(inner: torch.Tensor) -> torch.Tensor:
    """Return a tensor [batch, ...] of the memory of [..., batch], which is no view to autograd.

    So it may be changed in place, as by ``ReLU(inplace=True)``, where a function returns it.
    """
    view = logical(inner)
    storage = view.untyped_storage()
    return inner.new_empty(0).set_(storage, view.storage_offset(), view.shape, view.stride())


class _ToInner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return unaliased(inner_base(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: torch.Tensor) -> torch.Tensor:
        return outer(d) if is_inner(d) else d

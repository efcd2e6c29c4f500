"""Normalisation, the residual that is added to it and the ReLU that follows, as one function."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from hansa.sparse.kernels import kernels, required
from hansa.sparse.layout import base, inner_base, is_inner, logical, unaliased
from hansa.sparse.thresholds import plain


class BatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d that takes a residual and a ReLU with it."""

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, relu: bool = False
    ) -> torch.Tensor:
        """Return ``relu(norm(x) + residual)``, by the kernels where the batch lies innermost.

        Args:
            x: [batch, channels, height, width].
            residual: what is added before the ReLU, of x's shape, or nothing.
            relu: whether a ReLU follows.
        """
        usual = not self.training or self.momentum is None or x.numel() <= x.shape[1]
        if usual or not _fits(self, x, residual):
            return _after(super().forward(x), residual, relu)
        running: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            running = (self.running_mean, self.running_var)
        y: torch.Tensor = _Normalise.apply(
            x, residual, self.weight, self.bias, *running, 0, relu, self.momentum, self.eps
        )
        return y


class GroupNorm(nn.GroupNorm):
    """A GroupNorm that takes a residual and a ReLU with it."""

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, relu: bool = False
    ) -> torch.Tensor:
        """Return ``relu(norm(x) + residual)``, as ``BatchNorm2d`` does."""
        if not _fits(self, x, residual):
            return _after(super().forward(x), residual, relu)
        y: torch.Tensor = _Normalise.apply(
            x, residual, self.weight, self.bias, None, None, self.num_groups, relu, 0.0, self.eps
        )
        return y


def _fits(norm: nn.Module, x: torch.Tensor, residual: torch.Tensor | None) -> bool:
    """Tell whether the kernels can do it."""
    if kernels() is None or x.dim() != 4 or not x.numel() or not plain(x) or not is_inner(x):
        return False
    own = [t for t in (*norm.parameters(), *norm.buffers()) if t.dim()]
    channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
    if x.shape[1] != channels or not all(plain(t) and t.is_contiguous() for t in own):
        return False
    return residual is None or (residual.shape == x.shape and plain(residual))


def _after(y: torch.Tensor, residual: torch.Tensor | None, relu: bool) -> torch.Tensor:
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        mean_so_far: torch.Tensor | None,
        variance_so_far: torch.Tensor | None,
        groups: int,
        relu: bool,
        momentum: float,
        epsilon: float,
    ) -> torch.Tensor:
        channels, height, width, batch = base(x).shape
        x, y = base(x), torch.empty_like(base(x))
        added = None if residual is None else inner_base(residual)
        mean, inverse = x.new_empty(2, groups * batch or channels)
        found, threads = required(), torch.get_num_threads()
        common = (x, added, scale, shift, y, mean, inverse)
        sizes: tuple[int, ...]
        if groups:
            sizes = (channels, groups, height * width, batch)
            found.call("group_norm", *common, *sizes, int(relu), float(epsilon), threads)
        else:
            sizes = (channels, height * width * batch)
            state = (mean_so_far, variance_so_far)
            rates = (float(momentum), float(epsilon))
            found.call("batch_norm", *common, *state, *sizes, int(relu), *rates, threads)
        ctx.save_for_backward(x, y if relu else None, scale, mean, inverse)
        ctx.sizes, ctx.groups, ctx.relu = sizes, groups, relu
        ctx.residual, ctx.shift = residual is not None, shift is not None
        return unaliased(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, y, scale, mean, inverse = ctx.saved_tensors
        d, dx = inner_base(d), torch.empty_like(x)
        dresidual = torch.empty_like(x) if ctx.residual and ctx.relu else None
        dscale = None if scale is None else torch.empty_like(scale)
        dshift = x.new_empty(len(x)) if ctx.shift else None
        found, threads = required(), torch.get_num_threads()
        name = "group_norm_back" if ctx.groups else "batch_norm_back"
        found.call(
            name,
            *(d, x, y, scale, mean, inverse, dx, dresidual, dscale, dshift),
            *(*ctx.sizes, int(ctx.relu), threads),
        )
        added = None
        if ctx.residual:
            added = logical(d if dresidual is None else dresidual)
        return logical(dx), added, dscale, dshift, None, None, None, None, None, None

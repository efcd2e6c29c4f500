"""Normalisation, the residual that is added to it and the ReLU that follows, as one function."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from hansa.sparse.kernels import kernels, required
from hansa.sparse.layout import inner_base, is_inner, is_last
from hansa.sparse.thresholds import plain

LEAST = 1 << 19
"""Elements from which channels-last maps go to the kernel: calling it costs more than PyTorch's."""


class BatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d that takes a residual and a ReLU with it."""

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, relu: bool = False
    ) -> torch.Tensor:
        """Return ``relu(norm(x) + residual)``.

        By the kernels where the batch or, as in channels-last, the channels lie innermost.

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


def _fits(norm: BatchNorm2d | GroupNorm, x: torch.Tensor, residual: torch.Tensor | None) -> bool:
    """Tell whether the kernels can do it."""
    if kernels() is None or x.dim() != 4 or not x.numel() or not plain(x):
        return False
    if not is_inner(x) and (isinstance(norm, nn.GroupNorm) or x.numel() < LEAST or not is_last(x)):
        return False
    own: tuple[torch.Tensor | None, ...] = norm.weight, norm.bias
    if isinstance(norm, nn.GroupNorm):
        channels = norm.num_channels
    else:
        channels, own = norm.num_features, (*own, norm.running_mean, norm.running_var)
    if x.shape[1] != channels:
        return False
    if not all(each is None or (plain(each) and each.is_contiguous()) for each in own):
        return False
    return residual is None or (residual.shape == x.shape and plain(residual))


def _after(y: torch.Tensor, residual: torch.Tensor | None, relu: bool) -> torch.Tensor:
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def _memory(x: torch.Tensor, last: bool) -> torch.Tensor:
    """Return maps as the kernels take them: [batch, ..., channels], or [channels, ..., batch]."""
    if last:
        return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return inner_base(x)


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
        batch, channels, height, width = x.shape
        last, y = not is_inner(x), torch.empty_like(x)  # which keeps the layout
        added = None if residual is None else _memory(residual, last)
        mean, inverse = x.new_empty(2, groups * batch or channels)
        found, threads = required(), torch.get_num_threads()
        common = (_memory(x, last), added, scale, shift, _memory(y, last), mean, inverse)
        sizes: tuple[int, ...]
        if groups:
            sizes = (channels, groups, height * width, batch)
            found.call("group_norm", *common, *sizes, int(relu), float(epsilon), threads)
        else:
            sizes = (channels, height * width * batch)
            state = (mean_so_far, variance_so_far)
            rates = (float(momentum), float(epsilon))
            name = "batch_norm_last" if last else "batch_norm"
            found.call(name, *common, *state, *sizes, int(relu), *rates, threads)
        # Channels-last, where nothing was added, x tells what the ReLU let pass.
        read = y if relu and not (last and residual is None) else None
        ctx.save_for_backward(x, read, scale, shift, mean, inverse)
        ctx.sizes, ctx.groups, ctx.relu, ctx.last = sizes, groups, relu, last
        ctx.residual = residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, y, scale, shift, mean, inverse = ctx.saved_tensors
        dx = torch.empty_like(x)
        dresidual = torch.empty_like(x) if ctx.residual and ctx.relu else None
        dscale = None if scale is None else torch.empty_like(scale)
        dshift = None if shift is None else torch.empty_like(shift)
        found, threads = required(), torch.get_num_threads()
        name = "group_norm_back" if ctx.groups else "batch_norm_back"
        lines: tuple[torch.Tensor | None, ...] = scale, mean, inverse
        if ctx.last:
            name, lines = "batch_norm_last_back", (scale, shift, mean, inverse)
        incoming, read, out, written, added = (
            None if t is None else _memory(t, ctx.last) for t in (d, x, y, dx, dresidual)
        )
        found.call(
            name,
            *(incoming, read, out, *lines, written, added, dscale, dshift),
            *(*ctx.sizes, int(ctx.relu), threads),
        )
        if ctx.residual and dresidual is None:
            dresidual = d
        return dx, dresidual, dscale, dshift, None, None, None, None, None, None

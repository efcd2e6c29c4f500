"""The step of sparse training as autograd functions: the reference, and the compiled one.

SWAT (Raihan and Aamodt, NeurIPS 2020, section 3): the output and the input's gradient are computed
with the kept weights and what is dense otherwise; the weight's gradient is that of the kept
inputs, and dense, so that weights which are not kept move as well and can come back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from hansa.sparse.convolution import Convolution, Geometry
from hansa.sparse.kernels import kernels
from hansa.sparse.layout import inner_base, is_last, logical, unaliased
from hansa.sparse.thresholds import is_wrapped, plain, pruned

Pair = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """How a convolution is taken: stride, padding, dilation, groups."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


class Reference(torch.autograd.Function):
    """The step in PyTorch's own operations: any dtype, any device, under ``vmap`` as well.

    Arguments: inputs [batch, channels, height, width] or [batch, features]; weight; bias or None;
    the scalar thresholds of weights and inputs; the shape of a convolution, None for a linear
    layer; whether only kept weights have a gradient (of all inputs then).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        least_weight: torch.Tensor,
        least_input: torch.Tensor,
        shape: Shape | None,
        fixed: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the output, and what is kept of inputs and weight."""
        used = pruned(weight, least_weight)
        held = x.clone() if fixed else pruned(x, least_input)
        if shape is None:
            return F.linear(x, used, bias), held, used
        y = F.conv2d(x, used, None, *_arguments(shape))
        if bias is not None:  # apart: under `vmap` autocast forgets it
            y = y + bias.to(y.dtype)[:, None, None]
        return y, held, used

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Keep the kept: the dense inputs may go."""
        _, held, used = output
        ctx.mark_non_differentiable(held, used)
        ctx.save_for_backward(held, used)
        ctx.shape, ctx.fixed, ctx.biased = inputs[5], inputs[6], inputs[2] is not None

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of inputs, weight and bias."""
        if torch.is_grad_enabled() and not is_wrapped(d):
            raise RuntimeError("a sparse layer cannot be differentiated twice")
        return (*_gradients(ctx, d, *ctx.saved_tensors), None, None, None, None)


class Masked(torch.autograd.Function):
    """The same for tensors that stand for themselves: what needs no mask is not copied.

    Where inputs lie channels-last, the weight is turned once, for the output and both gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        least_weight: torch.Tensor,
        least_input: torch.Tensor,
        shape: Shape | None,
        fixed: bool,
    ) -> torch.Tensor:
        """Return the output."""
        turns = shape is not None and is_last(x)
        used = _turned(weight, least_weight) if turns else _kept(weight, least_weight)
        # Inputs are masked when the weight's gradient is due: until then there is one copy of them.
        ctx.save_for_backward(x, used)
        ctx.least = None if fixed else least_input.clone()  # another step may bring a new one
        ctx.shape, ctx.fixed, ctx.biased = shape, fixed, bias is not None
        ctx.turns = turns and weight.is_contiguous()
        if shape is None:
            return F.linear(x, used, bias)
        return F.conv2d(x, used, bias, *_arguments(shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of inputs, weight and bias."""
        x, used = ctx.saved_tensors
        held = x if ctx.least is None else _kept(x, ctx.least)
        dx, dw, db = _gradients(ctx, d, held, used)
        return dx, _back(dw) if ctx.turns else dw, db, None, None, None, None


def _kept(x: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Return what is kept of a tensor: itself where that is all of it."""
    return x if plain(x) and not float(least) else pruned(x, least)


def _turned(weight: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Return what is kept of a weight [outputs, inputs, height, width], channels-last."""
    found = kernels()
    if found is None or not (plain(weight) and weight.is_contiguous()):
        return _kept(weight, least).contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(weight, memory_format=torch.channels_last)
    sizes = (*weight.shape[:2], weight[0, 0].numel(), torch.get_num_threads())
    found.call("turn", weight, float(least), out.permute(0, 2, 3, 1), *sizes)
    return out


def _back(dw: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a contiguous weight as contiguous: autograd would copy it slowly."""
    found = kernels()
    if found is None or not (plain(dw) and is_last(dw)):
        return dw
    out = torch.empty_like(dw, memory_format=torch.contiguous_format)
    sizes = (len(dw), dw[0, 0].numel(), dw.shape[1], torch.get_num_threads())
    found.call("turn", dw.permute(0, 2, 3, 1), 0.0, out, *sizes)
    return out


def _gradients(
    ctx: Any, d: torch.Tensor, held: torch.Tensor, used: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the gradients of inputs, weight and bias from what was kept of both."""
    types = held.dtype, used.dtype
    held, used = held.to(d.dtype), used.to(d.dtype)  # which autocast may have lowered
    s: Shape | None = ctx.shape
    if s is None:
        dx, dw = d @ used, d.flatten(0, -2).t() @ held.flatten(0, -2)
    else:
        dx, dw, _ = torch.ops.aten.convolution_backward.default(
            *(d, held, used, None, s.stride, s.padding, s.dilation, False, (0, 0), s.groups),
            (True, True, False),
        )
    if ctx.fixed:
        dw = torch.where(used != 0, dw, 0.0)
    db = _bias_gradient(d, s).to(types[1]) if ctx.biased else None
    return dx.to(types[0]), dw.to(types[1]), db


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    least_weight: torch.Tensor,
    least_input: torch.Tensor,
    shape: Shape | None = None,
    fixed: bool = False,
) -> torch.Tensor:
    """Return the output of a sparse layer by the reference; see ``Reference``."""
    arguments = (x, weight, bias, least_weight, least_input, shape, fixed)
    if any(isinstance(each, torch.Tensor) and is_wrapped(each) for each in arguments):
        mapped: torch.Tensor = Reference.apply(*arguments)[0]
        return mapped
    output: torch.Tensor = Masked.apply(*arguments)
    return output


class Compiled(torch.autograd.Function):
    """The same on the compiled kernels, in and out with the batch innermost."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        least_weight: float,
        least_input: float,
        lists: Convolution,
        fixed: bool,
    ) -> torch.Tensor:
        """Return the output [batch, ...]."""
        weight = weight.contiguous()
        held = inner_base(x)
        ctx.version = lists.take(weight, least_weight)
        y = lists.forward(_maps(held), bias)
        ctx.save_for_backward(held, weight)
        ctx.least, ctx.lists, ctx.fixed = (least_weight, least_input), lists, fixed
        ctx.biased = bias is not None
        return unaliased(y) if x.dim() == 4 else unaliased(y.view(len(weight), -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of inputs, weight and bias."""
        held, weight = ctx.saved_tensors
        lists: Convolution = ctx.lists
        if lists.version != ctx.version:  # the layer was used again meanwhile, with other weights
            lists.take(weight, ctx.least[0])
        inner, x = _maps(inner_base(d)), _maps(held)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = logical(lists.input_gradient(inner).view(held.shape))
        if ctx.needs_input_grad[1]:
            if ctx.fixed:
                dw = lists.kept_gradient(x, inner)
            else:
                dw = lists.weight_gradient(x, ctx.least[1], inner)
            dw = dw.view(weight.shape)
        if ctx.biased and ctx.needs_input_grad[2]:
            db = inner.sum((1, 2, 3))
        return dx, dw, db, None, None, None, None


def geometry_of(x: torch.Tensor, weight: torch.Tensor, shape: Shape | None) -> Geometry:
    """Return the sizes of a layer's product on an input."""
    if shape is None:
        return Geometry(x.shape[1], 1, 1, len(weight))
    kernel = (weight.shape[2], weight.shape[3])
    sizes = (x.shape[1], x.shape[2], x.shape[3], len(weight))
    return Geometry(*sizes, kernel, shape.stride, shape.padding)


def _maps(x: torch.Tensor) -> torch.Tensor:
    """Return [channels, height, width, batch] of that, or of [features, batch]."""
    return x if x.dim() == 4 else x.view(len(x), 1, 1, -1)


def _arguments(s: Shape) -> tuple[Sequence[int], Sequence[int], Sequence[int], int]:
    return s.stride, s.padding, s.dilation, s.groups


def _bias_gradient(d: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    return d.flatten(0, -2).sum(0) if shape is None else d.sum((0, 2, 3))

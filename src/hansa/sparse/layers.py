"""Convolutions and linear layers that train sparsely, named as the layers they replace."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from hansa.sparse.convolution import Convolution, Geometry
from hansa.sparse.functions import Compiled, Shape, geometry_of, reference
from hansa.sparse.layout import base, is_inner, to_inner
from hansa.sparse.thresholds import is_wrapped, keep, plain, threshold

Path = Literal["auto", "kernels", "reference"]
THRESHOLDS = ("least_weight", "least_input", "age")
"""The buffers of a sparse layer that are no part of a model's state."""


@dataclass
class Rule:
    """What all sparse layers of a model share, and what was found out about their speed.

    Attributes:
        sparsity: share of each layer's weights that is not used, in [0, 1); None uses the weights
            as they are, zeros as zeros.
        inputs: share of each layer's inputs that the weight's gradient leaves out; None for as
            many as the weights that are zero.
        refresh: steps between new thresholds.
        fixed: whether only kept weights have a gradient.
        path: ``kernels`` or ``reference`` for every layer, or ``auto`` for the faster one.
        compiled: layer -> whether it runs on the compiled kernels; what is not here does not.
        last: whether a model whose layers all stay off the kernels trains in channels-last.
    """

    sparsity: float | None
    inputs: float | None
    refresh: int = 10
    fixed: bool = False
    path: Path = "auto"
    compiled: dict[str, bool] = field(default_factory=dict)
    last: bool = False


class _Sparse(nn.Module):
    """What both kinds share: thresholds as buffers that no state dict holds."""

    weight: torch.Tensor
    bias: Any
    least_weight: torch.Tensor
    least_input: torch.Tensor
    age: torch.Tensor

    def _share(self, name: str, rule: Rule) -> None:
        self.layer, self.rule = name, rule
        for buffer in THRESHOLDS:
            dtype = torch.int64 if buffer == "age" else self.weight.dtype
            self.register_buffer(buffer, torch.zeros((), dtype=dtype), persistent=False)
        self._lists: dict[tuple[Geometry, int], Convolution] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what each process makes for itself."""
        return {**self.__dict__, "_lists": {}}

    @property
    def shape(self) -> Shape | None:
        """How a convolution is taken; None for a linear layer."""
        return None

    def masked(self) -> torch.Tensor:
        """Return the weight with only its largest entries, as it is evaluated."""
        if self.rule.sparsity is None:
            return self.weight
        least = threshold(self.weight, self.rule.sparsity)
        return torch.where(keep(self.weight, least), self.weight, 0.0)

    def _thresholds(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the thresholds of weight and inputs, new ones every few steps."""
        if is_wrapped(self.age) or is_wrapped(x) or is_wrapped(self.weight):
            due = self.age % self.rule.refresh == 0
            fresh = self._fresh(x)
            self.least_weight.copy_(torch.where(due, fresh[0], self.least_weight))
            self.least_input.copy_(torch.where(due, fresh[1], self.least_input))
        elif int(self.age) % self.rule.refresh == 0:
            weight, inputs = self._fresh(x)
            self.least_weight.copy_(weight)
            self.least_input.copy_(inputs)
        self.age.add_(1)
        return self.least_weight, self.least_input

    def _fresh(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rule, weight = self.rule, self.weight.detach()
        least = weight.new_zeros(())
        if rule.sparsity is not None:
            least = threshold(weight, rule.sparsity)
        if rule.inputs is not None:
            return least, threshold(x, rule.inputs)
        density = keep(weight, least).double().mean()
        return least, _quantile(x, density)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output in training."""
        if x.dim() == (1 if self.shape is None else 3):  # one sample without a batch
            single: torch.Tensor = self._run(x[None])[0]
            return single
        least_weight, least_input = self._thresholds(x)
        rule = self.rule
        if not (rule.compiled.get(self.layer) and self.fits(x) and self._is_sparse()):
            return reference(
                x, self.weight, self.bias, least_weight, least_input, self.shape, rule.fixed
            )
        lists = self.lists(x)
        y: torch.Tensor = Compiled.apply(
            to_inner(x), self.weight, self.bias, least_weight.item(), least_input.item(), lists,
            rule.fixed,
        )  # fmt: skip
        return y

    def _is_sparse(self) -> bool:
        """Tell whether weights that are used as they are have enough zeros for the kernels."""
        weight = self.weight
        return self.rule.sparsity is not None or 2 * int(weight.count_nonzero()) < weight.numel()

    def lists(self, x: torch.Tensor) -> Convolution:
        """Return the compiled form of this layer for inputs of a size."""
        key = geometry_of(x, self.weight, self.shape), len(x)
        # The last used stands last; beside the usual batch there is room for one odd one.
        known = self._lists.pop(key) if key in self._lists else Convolution(*key)
        self._lists[key] = known
        if len(self._lists) > 2:
            del self._lists[next(iter(self._lists))]
        return known

    def fits(self, x: torch.Tensor) -> bool:
        """Tell whether the compiled kernels can do this layer on an input."""
        s = self.shape
        if x.dim() != (2 if s is None else 4) or x.shape[1] != self.weight.shape[1]:
            return False
        simple = s is None or (s.dilation == (1, 1) and s.groups == 1)
        if not (simple and x.numel() and all(map(plain, (x, self.weight)))):
            return False
        if self.bias is not None and not (plain(self.bias) and self.bias.is_contiguous()):
            return False
        return min(geometry_of(x, self.weight, s).out) > 0


class SparseConv2d(_Sparse, nn.Conv2d):
    """A Conv2d that trains sparsely; ``sparsify`` makes it of one."""

    @property
    def shape(self) -> Shape:
        """Stride, padding, dilation and groups."""
        if self.padding == "same":
            pairs = zip(self.dilation, self.kernel_size, strict=True)
            high, wide = (d * (k - 1) // 2 for d, k in pairs)
        else:
            high, wide = (0, 0) if isinstance(self.padding, str) else self.padding
        stride, dilation = (tuple(map(int, pair)) for pair in (self.stride, self.dilation))
        return Shape(stride, (high, wide), dilation, self.groups)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, channels, height, width]."""
        if self.training:
            return self._run(x)
        s = self.shape
        return F.conv2d(x, self.masked(), self.bias, s.stride, s.padding, s.dilation, s.groups)


class SparseLinear(_Sparse, nn.Linear):
    """A Linear that trains sparsely; ``sparsify`` makes it of one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, features]."""
        return self._run(x) if self.training else F.linear(x, self.masked(), self.bias)


class DenseConv2d(nn.Conv2d):
    """A Conv2d that stays dense beside sparse ones, and hands on the layout that they work in."""

    rule: Rule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, channels, height, width]."""
        if not (self.training and any(self.rule.compiled.values()) and plain(x)):
            return super().forward(x)
        pointwise = self.kernel_size == (1, 1) and self.padding == (0, 0) and self.groups == 1
        if not (pointwise and x.dim() == 4 and is_inner(x)):
            y = super().forward(x)
            return to_inner(y) if y.dim() == 4 and plain(y) else y
        # A kernel of one pixel is a product of matrices over all pixels of all samples.
        rows, columns = self.stride
        pixels = base(x)[:, ::rows, ::columns]
        y = self.weight.flatten(1) @ pixels.flatten(1)
        if self.bias is not None:
            y = y + self.bias[:, None]
        return y.view(-1, *pixels.shape[1:]).movedim(-1, 0)


def pool(function: Any, x: torch.Tensor, *args: Any, **options: Any) -> Any:
    """Return a pooling function of maps in whatever layout they come.

    With the batch innermost, channels stand where a channels-last tensor has its batch: pooled with
    both exchanged, the layout stays.
    """
    if not (x.dim() == 4 and is_inner(x)):
        return function(x, *args, **options)
    turned: Any = function(x.transpose(0, 1), *args, **options)
    if isinstance(turned, tuple):  # maxima and their places
        return tuple(each.transpose(0, 1) for each in turned)
    return turned.transpose(0, 1)


class MaxPool2d(nn.MaxPool2d):
    """A MaxPool2d that keeps the layout."""

    def forward(self, x: torch.Tensor) -> Any:
        """Return the pooled maps."""
        return pool(super().forward, x)


class AvgPool2d(nn.AvgPool2d):
    """An AvgPool2d that keeps the layout."""

    def forward(self, x: torch.Tensor) -> Any:
        """Return the pooled maps."""
        return pool(super().forward, x)


def _quantile(x: torch.Tensor, density: torch.Tensor) -> torch.Tensor:
    """Return the magnitude that a share of the entries has at least."""
    if not x.numel():
        return x.new_zeros(())
    if not is_wrapped(density):
        return threshold(x, min(1 - float(density), 1 - 1 / x.numel()))
    ranked = x.detach().abs().flatten().sort().values
    kept = ((x.numel() * density * 1e6).round() / 1e6).ceil().long()  # as `count_kept` has it
    least = ranked.gather(0, (x.numel() - kept).clamp(0, x.numel() - 1)[None])[0]
    return torch.where(kept >= x.numel(), 0.0, least)

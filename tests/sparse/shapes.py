"""Random sizes of products, and whether the kernels agree with PyTorch on one.

Run as a program it checks many of them with a library of its own: a sanitised one, say.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.sparse import functions, norm
from hansa.sparse.choice import turned
from hansa.sparse.convolution import Convolution, Geometry
from hansa.sparse.kernels import Kernels, required
from hansa.sparse.layout import to_inner
from hansa.sparse.norm import BatchNorm2d
from hansa.sparse.thresholds import keep


@dataclass(frozen=True)
class Case:
    geometry: Geometry
    batch: int
    sparsity: float
    seed: int
    biased: bool


@st.composite
def cases(draw) -> Case:
    kernel = draw(st.tuples(*[st.integers(1, 5)] * 2))
    stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (2, 1), (3, 3)]))
    padding = draw(st.tuples(*[st.integers(0, 3)] * 2))
    least = [max(1, k - 2 * p) for k, p in zip(kernel, padding, strict=True)]
    high, wide = (draw(st.integers(n, n + 9)) for n in least)
    inputs = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 40]))
    outputs = draw(st.sampled_from([1, 3, 16, 31, 33, 65]))
    batch = draw(st.sampled_from([1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 70]))
    sparsity = draw(st.sampled_from([0.0, 0.5, 0.9, 0.99]))
    geometry = Geometry(inputs, high, wide, outputs, kernel, stride, padding)
    return Case(geometry, batch, sparsity, draw(st.integers(0, 99)), draw(st.booleans()))


def check(case: Case, library: Kernels) -> None:
    """Compare all four products with PyTorch's in float64."""
    g, random = case.geometry, torch.Generator().manual_seed(case.seed)
    x = torch.randn(case.batch, g.inputs, g.height, g.width, generator=random)
    weight = torch.randn(g.outputs, g.inputs, *g.kernel, generator=random)
    bias = torch.randn(g.outputs, generator=random) if case.biased else None
    d = torch.randn(case.batch, g.outputs, *g.out, generator=random)
    least_weight = float(weight.abs().quantile(case.sparsity))
    least_input = float(x.abs().quantile(case.sparsity)) if x.numel() < 1e6 else 0.5
    used = torch.where(keep(weight, torch.tensor(least_weight)), weight, 0.0).double()
    held = torch.where(keep(x, torch.tensor(least_input)), x, 0.0).double()

    lists = Convolution(g, case.batch, library)
    lists.take(weight, least_weight)
    assert lists.kept == used.count_nonzero()
    inner, inner_d = (t.permute(1, 2, 3, 0).contiguous() for t in (x, d))
    found = (
        lists.forward(inner, bias).permute(3, 0, 1, 2),
        lists.input_gradient(inner_d).permute(3, 0, 1, 2),
        lists.weight_gradient(inner, least_input, inner_d),
        lists.kept_gradient(inner, inner_d),
    )

    def back(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        numbers = (g.stride, g.padding, (1, 1), False, (0, 0), 1, (True, True, False))
        return torch.ops.aten.convolution_backward(d.double(), inputs, used, None, *numbers)

    output = torch.nn.functional.conv2d(
        x.double(), used, None if bias is None else bias.double(), g.stride, g.padding
    )
    masked = torch.where(used != 0, back(x.double())[1], 0.0)
    for one, other in zip(found, (output, *back(held)[:2], masked), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-3)


def check_around(case: Case) -> None:
    """Compare normalisation in both layouts, and a weight turned to and fro, with PyTorch's."""
    g, random = case.geometry, torch.Generator().manual_seed(case.seed)
    shape = (case.batch, g.outputs, *g.out)
    x, residual, d = (torch.randn(shape, generator=random) for _ in range(3))
    if x.numel() > g.outputs:  # a variance needs two
        wanted = _normalised(torch.nn.BatchNorm2d(g.outputs).double(), x, residual, d, case.biased)
        for layout in (to_inner, turned):
            ours = BatchNorm2d(g.outputs)
            found = _normalised(ours, x, residual, d, case.biased, layout)
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3)
    weight = torch.randn(g.outputs, g.inputs, *g.kernel, generator=random)
    least = weight.abs().quantile(case.sparsity)
    last = functions._turned(weight, least)
    torch.testing.assert_close(last, torch.where(keep(weight, least), weight, 0.0), rtol=0, atol=0)
    torch.testing.assert_close(functions._back(last), last, rtol=0, atol=0)


def _normalised(
    layer: torch.nn.Module,
    x: torch.Tensor,
    residual: torch.Tensor,
    d: torch.Tensor,
    added: bool,
    layout: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Return output and all gradients of normalisation, residual and ReLU."""
    dtype = next(layer.parameters()).dtype
    leaves = [each.to(dtype).requires_grad_() for each in (x, residual)[: 1 + added]]
    if layout is None:
        y = torch.relu(sum(leaves[1:], layer(leaves[0])))
    else:
        y = layer(layout(leaves[0]), *leaves[1:], relu=True)
    return [y, *torch.autograd.grad(y, [*leaves, *layer.parameters()], d.to(dtype))]


def main(count: int) -> None:
    """Check so many cases with the widest instruction set of processor and library."""
    library, checked = required(), 0
    norm.LEAST = 1

    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(cases())
    def run(case: Case) -> None:
        nonlocal checked
        check(case, library)
        check_around(case)
        checked += 1

    run()
    print(f"{library.path.name} {library.isa} {checked}")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    main(int(sys.argv[1]))

"""SWAT's step: by hand, by the reference, by the kernels (ZeroFL's acceptance tests 1 and 9)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hansa.models.images import CNN, ResNet18, ResNet20
from hansa.sparse import kernels
from hansa.sparse import norm as norm_module
from hansa.sparse.choice import turned
from hansa.sparse.convert import sparsify
from hansa.sparse.functions import Shape, reference
from hansa.sparse.layout import is_inner, is_last, to_inner
from hansa.sparse.norm import BatchNorm2d, GroupNorm

needs_kernels = pytest.mark.skipif(kernels.kernels() is None, reason=kernels.find()[1])
SHAPE = (3, 16, 16)


def test_the_step_by_hand() -> None:
    """Kept weights 3 and -2, kept inputs 4 and -3, on a linear layer of one output."""
    x = torch.tensor([[1.0, 4.0, -3.0, 2.0]], requires_grad=True)
    weight = torch.tensor([[3.0, 0.5, -2.0, 1.0]], requires_grad=True)
    y = reference(x, weight, None, torch.tensor(2.0), torch.tensor(3.0))
    assert y.item() == 1 * 3 + 3 * 2
    y.backward(torch.tensor([[10.0]]))
    assert x.grad.tolist() == [[30.0, 0.0, -20.0, 0.0]]  # the kept weights
    assert weight.grad.tolist() == [[0.0, 40.0, -30.0, 0.0]]  # the kept inputs, 0.5 included
    weight.grad = None
    fixed = reference(x, weight, None, torch.tensor(2.0), torch.tensor(3.0), None, True)
    fixed.backward(torch.tensor([[10.0]]))
    assert weight.grad.tolist() == [[10.0, 0.0, -30.0, 0.0]]  # all inputs, kept weights


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_agrees_with_pytorch_on_what_is_kept(stride) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 8, 8, generator=random, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, generator=random, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, generator=random, dtype=torch.float64, requires_grad=True)
    least = torch.tensor(1.0, dtype=torch.float64)
    y = reference(x, weight, bias, least, least, Shape((stride, stride), (1, 1)))
    d = torch.randn(y.shape, generator=random, dtype=torch.float64)
    found = torch.autograd.grad(y, (x, weight, bias), d)

    def plain(inputs: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        return F.conv2d(inputs, used, bias, stride, 1)

    masked = torch.where(weight.abs() >= 1, weight, 0.0).detach().requires_grad_()
    pruned = torch.where(x.abs() >= 1, x, 0.0).detach()
    torch.testing.assert_close(y, plain(x, masked))
    dx, db = torch.autograd.grad(plain(x, masked), (x, bias), d)
    (dw,) = torch.autograd.grad(plain(pruned, masked), masked, d)
    for one, other in zip(found, (dx, dw, db), strict=True):
        torch.testing.assert_close(one, other)
    assert (found[1][masked == 0] != 0).all()


def steps(
    model: nn.Module, count: int = 3, batch: int = 16, seed: int = 1
) -> list[dict[str, torch.Tensor]]:
    """Return loss, gradients and running statistics of a few SGD steps."""
    random = torch.Generator().manual_seed(seed)
    optimizer, found = torch.optim.SGD(model.train().parameters(), 0.05), []
    for _ in range(count):
        x = torch.randn(batch, *SHAPE, generator=random)
        loss = F.cross_entropy(model(x), torch.arange(batch) % 5)
        optimizer.zero_grad()
        loss.backward()
        state = {name: p.grad.clone() for name, p in model.named_parameters()}
        state |= {n: b.clone() for n, b in model.named_buffers() if n.endswith("running_var")}
        found.append({**state, "loss": loss.detach()})
        optimizer.step()
    return found


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return {
        "cnn": lambda: CNN(SHAPE, 5, (8, 40), 32),
        "batch": lambda: ResNet20(SHAPE, 5, width=8, norm="batch"),
        "group": lambda: ResNet18(SHAPE, 5, width=16),
        "own": Odd,
    }[name]()


class Odd(nn.Module):
    """What is in nobody's list: groups, dilation, a bias, a layer used twice, no trace."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding="same")
        self.group = nn.Conv2d(12, 12, 3, padding=1, groups=4)
        self.wide = nn.Conv2d(12, 12, 3, padding=2, dilation=2)
        self.twice = nn.Conv2d(12, 12, (3, 1), padding=(1, 0))
        self.norm = nn.BatchNorm2d(12, affine=False)
        self.pool = nn.AvgPool2d(2)
        self.mid = nn.Linear(12 * 64, 33)
        self.head = nn.Linear(33, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        if x.mean() > -1:  # a tracer stops here
            x = self.wide(F.relu(self.group(x)))
        x = self.norm(self.twice(F.relu(self.twice(x))))
        return self.head(F.relu(self.mid(self.pool(x).flatten(1))))


@needs_kernels
@pytest.mark.parametrize("batch", [16, 7])
@pytest.mark.parametrize("name", ["cnn", "batch", "group", "own"])
def test_kernels_give_what_the_reference_gives(name, batch) -> None:
    compiled, plain = (
        sparsify(built(name), 0.8, path=path, refresh=2) for path in ("kernels", "reference")
    )
    both = list(zip(steps(compiled, 1, batch), steps(plain, 1, batch), strict=True))
    assert "compiled kernels" in compiled.how
    assert any(compiled.rule.compiled.values())
    for one, other in both:
        for key in other:
            # Relative to the tensor: a ReLU may flip where its input is zero but for rounding.
            scale = other[key].norm() + 1e-12
            assert (one[key] - other[key]).norm() <= 2e-2 * scale, key


@needs_kernels
@pytest.mark.parametrize("name", ["batch", "group", "cnn"])
@pytest.mark.parametrize("path", ["kernels", "reference"])
def test_sparsity_zero_is_the_dense_network(name, path) -> None:
    # Of inputs that bring no ReLU so near to zero that rounding flips it.
    sparse, dense = steps(sparsify(built(name), 0.0, path=path), seed=2), steps(built(name), seed=2)
    for one, other in zip(sparse, dense, strict=True):
        torch.testing.assert_close(one["loss"], other["loss"], rtol=1e-5, atol=1e-5)
        for key in other:
            assert (one[key] - other[key]).norm() <= 2e-2 * other[key].norm() + 1e-9, key


@needs_kernels
def test_a_layer_used_again_with_other_weights_keeps_its_gradients_apart() -> None:
    layer = sparsify(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), 0.5, path="kernels")
    layer.train()
    layer(torch.randn(4, 8))  # settles the path
    x = torch.randn(4, 8)
    first = {n: torch.randn_like(p, requires_grad=True) for n, p in layer.named_parameters()}
    second = {n: torch.randn_like(p, requires_grad=True) for n, p in layer.named_parameters()}
    call = torch.func.functional_call
    alone = torch.autograd.grad(call(layer, first, x).sum(), list(first.values()))
    y = call(layer, first, x)
    call(layer, second, x)
    together = torch.autograd.grad(y.sum(), list(first.values()))
    assert all(map(torch.equal, alone, together))


@needs_kernels
@pytest.mark.parametrize("batch", [3, 16, 21])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", ["batch", "batch, plain", "group", "group, plain"])
def test_fused_normalisation_agrees_with_pytorch(
    kind, last, added, relu, batch, monkeypatch
) -> None:
    monkeypatch.setattr(norm_module, "LEAST", 1)
    affine, shape = "plain" not in kind, (batch, 20, 9, 10)
    if kind.startswith("batch"):
        ours, theirs = BatchNorm2d(20, affine=affine), nn.BatchNorm2d(20, affine=affine)
    else:
        ours, theirs = GroupNorm(4, 20, affine=affine), nn.GroupNorm(4, 20, affine=affine)
    if affine:
        nn.init.normal_(ours.weight), nn.init.normal_(ours.bias)
        theirs.load_state_dict(ours.state_dict())
    theirs = theirs.double()
    x = torch.randn(shape) * 3 + 1
    residual = torch.randn(shape) if added else None
    d = torch.randn(shape)

    def run(norm, cast):
        leaves = [cast(x).detach().requires_grad_()]
        if residual is not None:
            leaves.append(cast(residual).detach().requires_grad_())
        if norm is ours:
            y = norm((turned if last else to_inner)(leaves[0]), *leaves[1:], relu=relu)
            assert is_last(y) if last else is_inner(y)
            by_pytorch = last and kind.startswith("group")
            assert by_pytorch or type(y.grad_fn).__name__ == "_NormaliseBackward"
        else:
            y = sum(leaves[1:], norm(leaves[0]))
            y = F.relu(y) if relu else y
        y.backward(cast(d))
        return [y, *(leaf.grad for leaf in leaves), *(p.grad for p in norm.parameters())]

    found, wanted = run(ours, lambda t: t), run(theirs, lambda t: t.double())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4)
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("layout", [to_inner, turned])
def test_normalisation_does_not_depend_on_the_number_of_threads(layout, monkeypatch) -> None:
    monkeypatch.setattr(norm_module, "LEAST", 1)
    norm, x = BatchNorm2d(20), torch.randn(21, 20, 9, 10)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            y = norm(layout(leaf), relu=True)
            found.append((y, *torch.autograd.grad(y.square().sum(), (leaf, *norm.parameters()))))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_the_reference_maps_over_clients() -> None:
    x, weights = torch.randn(3, 4, 6), torch.randn(3, 5, 6)
    least = torch.tensor([0.5, 1.0, 0.0])

    def loss(weight, x, least):
        return reference(x, weight, None, least, least).square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss))(weights, x, least)
    for k in range(3):
        torch.testing.assert_close(mapped[k], torch.func.grad(loss)(weights[k], x[k], least[k]))


def test_thresholds_live_as_long_as_they_should() -> None:
    model = sparsify(copy.deepcopy(built("cnn")), 0.9, refresh=2, path="reference").train()
    layer, seen = model.get_submodule("conv2"), []
    for _ in range(4):
        model(torch.randn(4, *SHAPE))
        seen.append((float(layer.least_weight), float(layer.least_input)))
        with torch.no_grad():
            layer.weight.mul_(2)
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert seen[2][0] == pytest.approx(4 * seen[0][0])

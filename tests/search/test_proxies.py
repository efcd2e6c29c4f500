"""Proxies against values by hand and slow direct computations."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from hansa.errors import InputError
from hansa.models.blox import Blox
from hansa.models.blox_space import multiply_adds, parameters
from hansa.search.proxies import PROXIES, Batch, proxy


def tiny() -> nn.Module:
    """A network of each kind of layer, in float64: 61 weights that count."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 2, 2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(18, 3),
    ).double()


def batches(num: int = 2, size: int = 5) -> list[Batch]:
    rng = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size + k, 1, 4, 4, generator=rng, dtype=torch.float64),
            torch.randint(3, (size + k,), generator=rng),
        )
        for k in range(num)
    ]


def gradients(module: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """By plain backward."""
    own = copy.deepcopy(module).train()
    F.cross_entropy(own(batch[0]), batch[1]).backward()
    return [p.grad for name, p in own.named_parameters() if p.dim() > 1 and p.grad is not None]


def counted(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in module.parameters() if p.dim() > 1]


@pytest.mark.parametrize("name", PROXIES)
def test_network_stays_as_it_was(name: str) -> None:
    module = tiny()
    module[1].eval()
    module[0].weight.requires_grad_(False)
    module[6].weight.grad = torch.ones_like(module[6].weight)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    stream = torch.get_rng_state()
    score = proxy(name, module, batches())
    assert math.isfinite(score)
    assert score == proxy(name, module, batches())
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert [each.training for each in module] == [True, False, *[True] * 5]
    assert not module[0].weight.requires_grad
    assert [n for n, p in module.named_parameters() if p.grad is not None] == ["6.weight"]
    assert torch.equal(module[6].weight.grad, torch.ones(3, 18))
    assert torch.equal(torch.get_rng_state(), stream)


def test_what_a_network_draws_comes_from_the_seed() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    scores = [proxy("grad_norm", module, batches(), seed) for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]


def test_synflow_by_hand() -> None:
    """|w1| = (1 2; 3 4), |w2| = (5 6), input (1, 1): R = 5*3 + 6*7 = 57, for each layer once."""
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, -2.0], [-3.0, 4.0]]))
        module[1].weight.copy_(torch.tensor([[-5.0, 6.0]]))
    data = [(torch.full((3, 2), -9.0), torch.zeros(3, dtype=torch.int64))]
    assert proxy("synflow", module, data) == pytest.approx(math.log(2 * 57), abs=1e-12)


def test_synflow_passes_norms_by() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    for norm in (nn.BatchNorm2d(4), nn.GroupNorm(2, 4)):
        nn.init.constant_(norm.weight, 7)
        normed = nn.Sequential(plain[0], norm, plain[1], plain[2])
        assert proxy("synflow", normed, batches()) == proxy("synflow", plain, batches())


def test_gradients_by_hand() -> None:
    """Softmax regression from zero logits: dL/dw = mean of (p - onehot) x."""
    module = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, -2.0], [1.0, -2.0]]))
    data = [(torch.tensor([[3.0, 4.0]]), torch.tensor([0]))]  # dL/dw = ((-1.5, -2), (1.5, 2))
    assert proxy("grad_norm", module, data) == pytest.approx(math.sqrt(2 * (1.5**2 + 2**2)))
    assert proxy("snip", module, data) == pytest.approx(2 * (1.5 + 4))
    assert proxy("l2_norm", module, data) == pytest.approx(math.sqrt(10))


def test_gradients_by_backward() -> None:
    module, (first, second) = tiny(), batches()
    shares = [len(y) / (len(first[1]) + len(second[1])) for _, y in (first, second)]
    pairs = zip(gradients(module, first), gradients(module, second), strict=True)
    mean = [shares[0] * a + shares[1] * b for a, b in pairs]
    norms = sum(g.norm().item() for g in mean)
    snip = sum((w * g).abs().sum().item() for w, g in zip(counted(module), mean, strict=True))
    assert proxy("grad_norm", module, [first, second]) == pytest.approx(norms, rel=1e-12)
    assert proxy("snip", module, [first, second]) == pytest.approx(snip, rel=1e-12)


def test_grasp_by_the_whole_hessian() -> None:
    module, data = tiny(), batches()
    names = [n for n, p in module.named_parameters() if p.dim() > 1]
    shapes = {n: p for n, p in module.named_parameters() if n in names}
    flat = torch.cat([p.detach().flatten() for p in shapes.values()])

    def loss(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([p.numel() for p in shapes.values()])
        values = {n: v.view_as(p) for (n, p), v in zip(shapes.items(), parts, strict=True)}
        each = [F.cross_entropy(functional_call(module, values, (x,)), y) for x, y in data]
        sizes = torch.tensor([len(y) for _, y in data]).double()
        return (torch.stack(each) * sizes).sum() / sizes.sum()

    own = flat.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(own), own)
    expected = -(flat @ (hessian(loss, flat) @ gradient)).item()
    assert proxy("grasp", tiny(), data) == pytest.approx(expected, rel=1e-9)


def test_grasp_of_a_loss_without_curvature_is_no_error() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).double()
    data = [(x, torch.zeros_like(y)) for x, y in batches()]  # one class: the loss is always 0
    assert proxy("grasp", module, data) == 0


def test_fisher_by_differences() -> None:
    """Each sample's derivative by a channel's scale, by central differences of the loss."""
    module, (batch,) = tiny(), batches(1, 4)
    inputs, labels = batch

    def loss(layer: int, sample: int, channel: int, step: float) -> float:
        maps = inputs
        for position, part in enumerate(copy.deepcopy(module)):
            maps = part(maps)
            if position == layer:
                scale = torch.ones_like(maps)
                scale[sample, channel] += step
                maps = maps * scale
        return F.cross_entropy(maps, labels).item()

    expected, step = 0.0, 1e-5
    for layer, channels in ((0, 3), (3, 2), (6, 3)):
        for channel in range(channels):
            slopes = [
                (loss(layer, b, channel, step) - loss(layer, b, channel, -step)) / (2 * step)
                for b in range(len(labels))
            ]
            expected += 0.5 * np.mean(np.square(slopes))
    assert proxy("fisher", module, [batch]) == pytest.approx(expected, rel=1e-5)


def test_jacob_cov_by_single_samples() -> None:
    """Without a norm a sample's derivative does not depend on the others."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    data = batches()
    rows = []
    for sample in torch.cat([x for x, _ in data]):
        own = sample[None].clone().requires_grad_(True)
        module(own).sum().backward()
        rows.append(own.grad.flatten().numpy())
    values = np.linalg.eigvals(np.corrcoef(np.stack(rows))).real + 1e-5
    expected = -np.sum(np.log(values) + 1 / values)
    assert proxy("jacob_cov", module, data) == pytest.approx(expected, rel=1e-6)


def test_jacob_cov_of_a_constant_network_is_nan() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    nn.init.zeros_(module[1].weight)
    assert math.isnan(proxy("jacob_cov", module, batches()))


def test_naswot_by_comparing_codes() -> None:
    module, data = tiny(), batches()
    own, inputs = copy.deepcopy(module), torch.cat([x for x, _ in data])
    codes = [(own[:last](inputs) > 0).flatten(1) for last in (3, 5)]
    kernel = np.zeros((len(inputs), len(inputs)))
    for i in range(len(inputs)):
        for j in range(len(inputs)):
            kernel[i, j] = sum(int((code[i] == code[j]).sum()) for code in codes)
    expected = np.linalg.slogdet(kernel)[1]
    assert proxy("naswot", module, data) == pytest.approx(expected, rel=1e-12)


def test_naswot_counts_relus_by_call_and_no_order() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 30).double()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return F.relu(self.first(inputs.flatten(1)))

    torch.manual_seed(3)
    called, (batch, _) = Called(), batches()
    as_module = nn.Sequential(nn.Flatten(), called.first, nn.ReLU())
    assert proxy("naswot", called, [batch]) == proxy("naswot", as_module, [batch])
    order = torch.randperm(len(batch[1]), generator=torch.Generator().manual_seed(0))
    turned = (batch[0][order], batch[1][order])
    assert not torch.equal(turned[0], batch[0])
    own = proxy("naswot", tiny(), [batch])
    assert proxy("naswot", tiny(), [turned]) == pytest.approx(own, rel=1e-12)
    assert proxy("naswot", nn.Flatten(), [batch]) == -math.inf


def test_zico_by_weights() -> None:
    module, data = tiny(), batches(3)
    by_batch = [[g.numpy() for g in gradients(module, batch)] for batch in data]
    expected = 0.0
    for layer in range(3):
        stacked = np.stack([each[layer].ravel() for each in by_batch])
        ratios = [
            np.mean(np.abs(column)) / np.std(column) for column in stacked.T if np.std(column) > 0
        ]
        expected += math.log(sum(ratios))
    assert proxy("zico", module, data) == pytest.approx(expected, rel=1e-9)


def test_zico_leaves_out_what_does_not_vary() -> None:
    batch = batches(1)[0]
    assert proxy("zico", tiny(), [batch, batch]) == 0


def test_size_is_that_of_the_closed_forms() -> None:
    data = [(torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.int64))]
    for model in (0, 51234):
        module = Blox((3, 16, 16), 12, model, width=4)
        assert proxy("params", module, data) == parameters([model], 4, 12)[0]
        assert proxy("flops", module, data) == multiply_adds([model], 4, 16, 12)[0]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(InputError, match=r"proxy: found 'speed'; allowed: one of grad_norm, snip"):
        proxy("speed", tiny(), batches())
    with pytest.raises(InputError, match="batches: found 1; allowed: two or more"):
        proxy("zico", tiny(), batches(1))
    with pytest.raises(InputError, match="batches: found none"):
        proxy("snip", tiny(), [])

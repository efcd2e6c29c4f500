"""ProsPr against finite differences, plain loops and an unrolled graph."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call, grad

from hansa.errors import InputError
from hansa.models.images import ResNet20
from hansa.pruning import ProsPr, Snip, scores

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def smooth(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()


def batches(num: int = 4, shape: tuple[int, ...] = (4,), size: int = 7) -> Batches:
    rng = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, *shape, dtype=torch.float64, generator=rng),
            torch.randint(3, (size,), generator=rng),
        )
        for _ in range(num)
    ]


def largest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest entry."""
    assert first.keys() == second.keys()
    scale = max(float(t.abs().max()) for t in first.values())
    return max(float((first[n] - second[n]).abs().max()) for n in first) / scale


def outcome(
    model: nn.Module, data: Batches, masks: dict[str, torch.Tensor], scorer: ProsPr
) -> float:
    """The outer loss after the inner steps from masked weights, by plain PyTorch."""
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    params |= {name: params[name] * mask for name, mask in masks.items()}
    buffers = {name: torch.zeros_like(p) for name, p in params.items()}
    for x, y in data[: scorer.inner_steps]:
        leaves = {name: p.requires_grad_() for name, p in params.items()}
        loss = F.cross_entropy(functional_call(model, leaves, (x,)), y)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        for name, gradient in zip(leaves, gradients, strict=True):
            buffers[name] = scorer.momentum * buffers[name] + gradient
        params = {n: (p - scorer.inner_lr * buffers[n]).detach() for n, p in leaves.items()}
    x, y = data[scorer.inner_steps]
    return float(F.cross_entropy(functional_call(model, params, (x,)), y))


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scores_are_the_derivative_by_masks(steps: int, momentum: float) -> None:
    """Central differences along the directions of single entries."""
    model, data = smooth(), batches()
    scorer = ProsPr(inner_steps=steps, momentum=momentum, inner_lr=0.3)
    found = scores(model, data, scorer=scorer)
    ones = {name: torch.ones_like(t) for name, t in found.items()}

    def slope(direction: dict[str, torch.Tensor], width: float = 1e-4) -> float:
        sides = [
            outcome(model, data, {n: ones[n] + s * width * direction[n] for n in ones}, scorer)
            for s in (1, -1)
        ]
        return (sides[0] - sides[1]) / (2 * width)

    name = "2.weight"
    for place in (0, 7, 19):
        unit = {n: torch.zeros_like(t) for n, t in ones.items()}
        unit[name].view(-1)[place] = 1
        assert abs(slope(unit)) == pytest.approx(float(found[name].view(-1)[place]), rel=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("first_step", ["exact", "official"])
@pytest.mark.parametrize("policy", ["fresh", "one"])
def test_the_recursion_agrees_with_the_unrolled_graph(momentum, first_step, policy) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    data = batches(shape=(2, 4, 4))
    found = {}
    for order in ("exact", "unrolled"):
        options = {"momentum": momentum, "first_step": first_step, "batches": policy}
        scorer = ProsPr.model_validate({"order": order, "inner_lr": 0.5, **options})
        found[order] = scores(model, data, scorer=scorer)
    assert largest(found["exact"], found["unrolled"]) < 1e-12


def test_without_inner_steps_it_is_snip() -> None:
    model, data = smooth(), batches()
    first = scores(model, data, scorer=ProsPr(inner_steps=0))
    assert largest(first, scores(model, data, scorer=Snip())) == 0
    # And in the limit of no inner movement, SNIP on the outer batch.
    tiny = scores(model, data, scorer=ProsPr(inner_steps=1, inner_lr=1e-9))
    assert largest(tiny, scores(model, data[1:], scorer=Snip())) < 1e-6


def test_one_step_by_an_independent_hessian() -> None:
    """P * (g_1 - a H_0 g_1), H_0 as a dense matrix."""
    model, data = smooth(), batches()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def gradient(params: dict[str, torch.Tensor], k: int) -> dict[str, torch.Tensor]:
        x, y = data[k]
        return grad(lambda p: F.cross_entropy(functional_call(model, p, (x,)), y))(params)

    moved = {n: p - 0.2 * gradient(params, 0)[n] for n, p in params.items()}
    outer = gradient(moved, 1)
    sizes = [p.numel() for p in params.values()]

    def inner(flat: torch.Tensor) -> torch.Tensor:
        parts = zip(params.items(), flat.split(sizes), strict=True)
        own = {name: part.reshape(p.shape) for (name, p), part in parts}
        return F.cross_entropy(functional_call(model, own, (data[0][0],)), data[0][1])

    dense = hessian(inner, torch.cat([p.flatten() for p in params.values()]))
    product = (dense @ torch.cat([g.flatten() for g in outer.values()])).split(sizes)
    curved = dict(
        zip(
            params,
            (p.view_as(v) for p, v in zip(product, params.values(), strict=True)),
            strict=True,
        )
    )
    found = scores(model, data, scorer=ProsPr(inner_steps=1, inner_lr=0.2))
    expected = {n: (params[n] * (outer[n] - 0.2 * curved[n])).abs() for n in found}
    assert largest(found, expected) < 1e-12


def test_first_order_is_a_loop_of_sgd() -> None:
    model, data = smooth(), batches()
    scorer = ProsPr(order="first", inner_lr=0.4, momentum=0.5)
    found = scores(model, data, scorer=scorer)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.4, momentum=0.5)
    for x, y in data[:3]:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    F.cross_entropy(model(data[3][0]), data[3][1]).backward()
    expected = {
        name: (initial[name] * p.grad).abs()
        for name, p in model.named_parameters()
        if name in found and p.grad is not None
    }
    assert largest(found, expected) < 1e-12


def test_the_official_first_step_has_no_curvature() -> None:
    model, data = smooth(), batches()
    about = {"inner_steps": 1, "momentum": 0.9, "inner_lr": 0.5}
    official = scores(model, data, scorer=ProsPr(first_step="official", **about))
    first = scores(model, data, scorer=ProsPr(order="first", **about))
    exact = scores(model, data, scorer=ProsPr(**about))
    assert largest(official, first) == 0
    assert largest(exact, first) > 0.01


def test_scoring_leaves_the_model_as_it_is() -> None:
    torch.manual_seed(0)
    model = ResNet20((3, 8, 8), 3, width=4, norm="batch").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(6, 3, 8, 8, generator=rng), torch.randint(3, (6,), generator=rng))
        for _ in range(4)
    ]
    scores(model, data)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_the_same_in_both_passes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double()
    found = [
        scores(model, batches(), scorer=ProsPr(order=order, inner_lr=0.5))  # type: ignore[arg-type]
        for order in ("exact", "unrolled")
    ]
    assert largest(*found) < 1e-12


def test_unused_and_tied_and_frozen_parameters_are_legal() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.unused = nn.Linear(4, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.head = nn.Linear(4, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(self.second(torch.tanh(self.first(self.frozen(inputs)))))
            return self.head(hidden)

    torch.manual_seed(0)
    model = Odd().double()
    found = scores(model, batches())
    assert set(found) == {"unused.weight", "head.weight"}  # tied ones stay
    assert not found["unused.weight"].any()
    assert largest(found, scores(model, batches(), scorer=ProsPr(order="unrolled"))) < 1e-12


def test_attention_can_be_differentiated_twice() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Unflatten(1, (2, 4)), encoder, nn.Flatten(), nn.Linear(8, 3)).double()
    data = batches(shape=(8,))
    first, second = (
        scores(model, data, scorer=ProsPr(order=order))  # type: ignore[arg-type]
        for order in ("exact", "unrolled")
    )
    assert "1.self_attn.in_proj_weight" in first
    assert largest(first, second) < 1e-12


def test_parametrized_weights_are_left_alone() -> None:
    model = smooth()
    nn.utils.parametrizations.weight_norm(model[0])
    assert set(scores(model, batches())) == {"2.weight", "4.weight"}


@pytest.mark.parametrize(
    ("model", "data", "key"),
    [
        (nn.Sequential(nn.LayerNorm(4)), batches(), "model"),
        (smooth(), batches(3), "batches"),
        (smooth(), [(x * float("nan"), y) for x, y in batches()], "loss"),
    ],
)
def test_wrong_input_is_refused(model, data, key) -> None:
    with pytest.raises(InputError) as caught:
        scores(model, data)
    assert caught.value.key == key

"""The other scorers against hand computation, conservation laws and each other."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from hansa.errors import InputError
from hansa.models.images import VGG16, ResNet20
from hansa.pruning import (
    SCORERS,
    Force,
    Grasp,
    Magnitude,
    Objective,
    Random,
    Snip,
    SynFlow,
    find_masks,
    scores,
)
from pruning.test_prospr import batches, largest, smooth


def images(num: int = 4, side: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(2)
    return [
        (torch.randn(6, 3, side, side, generator=rng), torch.randint(10, (6,), generator=rng))
        for _ in range(num)
    ]


def test_snip_by_hand() -> None:
    """One weight per input, squared error: w = (2, -1), x = (1, 3), target 0: g = 2 (w x) x."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, -1.0]]))
    batch = (torch.tensor([[1.0, 3.0]]), torch.zeros(1, 1))
    found = scores(model, [batch], F.mse_loss, Snip())["weight"]
    assert found.tolist() == [[4.0, 6.0]]  # |2 * -2|, |-1 * -6|


def test_gradients_are_means_over_all_samples() -> None:
    model, data = smooth(), batches(3)
    uneven = [(x[: k + 2], y[: k + 2]) for k, (x, y) in enumerate(data)]
    whole = (torch.cat([x for x, _ in uneven]), torch.cat([y for _, y in uneven]))
    first = scores(model, uneven, scorer=Snip(batches=3))
    assert largest(first, scores(model, [whole], scorer=Snip())) < 1e-12


def test_snip_of_normalised_filters_sums_to_nothing() -> None:
    """A filter's scale has no part in the loss before a BatchNorm of the batch."""
    torch.manual_seed(0)
    model = ResNet20((3, 8, 8), 10, width=4, norm="batch").double()
    data = [(x.double(), y) for x, y in images(1)]
    derivative = Snip().derivative(Objective(model), data)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4:
            signed = (parameter.detach() * derivative[name]).flatten(1)
            assert float((signed.sum(1).abs() / signed.abs().sum(1)).max()) < 1e-3, name


def test_grasp_by_a_dense_hessian() -> None:
    model, (batch,) = smooth(), batches(1)
    names = ("0.weight", "2.weight", "4.weight")
    params = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [params[name].numel() for name in names]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split(sizes)
        own = {n: part.reshape(params[n].shape) for n, part in zip(names, parts, strict=True)}
        logits = functional_call(model, {**params, **own}, (batch[0],))
        return F.cross_entropy(logits / 200, batch[1])

    flat = torch.cat([params[name].flatten() for name in names])
    curvature = hessian(loss, flat)
    slope = torch.autograd.functional.jacobian(loss, flat)
    expected = flat * (curvature @ slope)
    found = scores(model, [batch], scorer=Grasp())
    mine = torch.cat([found[name].flatten() for name in names])
    assert torch.allclose(mine, expected, rtol=1e-9, atol=1e-18)


def test_synflow_is_conserved_from_layer_to_layer() -> None:
    """In a plain network without biases each layer's scores add up to R (Tanaka et al., 3)."""
    torch.manual_seed(0)
    model = VGG16((3, 16, 16), 10, width=4, norm="batch").eval()
    nn.init.zeros_(model.head.bias)
    found = scores(model, images(1, 16), scorer=SynFlow())
    sums = torch.stack([tensor.sum() for tensor in found.values()])
    assert torch.allclose(sums, sums[0].expand_as(sums), rtol=1e-9)
    masks = find_masks(model, images(1, 16), 0.005, SynFlow(), iterations=50).masks
    assert all(mask.any() for mask in masks.values())


def test_synflow_sees_no_data_and_refuses_tokens() -> None:
    model = smooth().float()
    other = [(x.float() * 5 + 1, y) for x, y in batches(1)]
    first = scores(model, [(x.float(), y) for x, y in batches(1)], scorer=SynFlow())
    assert largest(first, scores(model, other, scorer=SynFlow())) == 0
    tokens = [(torch.ones(2, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(InputError, match="synflow"):
        scores(model, tokens, scorer=SynFlow())


def test_one_iteration_of_force_is_snip_and_more_may_take_back() -> None:
    model, data = smooth(), batches(8)
    snip, force = (find_masks(model, data, 0.3, scorer).masks for scorer in (Snip(), Force()))
    assert all(torch.equal(snip[name], force[name]) for name in snip)
    for kind in (Snip, Force):
        before = None
        back = 0
        for iterations in range(1, 6):  # the same schedule, looked at after each of its steps
            density = 0.2 ** (iterations / 5)
            masks = find_masks(model, data, density, kind(), iterations=iterations).masks
            if before is not None:
                back += sum(int((masks[n] & ~before[n]).sum()) for n in masks)
            before = masks
        assert (back == 0) is (kind is Snip)


def test_what_needs_no_gradient() -> None:
    model = smooth()
    assert torch.equal(
        scores(model, [], scorer=Magnitude())["0.weight"], model[0].weight.detach().abs()
    )
    first, second = (scores(model, [], scorer=Random(), seed=seed) for seed in (0, 1))
    assert largest(first, scores(model, [], scorer=Random(), seed=0)) == 0
    assert largest(first, second) > 0


@pytest.mark.parametrize("name", list(SCORERS))
def test_every_scorer_keeps_an_exact_number_in_every_layer(name) -> None:
    torch.manual_seed(0)
    model = ResNet20((3, 8, 8), 10)
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    masks = find_masks(model, images(), 0.01, SCORERS[name](), iterations=2, seed=3).masks
    again = find_masks(model, images(), 0.01, SCORERS[name](), iterations=2, seed=3).masks
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.01 * total)
    assert all(mask.any() for mask in masks.values())
    assert all(torch.equal(masks[n], again[n]) for n in masks)


def test_iterations_go_through_the_batches_in_turn() -> None:
    seen = []

    class Spy(Snip):
        def derivative(self, objective, batches):
            seen.append([float(x[0, 0]) for x, _ in batches])
            return super().derivative(objective, batches)

    data = [
        (torch.full((2, 4), float(k), dtype=torch.float64), torch.tensor([0, 1])) for k in range(3)
    ]
    find_masks(smooth(), data, 0.5, Spy(batches=2), iterations=3)
    assert seen == [[0, 1], [2, 0], [1, 2]]

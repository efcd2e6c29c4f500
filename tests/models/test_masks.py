"""Masks as part of a model: what they live through."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from hansa.errors import InputError
from hansa.models.images import ResNet20
from hansa.models.masks import attach, finalise, masks_of
from hansa.models.task import PureTask, Task


def net() -> nn.Module:
    torch.manual_seed(0)
    return ResNet20((3, 8, 8), 5, width=4, norm="batch")


def drawn(model: nn.Module, density: float = 0.3) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(p.shape, generator=rng) < density
        for name, p in model.named_parameters()
        if p.dim() > 1
    }


def batch(num: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    return torch.randn(num, 3, 8, 8, generator=rng), torch.randint(5, (num,), generator=rng)


OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_masked_entries_stay_exactly_zero_in_training(make) -> None:
    model = net()
    before = model(batch()[0]).detach()
    masks = drawn(model)
    attach(model, masks)
    optimizer = make(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        optimizer.step()
        for name, mask in masks.items():
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            stored = module.parametrizations[attribute].original
            assert not stored[~mask].any()
            assert not torch.signbit(stored[~mask]).any()  # -0.0 would be sent as a number
            assert stored[mask].all()
    assert not torch.equal(model(batch()[0]), before)


def test_copies_states_calls_and_maps_agree() -> None:
    model = attach(net(), drawn(net()))
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()  # in grad mode, as in training
    model.eval()
    expected = model(batch()[0])
    assert torch.equal(copy.deepcopy(model)(batch()[0]), expected)
    other = attach(net(), {name: ~mask for name, mask in drawn(net()).items()}).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch()[0]), expected)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    assert torch.equal(functional_call(model, state, (batch()[0],)), expected)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in model.named_parameters()}

    inputs = batch()[0]

    def slope(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return grad(lambda p: functional_call(model, p, (inputs,)).square().sum())(params)

    for name, gradient in vmap(slope)(stacked).items():
        if name.endswith("original"):
            mask = masks_of(model)[name.replace("parametrizations.", "").removesuffix(".original")]
            assert not gradient[:, ~mask].any()
            assert gradient[:, mask].any()
    program = torch.export.export(model, (batch()[0],)).module()
    assert torch.allclose(program(batch()[0]), expected, atol=1e-6)


def test_finalise_leaves_plain_weights() -> None:
    plain = net()
    model, masks = net(), drawn(net())
    attach(model, masks)
    model.eval()
    expected = model(batch()[0])
    found = finalise(model)
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    assert torch.equal(model(batch()[0]), expected)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert masks_of(model) == {}
    for name, parameter in model.named_parameters():
        assert name not in masks or not parameter[~masks[name]].any()


def test_a_task_takes_masks_off_its_module_and_holds_to_them() -> None:
    model = attach(net(), drawn(net()))
    task = Task(model)
    assert masks_of(model)  # a copy was taken
    assert task.params.keys() == dict(net().named_parameters()).keys()
    loud = {name: p + 1 for name, p in task.params.items()}  # masked entries that are not zero
    quiet = {
        n: torch.where(task.masks[n], p, 0.0) if n in task.masks else p for n, p in loud.items()
    }
    losses = [task.loss(params, dict(task.buffers), batch())[0] for params in (loud, quiet)]
    assert torch.equal(*losses)
    for kind in (task, PureTask(task)):
        gradients, _, _ = kind.gradients(loud, task.buffers, batch())
        for name, mask in task.masks.items():
            gradient = gradients[name]
            assert gradient is not None
            assert not gradient[~mask].any()
            assert gradient[mask].any()


@pytest.mark.parametrize(
    ("masks", "match"),
    [
        ({"nope": torch.ones(2, dtype=torch.bool)}, "no such parameter"),
        ({"head.weight": torch.ones(2, dtype=torch.bool)}, "torch.bool"),
        ({"head.weight": torch.ones(5, 16)}, "torch.float32"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks, match) -> None:
    with pytest.raises(InputError, match=match):
        attach(net(), masks)


def test_tied_parameters_and_second_masks_are_refused() -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(InputError, match="tied"):
        attach(tied, {"0.weight": torch.ones(3, 3, dtype=torch.bool)})
    layer = nn.Linear(3, 3)
    shared = nn.Sequential(layer, layer)  # one layer used twice has one weight
    mask = torch.eye(3, dtype=torch.bool)
    attach(shared, {"0.weight": mask})
    assert not shared[1].weight[~mask].any()
    model = attach(net(), drawn(net()))
    with pytest.raises(InputError, match="already"):
        attach(model, drawn(net()))

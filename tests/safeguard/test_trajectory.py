import copy
import math

import peft
import pytest
import torch
from tiny_world import WORLD, setup_of, tied, tiny

from hansa.errors import InputError
from hansa.models.language import merged as merged_model
from hansa.safeguard.adversaries import Adversary, Drawn, Tampering, draw
from hansa.safeguard.loop import descend
from hansa.safeguard.losses import entropy, next_token, run
from hansa.safeguard.phases.base import retain
from hansa.safeguard.phases.tar import TAR
from hansa.safeguard.setup import Setup
from hansa.safeguard.trajectory import attack

K, EVERY = 6, 2


def harm_of(model, k):
    rows = WORLD.source("adversary").draw(4, torch.Generator().manual_seed(k))
    return next_token(run(model, rows).logits, rows)


def resist_of(model):
    rows = WORLD.source("held_out").draw(4, torch.Generator().manual_seed(99))
    return -entropy(run(model, rows).logits, rows)


def attacked(model, adversary, points, steps=K):
    drawn = Drawn(adversary, 1e-2, 0, steps)
    found = [torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
    told = attack(
        model,
        drawn,
        lambda k: harm_of(model, k),
        lambda: resist_of(model),
        points,
        found,
        torch.Generator().manual_seed(3),
    )
    return found, told


def test_the_gradient_is_the_sum_over_copies_of_the_trajectory(tiny_model):
    tar = TAR(inner_steps=K, every=EVERY)
    points = {k: 4.0 * w for k, w in tar.points().items()}
    found, told = attacked(tiny_model, Adversary(lrs=(1e-2,)), points)

    walker = copy.deepcopy(tiny_model)
    optimizer = torch.optim.AdamW(walker.parameters(), lr=1e-2, weight_decay=0.01)
    wanted = [torch.zeros_like(p) for p in walker.parameters()]
    seen = []
    for k in range(K):
        optimizer.zero_grad()
        harm_of(walker, k).backward()
        optimizer.step()
        if (k + 1) % EVERY == 0:
            at = copy.deepcopy(walker)
            loss = resist_of(at)
            seen.append(loss.item())
            gradients = torch.autograd.grad(loss, list(at.parameters()))
            weight = 4 * math.exp(4 / K * (k - (K - 1)))
            wanted = [w + weight * g for w, g in zip(wanted, gradients, strict=True)]
    assert len(points) == 3
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert math.isclose(told["resist_first"], seen[0], rel_tol=1e-5)
    assert math.isclose(told["resist_last"], seen[-1], rel_tol=1e-5)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("make", [tiny, tied])
def test_the_model_is_afterwards_as_it_was(make, rank):
    model = make()
    model.get_input_embeddings().weight.requires_grad_(make is tied)  # a frozen one, too
    model.register_buffer("counter", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, _: (module.counter.add_(1), None)[1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    was = model.training
    attacked(model, Adversary(lrs=(1e-2,), rank=rank), {K - 1: 1.0})
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in model.parameters())
    assert model.training is was
    if make is tied:
        assert model.lm_head.weight is model.transformer.wte.weight


def test_an_attack_begins_without_memory_of_the_one_before(tiny_model):
    adversary = Adversary(lrs=(1e-2,))
    first, _ = attacked(tiny_model, adversary, {K - 1: 1.0})
    again, _ = attacked(tiny_model, adversary, {K - 1: 1.0})
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_adapters_move_weights_as_peft_does(tiny_model):
    """Our adapters, which have no module, against LoRA of the library from the same values."""
    drawn = Drawn(Adversary(rank=2), 1e-2, 0, K)
    ours = copy.deepcopy(tiny_model)
    tampering = Tampering(ours, drawn, torch.Generator().manual_seed(3))
    names = [name.rpartition(".")[2] for name, m in tiny_model.named_modules() if "_proj" in name]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=sorted(set(names)))
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(tiny_model))
    pairs = [m for m in theirs.modules() if hasattr(m, "lora_A")]
    assert len(pairs) == len(tampering._adapters) == 14
    for module, adapter in zip(pairs, tampering._adapters, strict=True):
        module.lora_A["default"].weight.data.copy_(adapter.down.data)
    optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01
    )
    for k in range(K):
        for model, step in ((ours, lambda k=k: tampering.step(k)), (theirs, optimizer.step)):
            for parameter in model.parameters():
                parameter.grad = None
            harm_of(model, k).backward()
            step()
    merged = merged_model(theirs)
    for a, b in zip(ours.parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_points_of_the_released_settings():
    tar = TAR(inner_steps=64, every=4, growth=0.0625)
    points = tar.points()
    assert [k + 1 for k in points] == list(range(4, 65, 4))
    assert math.isclose(sum(points.values()), 4.438, abs_tol=5e-4)
    assert TAR().points() == points  # 4 / K is 0.0625 at K = 64
    for weights in ("normalised", "uniform"):
        assert math.isclose(sum(TAR(weights=weights).points().values()), 1.0)
    assert TAR(weights="last").points() == {63: 1.0}


def gradient_of(tar, setup, step=0):
    for parameter in setup.params:
        parameter.grad = None
    metrics = tar.begin(setup)(step)
    return [p.grad.clone() for p in setup.params], metrics


def small(**more):
    values = {
        "inner_steps": 4,
        "every": 2,
        "batch_size": 4,
        "attack_batch_size": 4,
        "adversaries": (Adversary(lrs=(1e-2,)),),
    }
    return TAR(**{**values, **more})


def test_without_inner_steps_only_what_is_kept_is_trained(tiny_model):
    setup = setup_of(tiny_model)
    found, _ = gradient_of(small(inner_steps=0), setup)
    for parameter in setup.params:
        parameter.grad = None
    retain(setup, 4, 0, representations=True)
    assert all(torch.equal(a, p.grad) for a, p in zip(found, setup.params, strict=True))


def test_tasks_are_averaged(tiny_model):
    """With two attackers who are one and the same, the mean is either's gradient."""
    setup = setup_of(tiny_model)
    one, _ = gradient_of(small(retain=0.0), setup)
    two, _ = gradient_of(small(retain=0.0, tasks=2), setup)
    # The second task draws other batches, so only the first half can be compared: by linearity
    # the mean of both lies between, and twice the mean minus the first is the second's own.
    second = [2 * b - a for a, b in zip(one, two, strict=True)]
    drawn = draw(small().adversaries, 4, 0)
    assert drawn.lr == 1e-2
    found = [torch.zeros_like(p) for p in setup.params]
    tar = small()
    points = {k: 4.0 * w for k, w in tar.points().items()}
    attack(
        tiny_model,
        drawn,
        tar._harm(setup, drawn, 0, 1),
        tar._resist(setup, 0, 1),
        points,
        found,
        torch.Generator(),
    )
    for a, b in zip(second, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_an_attack_that_diverges_is_left_out_and_told(tiny_model):
    setup = setup_of(tiny_model)
    wild = small(adversaries=(Adversary(lrs=(1e30,)),))
    found, metrics = gradient_of(wild, setup)
    calm, _ = gradient_of(small(inner_steps=0), setup)
    assert metrics["diverged"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(found, calm, strict=True))


def test_attacks_that_all_diverge_are_refused(tiny_model):
    wild = small(steps=40, adversaries=(Adversary(lrs=(1e30,)),))
    with pytest.raises(InputError, match=r"adversaries\.lrs.*first 20 steps diverged"):
        descend(wild, setup_of(tiny_model))


def test_outer_moments_do_not_see_the_attack(tiny_model):
    """After one step AdamW's first moment is a tenth of the whole gradient, and nothing else."""
    tar = small(steps=1, warm_up=0)
    setup = setup_of(tiny_model)
    wanted, _ = gradient_of(tar, setup)
    kept = []
    original = torch.optim.AdamW.step

    def step(self, *arguments):
        original(self, *arguments)
        kept.append(self)

    torch.optim.AdamW.step, before = step, original
    try:
        descend(tar, setup)
    finally:
        torch.optim.AdamW.step = before
    outer = kept[-1]
    for gradient, parameter in zip(wanted, setup.params, strict=True):
        torch.testing.assert_close(outer.state[parameter]["exp_avg"], 0.1 * gradient)
        assert outer.state[parameter]["step"] == 1


def test_draws_depend_on_the_seed_alone():
    adversaries = (Adversary(lrs=(1.0, 2.0)), Adversary(data="switch", lrs=(3.0,)))
    drawn = [draw(adversaries, 16, seed) for seed in range(200)]
    assert drawn == [draw(adversaries, 16, seed) for seed in range(200)]
    assert {each.lr for each in drawn} == {1.0, 2.0, 3.0}
    switches = [each.benign for each in drawn if each.adversary.data == "switch"]
    assert all(0 <= benign < 16 for benign in switches)
    # Beta(6, 3) has a mean of two thirds; floor takes half a step off.
    assert abs(sum(switches) / len(switches) - (16 * 2 / 3 - 0.5)) < 1
    assert not any(each.benign for each in drawn if each.adversary.data == "restricted")


def test_a_defender_never_sees_what_is_asked_for(tiny_model, monkeypatch):
    """Every row that a phase draws is of the defender's entities, or of the retained table."""
    seen = []
    original = Setup.rows

    def rows(self, part, *arguments):
        found = original(self, part, *arguments)
        seen.append((part, found.tokens))
        return found

    monkeypatch.setattr(Setup, "rows", rows)
    descend(
        small(steps=6, adversaries=(Adversary(data="switch", lrs=(1e-3,)),)), setup_of(tiny_model)
    )
    assert {part for part, _ in seen} == {"retain", "adversary", "held_out"}
    first = WORLD._first_entity + WORLD.options.entities
    allowed = {name: {int(e) + first for e in part} for name, part in WORLD.parts.items()}
    for part, tokens in seen:
        entities = {int(t) for t in tokens.flatten() if t >= first}
        assert entities <= allowed.get(part, set())

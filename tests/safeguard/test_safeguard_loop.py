import copy
import gc

import pytest
import torch
from tiny_world import WORLD, setup_of, tied, tiny
from torch.utils.flop_counter import FlopCounterMode

from hansa.errors import InputError
from hansa.safeguard import losses
from hansa.safeguard.adversaries import Adversary
from hansa.safeguard.loop import descend
from hansa.safeguard.phases import TAR
from hansa.safeguard.phases.max_entropy import MaxEntropy
from hansa.safeguard.phases.noise_distil import NoiseDistil
from hansa.safeguard.phases.pretrain import Pretrain
from hansa.safeguard.phases.random_mapping import RandomMapping
from hansa.safeguard.phases.repnoise import RepNoise
from hansa.safeguard.phases.rmu import RMU

SMALL_TAR = TAR(
    steps=6,
    lr=1e-3,
    warm_up=2,
    inner_steps=4,
    every=2,
    batch_size=4,
    attack_batch_size=2,
    adversaries=(Adversary(lrs=(1e-3, 1e-2)), Adversary(data="switch", lrs=(1e-2,), rank=2)),
)
SMALL = {"steps": 6, "lr": 1e-3, "warm_up": 2, "batch_size": 4}
PHASES = [
    SMALL_TAR,
    Pretrain(**SMALL),
    RandomMapping(**SMALL),
    RMU(**SMALL),
    MaxEntropy(**SMALL),
    RepNoise(**SMALL),
    NoiseDistil(**SMALL, forget=0.25),
]


class KilledError(Exception):
    """What ends a run at any moment."""


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.kind)
def test_an_interrupted_phase_ends_bit_for_bit_as_another(phase, tmp_path):
    whole, broken = tiny(), tiny()
    told = descend(phase, setup_of(whole))
    start = copy.deepcopy(broken)
    path = tmp_path / "checkpoint.safetensors"

    def watch(done, total, metrics):
        if done == 4:
            raise KilledError

    with pytest.raises(KilledError):
        descend(phase, setup_of(broken), path, watch, every=0.0)
    assert path.exists()
    again = copy.deepcopy(start)  # a new process has the phase's first model
    assert descend(phase, setup_of(again), path) == told
    assert len(told) == 6
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_models_checkpoint_is_refused(tmp_path):
    path = tmp_path / "checkpoint.safetensors"

    def watch(done, total, metrics):
        raise KilledError

    with pytest.raises(KilledError):
        descend(SMALL_TAR, setup_of(tiny()), path, watch, every=0.0)
    with pytest.raises(InputError, match="another model's checkpoint"):
        descend(SMALL_TAR, setup_of(tiny(hidden_size=8)), path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="no checkpoint"):
        descend(SMALL_TAR, setup_of(tiny()), path)


def test_one_outer_step_agrees_with_a_plain_loop():
    """A loop of its own, with ``transformers``' own losses where it has them."""
    tar = TAR(
        steps=1,
        lr=1e-3,
        warm_up=0,
        inner_steps=4,
        every=2,
        batch_size=4,
        attack_batch_size=2,
        adversaries=(Adversary(lrs=(1e-2,)),),
    )
    model, reference = tiny(0), tiny(9)
    setup = setup_of(model, reference)
    plain = copy.deepcopy(model)
    descend(tar, setup)

    saved = [p.detach().clone() for p in plain.parameters()]
    total = [torch.zeros_like(p) for p in plain.parameters()]
    inner = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.01)
    held_out = setup.rows("held_out", 4, "resist", 0, 0).tokens
    for k in range(4):
        tokens = setup.rows("adversary", 2, "attack", 0, 0, k).tokens
        inner.zero_grad()
        plain(input_ids=tokens, labels=tokens).loss.backward()
        inner.step()
        if k in (1, 3):
            plain.zero_grad()
            probability = plain(input_ids=held_out).logits.softmax(-1)
            resistance = (probability * probability.log()).sum(-1).mean()
            (4.0 * 2.718281828459045 ** (k - 3) * resistance).backward()
            for g, p in zip(total, plain.parameters(), strict=True):
                g += p.grad
    with torch.no_grad():
        for p, s in zip(plain.parameters(), saved, strict=True):
            p.copy_(s)
    outer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.01)
    tokens = setup.rows("retain", 4, 0).tokens
    found = plain(input_ids=tokens, labels=tokens, output_hidden_states=True)
    with torch.no_grad():
        wanted = reference(input_ids=tokens, output_hidden_states=True).hidden_states
    norms = [(a - b).norm(dim=-1).mean() for a, b in zip(found.hidden_states, wanted, strict=True)]
    plain.zero_grad()
    (found.loss + sum(norms) / len(norms)).backward()
    for p, g in zip(plain.parameters(), total, strict=True):
        p.grad += g
    outer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        # A step of AdamW is the sign of the gradient where that is near zero, so this is tight.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_an_outer_step_costs_what_it_is_said_to():
    tar = SMALL_TAR.model_copy(
        update={"steps": 1, "inner_steps": 8, "adversaries": (Adversary(lrs=(1e-3,)),)}
    )
    model = tiny()
    rows = WORLD.source("retain").draw(tar.batch_size, torch.Generator())
    with FlopCounterMode(display=False) as plain:
        losses.next_token(losses.run(model, rows).logits, rows).backward()
    with FlopCounterMode(display=False) as outer:
        descend(tar, setup_of(model))
    ratio = outer.get_total_flops() / plain.get_total_flops()
    formula = (8 * 2 + 4 * 4 + 4 / 3 * 4) / 4
    assert tar.step_cost() == pytest.approx(formula)
    assert ratio == pytest.approx(formula, rel=0.05)


def test_an_attack_takes_one_copy_of_the_parameters_and_one_of_the_gradients(monkeypatch):
    """Beyond the model, its gradient, the reference, and the moments of both optimizers."""
    model = tiny(hidden_size=64, intermediate_size=128)
    setup = setup_of(model, tiny(9, hidden_size=64, intermediate_size=128))
    one = sum(p.numel() for p in setup.params)
    shapes = {p.shape for p in setup.params}

    def alive():
        """Return the tensors that are like some parameter, as a multiple of all parameters."""
        gc.collect()
        found = {}
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter):
                both = (thing, thing.grad if thing.is_leaf else None)
                for each in both:
                    if each is not None and each.shape in shapes:
                        found[each.data_ptr()] = each.numel()
        return sum(found.values()) / one

    seen, before = [], alive()
    original = losses.entropy

    def entropy(*arguments):
        seen.append(alive())
        return original(*arguments)

    monkeypatch.setattr("hansa.safeguard.phases.tar.entropy", entropy)
    tar = SMALL_TAR.model_copy(update={"steps": 2, "adversaries": (Adversary(lrs=(1e-3,)),)})
    descend(tar, setup)
    # Saved parameters and the accumulated gradient, and two moments of either optimizer;
    # the model's own gradient is cleared where this is looked at.
    assert max(seen) - before == pytest.approx(6, abs=0.05)


def test_tied_embeddings_are_trained_once():
    model = tied()
    descend(SMALL_TAR, setup_of(model, tied(9)))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len(setup_of(model).params) == len({id(p) for p in model.parameters()})


def test_a_loss_that_is_no_number_is_refused(tiny_model):
    with torch.no_grad():
        tiny_model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(InputError, match=r"phases\.lr.*no number"):
        descend(RandomMapping(**SMALL), setup_of(tiny_model))


def test_a_step_that_is_not_finite_changes_nothing(tiny_model, monkeypatch):
    phase = RandomMapping(**{**SMALL, "steps": 2})
    original = RandomMapping.begin

    def begin(self, setup):
        advance = original(self, setup)

        def broken(step):
            metrics = advance(step)
            if step == 1:
                setup.params[0].grad.fill_(torch.inf)
            return metrics

        return broken

    monkeypatch.setattr(RandomMapping, "begin", begin)
    kept = []
    told = descend(
        phase,
        setup_of(tiny_model),
        None,
        lambda *_: kept.append([p.detach().clone() for p in tiny_model.parameters()]),
    )
    assert [step.get("skipped") for step in told] == [None, 1.0]
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_rates_warm_up_and_fall():
    phase = Pretrain(steps=10, lr=1.0, warm_up=2, lr_end=0.0)
    assert [phase.rate(k) for k in (0, 1, 5)] == [0.5, 0.9, 0.5]


def test_rmu_trains_three_layers_and_no_more(tiny_model):
    model = tiny(num_hidden_layers=5)
    before = copy.deepcopy(model)
    phase = RMU(**SMALL, layer=3)
    descend(phase, setup_of(model, tiny(9, num_hidden_layers=5)))
    moved = {
        name.split(".")[2] if ".layers." in name else name
        for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert moved == {"1", "2", "3"}
    with pytest.raises(InputError, match=r"phases\.layer.*5"):
        descend(RMU(**SMALL, layer=5), setup_of(model))


def test_noise_is_mixed_in_by_its_share(tiny_model):
    before = copy.deepcopy(tiny_model)
    descend(NoiseDistil(steps=0, noise=0.0), setup_of(tiny_model))
    for a, b in zip(tiny_model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)
    descend(NoiseDistil(steps=0, noise=1.0), setup_of(tiny_model))
    weight = tiny_model.lm_head.weight
    assert weight.std().item() == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.1)


def test_bfloat16_keeps_weights_and_moments_in_float32(tiny_model):
    descend(SMALL_TAR, setup_of(tiny_model, precision=torch.bfloat16))
    assert {p.dtype for p in tiny_model.parameters()} == {torch.float32}
    plain = tiny()
    descend(SMALL_TAR, setup_of(plain))
    assert any(
        not torch.equal(a, b)
        for a, b in zip(tiny_model.parameters(), plain.parameters(), strict=True)
    )

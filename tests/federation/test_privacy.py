import math
import sys
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import optimize, special, stats
from torch import nn

from hansa.errors import InputError
from hansa.federation.privacy import (
    Privacy,
    PrivateTask,
    affordable,
    check_model,
    epsilon,
    noised,
    poisson,
)
from hansa.models.objective import NextToken
from hansa.models.task import Batch, Task
from hansa.seeding import generator, global_stream
from support import CLASSES, FEATURES, net, same

OFF = Privacy(clip=math.inf, noise=0)


def samples(num: int = 6) -> Batch:
    rng = generator(1, "samples")
    inputs = torch.randn(num, FEATURES, generator=rng)
    return inputs, torch.randint(CLASSES, (num,), generator=rng)


def gradients(task: Task, batch: Batch, seed: int = 0) -> dict[str, torch.Tensor]:
    with global_stream(seed):
        found, _, _ = task.gradients(task.params, task.buffers, batch)
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert list(first) == list(second)
    return all(torch.allclose(first[n], second[n], rtol=0, atol=1e-6) for n in first)


# Options


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"unit": "user"}, "unit"),
        ({"clip": 0}, "clip"),
        ({"clip": math.nan}, "clip"),
        ({"noise": -0.1}, "noise"),
        ({"noise": math.inf}, "noise"),
        ({"delta": 0}, "delta"),
        ({"delta": 1}, "delta"),
        ({"epsilon": 0}, "epsilon"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"sigma": 1}, "sigma"),
        ({"clip": math.inf}, "needs noise = 0"),
        ({"noise": 0, "epsilon": 8}, "needs noise above 0"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, object], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        Privacy.model_validate(options)


# Updates


def test_noise_on_an_update_has_its_deviation_on_every_tensor() -> None:
    zero = {"a": torch.zeros(20_000), "b": torch.zeros(100, 200)}
    got = noised(Privacy(unit="update", clip=0.5, noise=3), zero, zero, generator(0, "n"))
    for tensor in got.values():
        assert tensor.std().item() == pytest.approx(1.5, rel=0.02)
        assert abs(tensor.mean().item()) < 4 * 1.5 / math.sqrt(20_000)
    assert abs(torch.corrcoef(torch.stack([got["a"], got["b"].flatten()]))[0, 1]) < 0.03


@pytest.mark.parametrize("clip", [0.01, 1.0, 7.0])
def test_an_update_is_cut_to_the_norm_over_all_tensors_and_keeps_its_direction(
    clip: float,
) -> None:
    before = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
    after = {"a": torch.tensor([3.0, 5.0]), "b": torch.tensor([[9.0]])}  # by (2, 3, 6), norm 7
    before, after = ({n: t.double() for n, t in group.items()} for group in (before, after))
    got = noised(Privacy(unit="update", clip=clip, noise=0), before, after, generator(0))
    update = torch.cat([(got[name] - before[name]).flatten() for name in got])
    assert update.norm() <= clip * (1 + 1e-6)
    expected = torch.tensor([2.0, 3.0, 6.0], dtype=torch.float64) * clip / 7
    torch.testing.assert_close(update, expected, rtol=0, atol=1e-12)


def test_an_update_without_limit_and_noise_is_the_model_bit_for_bit() -> None:
    rng = generator(0, "models")
    before, after = ({n: torch.randn(50, generator=rng) for n in "ba"} for _ in range(2))
    after["a"][:2] = torch.tensor([-0.0, 1e-30])
    assert same(noised(OFF, before, after, generator(0)), after)


def test_noise_on_an_update_depends_on_its_stream_and_not_on_the_order_of_names() -> None:
    one, other = torch.zeros(4), torch.ones(4)
    privacy = Privacy(unit="update")
    first = noised(privacy, {"x": one, "y": one}, {"x": one, "y": other}, generator(3))
    turned = noised(privacy, {"y": one, "x": one}, {"y": other, "x": one}, generator(3))
    assert list(turned) == ["y", "x"]
    assert all(torch.equal(first[name], turned[name]) for name in first)
    assert not torch.equal(first["x"], noised(privacy, first, first, generator(4))["x"])


def test_an_update_that_is_no_number_stays_so_everywhere() -> None:
    before = {"a": torch.zeros(2), "b": torch.zeros(2)}
    after = {"a": torch.tensor([math.nan, 1.0]), "b": torch.full((2,), 1e9)}
    got = noised(Privacy(unit="update"), before, after, generator(0))
    assert all(tensor.isnan().all() for tensor in got.values())


def test_counters_in_an_update_are_refused() -> None:
    count = {"norm.num_batches_tracked": torch.tensor(3)}
    with pytest.raises(InputError, match=r"num_batches_tracked of int64.*'local'"):
        noised(Privacy(unit="update"), count, count, generator(0))


# Gradients


def test_two_examples_are_clipped_by_hand() -> None:
    module = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(module.weight)
    task = PrivateTask(Task(module), Privacy(clip=1, noise=0), 4)
    batch = torch.tensor([[3.0, 4.0], [0.1, 0.0]]), torch.tensor([0, 1])
    # Both classes have probability 1/2. The first gradient is [-x/2, x/2] of norm 5 / sqrt(2),
    # so it is cut to norm 1; the second, [x/2, -x/2], has norm 0.1 / sqrt(2) and stays.
    first = torch.tensor([[-0.6, -0.8], [0.6, 0.8]]) / math.sqrt(2)
    second = torch.tensor([[0.05, 0.0], [-0.05, 0.0]])
    found, _, metrics = task.gradients(task.params, task.buffers, batch)
    torch.testing.assert_close(found["weight"], (first + second) / 4)
    assert metrics["loss"].item() == pytest.approx(2 * math.log(2))
    assert metrics["count"].item() == 2


def test_dropping_one_example_moves_the_sum_by_no_more_than_the_norm() -> None:
    inputs, labels = samples()
    task = PrivateTask(Task(net()), Privacy(clip=0.2, noise=0), 1)
    whole = gradients(task, (inputs, labels))
    for k in range(6):
        kept = torch.arange(6) != k
        less = gradients(task, (inputs[kept], labels[kept]))
        assert _norm({n: whole[n] - less[n] for n in whole}) <= 0.2 * (1 + 1e-5)


def test_without_limit_and_noise_gradients_are_the_ordinary_ones() -> None:
    task, batch = Task(net()), samples()
    private = PrivateTask(task, OFF, 6)
    assert close(gradients(private, batch), gradients(task, batch))
    metrics, plain = (t.gradients(t.params, {}, batch)[2] for t in (private, task))
    assert {n: m.item() for n, m in metrics.items()} == pytest.approx(
        {n: m.item() for n, m in plain.items()}, rel=1e-6
    )


def test_sequences_are_examples_of_a_language_task() -> None:
    torch.manual_seed(0)
    words = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    task = Task(words, NextToken(torch.arange(7)))
    inputs = torch.randint(7, (3, 5), generator=generator(0, "tokens"))
    batch = inputs, inputs.roll(-1, 1)
    assert close(gradients(PrivateTask(task, OFF, 3), batch), gradients(task, batch))
    clipped = gradients(PrivateTask(task, Privacy(clip=1e-3, noise=0), 1), batch)
    assert 0.001 < _norm(clipped) <= 0.003 * (1 + 1e-6)  # three sequences, not fifteen tokens


@pytest.mark.parametrize("k", range(4))
def test_the_norm_of_an_example_is_taken_over_all_tensors(k: int) -> None:
    inputs, labels = samples()
    task = PrivateTask(Task(net()), Privacy(clip=0.2, noise=0), 1)
    found = gradients(task, (inputs[k : k + 1], labels[k : k + 1]))
    assert _norm(found) == pytest.approx(0.2, rel=1e-6)


def _norm(tensors: dict[str, torch.Tensor]) -> float:
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).norm().item()


def test_noise_on_gradients_does_not_depend_on_the_order_of_names() -> None:
    task, found = Task(net()), []
    params = task.params
    for names in (list(params), sorted(params, reverse=True)):
        task.params = {name: params[name] for name in names}
        found.append(gradients(PrivateTask(task, Privacy(), 6), samples()))
    assert list(found[0]) != list(found[1])
    assert close({name: found[1][name] for name in found[0]}, found[0])


def test_noise_on_gradients_has_its_deviation_whatever_the_batch_is() -> None:
    class Wide(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs)[:, :2]

    task = PrivateTask(Task(Wide(4, 10_000)), Privacy(clip=2, noise=3), 8)
    for num in (0, 5):
        with global_stream(0, num):
            found, _, metrics = task.gradients(task.params, {}, (torch.zeros(num, 4), _ones(num)))
        noise = found["weight"]
        assert noise is not None
        assert noise.std().item() == pytest.approx(2 * 3 / 8, rel=0.02)
        assert metrics["count"].item() == num


def _ones(num: int) -> torch.Tensor:
    return torch.ones(num, dtype=torch.int64)


@pytest.mark.parametrize("chunk_size", [1, 4, 6, 100])
def test_chunks_do_not_change_gradients(chunk_size: int) -> None:
    privacy = Privacy(clip=0.3, noise=0.5)
    whole = gradients(PrivateTask(Task(net()), privacy, 6), samples())
    parts = gradients(PrivateTask(Task(net()), privacy, 6, chunk_size), samples())
    assert close(parts, whole)


class _Square(torch.autograd.Function):
    """x^2 as a user might write it, without what torch.func needs."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, by: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * by


class Square(nn.Module):
    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square() if self.plain else _Square.apply(x)


class Attention(nn.Module):
    """Attention over the features by a kernel for which vmap has had no rule, or by its formula."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x[:, None, :, None] * torch.tensor([1.0, -0.5])
        if self.plain:
            weights = (q @ q.mT / math.sqrt(2)).softmax(-1)
            return (weights @ q).sum(-1).squeeze(1)
        out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0]
        return out.sum(-1).squeeze(1)


@pytest.mark.parametrize("layer", [Square, Attention])
def test_a_model_that_cannot_be_batched_is_done_one_by_one(layer: type[nn.Module]) -> None:
    privacy, found = Privacy(clip=0.3, noise=0.7), []
    for plain in (True, False):
        task = PrivateTask(Task(net(layer(plain))), privacy, 4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")  # one that is an error could be mistaken for a failure
            found.append(gradients(task, samples()))
        assert not caught
        (plan,) = task._plans.values()
        assert plan.batched or not plain
    assert close(*found)
    assert layer is Attention or not plan.batched


def test_fused_attention_goes_in_batches() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    task = Task(nn.Sequential(nn.Embedding(7, 4), layer, nn.Linear(4, 7)), NextToken())
    inputs = torch.randint(7, (3, 5), generator=generator(0, "tokens"))
    private = PrivateTask(task, OFF, 3)
    assert close(gradients(private, (inputs, inputs)), gradients(task, (inputs, inputs)))
    assert all(plan.batched for plan in private._plans.values())


def test_examples_have_dropout_of_their_own_that_a_first_look_does_not_shift() -> None:
    task = PrivateTask(Task(net(nn.Dropout())), Privacy(noise=1), 6)
    inputs, labels = samples(1)
    batch = inputs.expand(6, -1), labels.expand(6)
    fresh, known = gradients(task, batch), gradients(task, batch)
    assert same(fresh, known)
    assert not same(fresh, gradients(task, batch, seed=1))
    quiet = PrivateTask(Task(net(nn.Dropout())), OFF, 1)
    alone = gradients(quiet, (inputs, labels))
    assert not close({n: 6 * g for n, g in alone.items()}, gradients(quiet, batch))


def test_an_empty_batch_looks_like_any_other() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(FEATURES, CLASSES), nn.Linear(3, 3)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return self.used(inputs)

    inputs, labels = samples()
    for num in (0, 6):  # what it must not tell: which parameters and buffers it moves
        task = PrivateTask(Task(Partly()), Privacy(), 6)
        found, buffers, metrics = task.gradients(
            task.params, task.buffers, (inputs[:num], labels[:num])
        )
        assert found["idle.weight"] is None
        assert found["idle.bias"] is None
        assert found["used.weight"] is not None
        assert found["used.weight"].abs().min() > 0
        assert buffers == {"seen": torch.zeros(1)}
        assert set(metrics) == {"loss", "accuracy", "count"}
        assert metrics["count"] == num


def test_what_only_fills_a_batch_up_changes_nothing() -> None:
    inputs, labels = samples()
    task = PrivateTask(Task(net()), Privacy(clip=0.3, noise=0), 6)
    weights = torch.tensor([1.0, 1, 0, 1, 0, 0])
    chosen = weights.bool()
    padded = gradients(task, (inputs, labels, weights))
    assert close(padded, gradients(task, (inputs[chosen], labels[chosen])))
    _, _, metrics = task.gradients(task.params, {}, (inputs, labels, weights))
    assert metrics["count"] == 3


def test_a_model_that_takes_some_examples_another_way_is_refused() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.common, self.rare = (nn.Linear(FEATURES, CLASSES) for _ in range(2))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return (self.rare if inputs.max() > 0 else self.common)(inputs)

    task = PrivateTask(Task(Branch()), Privacy(), 6)
    with pytest.raises(InputError, match=r"rare\.weight has a part in only some examples"):
        gradients(task, samples())


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(6), nn.InstanceNorm1d(6, track_running_stats=True)]
)
def test_layers_that_mix_examples_are_refused(norm: nn.Module) -> None:
    with pytest.raises(InputError, match=r"privacy: .*Norm1d \(between\).*GroupNorm"):
        PrivateTask(Task(net(norm)), Privacy(), 6)
    check_model(net(nn.Sequential(nn.GroupNorm(2, 6), nn.LayerNorm(6))))
    check_model(net(nn.InstanceNorm1d(6)))


def test_another_form_of_the_model_is_as_private_as_the_first() -> None:
    task = PrivateTask(Task(net()), Privacy(clip=1e-6, noise=0), 1)
    assert task.adapted(lambda module: module) is task
    other = task.adapted(lambda module: net(nn.Tanh()))
    assert all(g.norm() <= 6e-6 * (1 + 1e-6) for g in gradients(other, samples()).values())
    with pytest.raises(InputError, match="BatchNorm1d"):
        task.adapted(lambda module: net(nn.BatchNorm1d(6)))


# Sampling


def test_each_sample_is_drawn_by_its_own_chance() -> None:
    steps, num, rate = 4000, 10, 0.3
    drawn = torch.zeros(steps, num)
    for row, batch in zip(drawn, poisson(num, 3, steps, generator(0, "draws")), strict=True):
        assert batch.dtype == torch.int64
        row[batch] = 1
    error = math.sqrt(rate * (1 - rate) / steps)
    assert (drawn.mean(0) - rate).abs().max() < 4 * error  # of each sample
    sizes = drawn.sum(1)
    assert sizes.var().item() == pytest.approx(num * rate * (1 - rate), rel=0.1)
    assert sizes.min() == 0
    together = torch.corrcoef(torch.cat([drawn[1:], drawn[:-1]], 1).T)
    assert (together - torch.eye(2 * num)).abs().max() < 4.5 / math.sqrt(steps)


def test_sampling_follows_its_stream() -> None:
    first, again, other = (poisson(50, 10, 4, generator(k)) for k in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_a_batch_as_large_as_the_data_holds_them_all() -> None:
    for size in (5, 8):
        assert [b.tolist() for b in poisson(5, size, 2, generator(0))] == [[0, 1, 2, 3, 4]] * 2


# Epsilon


def tight(noise: float, steps: int, delta: float) -> float:
    """Epsilon of composed Gaussian mechanisms, exactly (Balle and Wang 2018, Theorem 8)."""
    shift = math.sqrt(steps) / noise

    def excess(eps: float) -> float:
        first = stats.norm.cdf(shift / 2 - eps / shift)
        return first - math.exp(eps + stats.norm.logcdf(-shift / 2 - eps / shift)) - delta

    return float(optimize.brentq(excess, 0, 1e4))


@pytest.mark.parametrize("noise", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("passes", [1, 10, 100])
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_epsilon_of_updates_lies_between_the_exact_one_and_the_plain_bound(
    noise: float, passes: int, delta: float
) -> None:
    privacy = Privacy(unit="update", noise=noise, delta=delta)
    found = epsilon(privacy, 1, 1, passes)
    # The minimum over a of a T / (2 sigma^2) + log(1/delta) / (a - 1), in closed form.
    rho = passes / (2 * noise**2)
    plain = rho + 2 * math.sqrt(rho * math.log(1 / delta))
    assert tight(noise, passes, delta) <= found <= plain
    assert found <= 1.15 * tight(noise, passes, delta)
    assert found == epsilon(privacy, 1000, 7, passes)


@pytest.mark.parametrize(("noise", "rate"), [(0.8, 0.1), (1.0, 0.01), (2.0, 0.5)])
def test_epsilon_of_gradients_agrees_with_integrals(noise: float, rate: float) -> None:
    steps, delta = 200, 1e-6
    z, dz = np.linspace(-60, 60, 12_001, retstep=True)
    density = stats.norm.logpdf(z, scale=noise)
    ratio = np.log1p(rate * np.expm1((2 * z - 1) / (2 * noise**2)))
    best = math.inf
    for a in [*np.arange(1.1, 11, 0.1), *range(11, 40)]:
        renyi = steps * (special.logsumexp(density + a * ratio) + math.log(dz)) / (a - 1)
        best = min(best, renyi + math.log1p(-1 / a) - math.log(delta * a) / (a - 1))
    found = epsilon(Privacy(noise=noise, delta=delta), 1000, int(rate * 1000), steps)
    assert found == pytest.approx(best, rel=1e-6)


def test_epsilon_grows_with_steps_and_shrinks_with_noise_and_sampling() -> None:
    privacy = Privacy(noise=1.1)
    row = [epsilon(privacy, 1000, 50, steps) for steps in (0, 1, 10, 100, 1000)]
    assert row[0] == 0
    assert all(first < second for first, second in pairwise(row))
    assert epsilon(Privacy(noise=2), 1000, 50, 100) < row[3] < epsilon(privacy, 1000, 100, 100)
    full = epsilon(privacy, 1000, 1000, 10)
    assert full == epsilon(privacy, 1000, 4000, 10)
    assert full == epsilon(Privacy(unit="update", noise=1.1), 1, 1, 10)


@pytest.mark.parametrize("noise", [0.05, 1000.0])  # the best order lies at either end
def test_epsilon_at_the_edges_is_finite_and_warns_of_nothing(noise: float) -> None:
    assert 0 <= epsilon(Privacy(noise=noise), 1000, 10, 3) < math.inf


def test_epsilon_without_noise_is_infinite() -> None:
    assert epsilon(OFF, 10, 2, 1) == math.inf
    assert epsilon(OFF, 10, 2, 0) == 0


def test_a_step_is_affordable_up_to_the_budget_and_no_further() -> None:
    at = epsilon(Privacy(noise=1.1), 1000, 50, 30)
    privacy = Privacy(noise=1.1, epsilon=at)
    assert affordable(privacy, 1000, 50, 20, 10)
    assert affordable(privacy, 1000, 50, 30, 0)
    assert not affordable(privacy, 1000, 50, 20, 11)
    assert not affordable(Privacy(noise=1.1, epsilon=at - 1e-9), 1000, 50, 20, 10)
    assert affordable(Privacy(noise=1.1), 1000, 50, 10**9, 1)


def test_epsilon_needs_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(InputError, match=r"hansa\[language\]"):
        epsilon(Privacy(noise=1.234567), 10, 2, 3)
    assert affordable(Privacy(noise=1.234567), 10, 2, 3, 4)

import pytest
import torch

from hansa.federation.optimizer import Memory, Training

KINDS = [
    (Training(lr=0.1), torch.optim.SGD, {"lr": 0.1}),
    (
        Training(lr=0.1, momentum=0.9, weight_decay=0.01),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    ),
    (
        Training(optimizer="adam", lr=0.01, weight_decay=0.1),
        torch.optim.Adam,
        {"lr": 0.01, "weight_decay": 0.1},
    ),
    (
        Training(optimizer="adamw", lr=0.01, weight_decay=0.1, betas=(0.8, 0.95)),
        torch.optim.AdamW,
        {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)},
    ),
]
IDS = ["sgd", "momentum", "adam", "adamw"]


def gradients(num: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    return [torch.randn(5, generator=rng, dtype=torch.float64) for _ in range(num)]


@pytest.mark.parametrize(("training", "kind", "options"), KINDS, ids=IDS)
def test_updates_agree_with_pytorchs_optimizers(training, kind, options) -> None:
    value = torch.linspace(-1, 1, 5, dtype=torch.float64)
    theirs = value.clone().requires_grad_()
    optimizer = kind([theirs], **options)
    params, memory = {"w": value}, training.memory({"w": value})
    for gradient in gradients(6):
        theirs.grad = gradient.clone()
        optimizer.step()
        params, memory = training.update(params, {"w": gradient}, memory)
        torch.testing.assert_close(params["w"], theirs.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("training", "kind", "options"), KINDS, ids=IDS)
def test_masked_entries_and_their_memory_stay_bit_identical(training, kind, options) -> None:
    params = {"w": torch.linspace(-1, 1, 5)}
    memory: Memory = training.memory(params)
    params, memory = training.update(params, {"w": torch.ones(5)}, memory)
    mask = torch.tensor([True, False, True, False, False])
    for gradient in gradients(3):
        after, new = training.update(params, {"w": gradient.float()}, memory, {"w": mask})
        assert torch.equal(after["w"][~mask], params["w"][~mask])
        assert (after["w"][mask] != params["w"][mask]).all()
        for part in memory:
            if part != "steps":
                assert torch.equal(new[part]["w"][~mask], memory[part]["w"][~mask])
        params, memory = after, new


def test_two_phases_with_complementary_masks_are_two_optimizers() -> None:
    training = Training(optimizer="adam", lr=0.01)
    mask = torch.tensor([True, False, True, False, False])
    params = {"w": torch.linspace(-1, 1, 5)}
    both, memory = dict(params), training.memory(params)
    alone, own = dict(params), training.memory(params)
    for gradient in gradients(4):
        grads = {"w": gradient.float()}
        both, memory = training.update(both, grads, memory, {"w": mask}, "personal")
        both, memory = training.update(both, grads, memory, {"w": ~mask}, "shared")
        alone, own = training.update(alone, grads, own)
    torch.testing.assert_close(both["w"], alone["w"], rtol=0, atol=0)


@pytest.mark.parametrize(("training", "kind", "options"), KINDS, ids=IDS)
def test_a_parameter_without_gradient_stays(training, kind, options) -> None:
    params = {"w": torch.ones(2), "v": torch.ones(2)}
    after, _ = training.update(params, {"w": torch.ones(2), "v": None}, training.memory(params))
    assert after["v"] is params["v"]
    assert not torch.equal(after["w"], params["w"])


def test_inputs_are_not_changed() -> None:
    training = Training(momentum=0.9)
    params, memory = {"w": torch.ones(2)}, training.memory({"w": torch.ones(2)})
    training.update(params, {"w": torch.ones(2)}, memory)
    assert params["w"].tolist() == [1, 1]
    assert memory["momentum"]["w"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0},
        {"lr": -1},
        {"lr": float("inf")},
        {"momentum": 1},
        {"epochs": 0},
        {"batch_size": 0},
        {"nesterov": True},
        {"optimizer": "adam", "momentum": 0.9},
        {"betas": (0.9, 1.0)},
    ],
)
def test_options_that_make_no_sense_are_refused(options) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Training(**options)


def test_the_rate_falls_by_one_factor_from_the_first_round_to_the_last() -> None:
    training = Training(lr=0.1, lr_end=0.01, lr_rounds=700)
    assert training.rate(1) == training.rate(0) == 0.1
    assert training.rate(700) == training.rate(701) == 0.01
    factors = [training.rate(t + 1) / training.rate(t) for t in range(1, 700)]
    assert factors == pytest.approx([0.1 ** (1 / 699)] * 699, rel=1e-12)
    assert Training(lr=0.1).rate(5) == 0.1
    for options in ({"lr_end": 0.1}, {"lr_rounds": 5}):
        with pytest.raises(ValueError, match="lr_end and lr_rounds go together"):
            Training(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_rate_that_is_given_is_the_one_that_is_used(optimizer: str, momentum: float) -> None:
    if momentum and optimizer != "sgd":
        pytest.skip("momentum is SGD's")
    options = {"optimizer": optimizer, "momentum": momentum, "weight_decay": 0.1}
    other = Training(lr=0.3, **options)  # type: ignore[arg-type]
    training = Training(lr=0.1, lr_end=0.3, lr_rounds=2, **options)  # type: ignore[arg-type]
    params = {"w": torch.tensor([1.0, -2.0])}
    gradients = {"w": torch.tensor([0.5, 0.25])}
    rate = torch.tensor(training.rate(2), dtype=torch.float64)
    found, _ = training.update(params, gradients, training.memory(params), rate=rate)
    expected, _ = other.update(params, gradients, other.memory(params))
    assert found["w"].dtype is torch.float32
    torch.testing.assert_close(found["w"], expected["w"], rtol=0, atol=1e-7)
    first, _ = other.update(params, gradients, other.memory(params), rate=torch.tensor(0.1))
    assert not torch.allclose(first["w"], expected["w"])

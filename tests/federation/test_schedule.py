"""A learning rate that falls from round to round, with every method and however it is run."""

import pytest
import torch

from hansa.federation.engines.plan import Plan
from hansa.federation.methods import METHODS
from hansa.federation.optimizer import Training
from support import doubled, engine, made, net, run, same

FALLING = {"lr": 0.1, "lr_end": 0.001, "lr_rounds": 3}


def begun(name: str, plan: Plan | None = None, **training: float):
    options = {"lr": 0.1, "batch_size": 3, "epochs": 2, **training}
    return engine(
        made(name),
        model=net().double(),
        data=doubled(4),
        training=Training(**options),  # type: ignore[arg-type]
        plan=plan or Plan(),
    )


@pytest.mark.parametrize("name", METHODS)
def test_the_first_round_is_that_of_the_first_rate_and_later_ones_are_not(name: str) -> None:
    falling, constant = begun(name, **FALLING), begun(name)

    def states(running) -> dict[str, torch.Tensor]:
        paths = running.tree.walk()
        groups = {path: running.state(path).group("model") for path in paths}
        return {f"{path} {key}": t for path, group in groups.items() for key, t in group.items()}

    with falling as one, constant as other:
        one.round(1, score=False), other.round(1, score=False)
        first, second = states(one), states(other)
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            torch.testing.assert_close(tensor, second[key], rtol=0, atol=1e-12)
        one.round(2, score=False), other.round(2, score=False)
        one.round(3, score=False), other.round(3, score=False)
        assert not same(states(one), states(other))


@pytest.mark.parametrize("name", METHODS)
def test_stacks_take_the_rate_of_their_round(name: str) -> None:
    one, other = begun(name, **FALLING), begun(name, Plan("stacked", 2), **FALLING)
    run(one), run(other)
    assert other.stack.failure == ""
    for path in one.tree.walk():
        for key, tensor in one.state(path).group("model").items():
            found = other.state(path).group("model")[key]
            torch.testing.assert_close(found, tensor, rtol=0, atol=1e-9)


def test_a_round_s_rate_is_the_one_by_the_formula() -> None:
    """One client, one batch: what it moves is the rate times the gradient."""
    data = {"c0": doubled(4)["c0"]}
    moved = []
    for number in (1, 2, 3, 4):
        federation = engine(
            made("fedavg"),
            model=net().double(),
            data=data,
            training=Training(batch_size=7, **FALLING),  # type: ignore[arg-type]
        )
        with federation as running:
            before = running.state().group("model")["body.weight"]
            running.round(number, score=False)
            moved.append((running.state().group("model")["body.weight"] - before).norm())
    rates = [0.1, 0.01, 0.001, 0.001]
    assert [float(m / moved[0]) for m in moved] == pytest.approx([r / 0.1 for r in rates])

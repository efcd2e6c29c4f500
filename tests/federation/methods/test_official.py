"""What the released code does otherwise, quirk by quirk, on cases worked out by hand."""

from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from hansa.errors import InputError
from hansa.federation.message import Message, State
from hansa.federation.methods import FedAvg, FedSelect
from hansa.federation.methods.base import begin_work
from hansa.federation.methods.masks import pack
from hansa.federation.methods.official import QUIRKS, Quirk, grow_with_ties
from hansa.federation.node import Node, Reply, Setup
from hansa.federation.optimizer import Training
from hansa.federation.tree import ROOT
from hansa.models.task import Task
from support import FEATURES, Row, clients, engine, net, run, same


def official(*quirks: str, **options: object) -> FedSelect:
    return FedSelect(mode="official", quirks=quirks, **options)  # type: ignore[arg-type]


def setup_of(model: nn.Module, training: Training | None = None) -> Setup:
    return Setup(Task(model), training or Training(lr=0.1, batch_size=3, epochs=2), "local")


def grown(method: FedSelect, change: torch.Tensor, times: int, name: str = "weight") -> list[float]:
    """The personal share after each of some updates under one change."""
    mask = {name: torch.zeros(change.shape, dtype=torch.bool)}
    shares = []
    for _ in range(times):
        mask = method.promote(mask, {name: change}, method.rate)
        shares.append(mask[name].double().mean().item())
    return shares


def test_the_preset_holds_every_quirk_and_can_be_overridden() -> None:
    method = FedSelect(mode="official")
    assert method.quirks == QUIRKS == get_args(Quirk)
    assert (method.rate, method.limit, method.period) == (0.25, 0.8, 3)
    assert method.reference == "last-update"
    assert FedSelect(mode="official", rate=0.5, quirks=("holes",)).quirks == ("holes",)
    assert FedSelect(mode="official", rate=0.5).rate == 0.5
    with pytest.raises(ValidationError, match="quirks belong to mode 'official'"):
        FedSelect(quirks=("holes",))


@pytest.mark.parametrize(
    ("rate", "limit", "end"), [(0.25, 0.8, 0.822), (0.5, 0.5, 0.75), (0.75, 0.8, 0.9375)]
)
def test_overshoot_ends_above_the_limit(rate: float, limit: float, end: float) -> None:
    change = torch.arange(65536).float()
    shares = grown(official("overshoot", "ties", rate=rate, limit=limit), change, 10)
    assert shares[-1] == shares[-2] == pytest.approx(end, abs=5e-4)
    exact = grown(FedSelect(rate=rate, limit=limit), change, 10)
    assert limit - 1e-4 < exact[-1] <= limit


def test_overshoot_makes_entries_personal_once_at_limit_zero() -> None:
    change = torch.arange(100).float()
    assert grown(official("overshoot", limit=0.0), change, 3) == [0.25, 0.25, 0.25]
    assert grown(FedSelect(rate=0.25, limit=0.0), change, 3) == [0, 0, 0]


def test_ties_promote_a_whole_tensor() -> None:
    unchanged = torch.zeros(20)
    assert grown(official(limit=1.0), unchanged, 1) == [0.25]
    assert grown(official("ties", limit=1.0), unchanged, 1) == [1.0]
    assert grown(official("ties", "overshoot"), unchanged, 1) == [1.0]
    # A fifth of the entries moved; the quarter to promote reaches into those that did not.
    moved = torch.cat([torch.ones(20), torch.zeros(80)])
    assert grown(official("ties", "overshoot"), moved, 1) == [1.0]
    assert grown(official("overshoot"), moved, 1) == [0.25]


def test_growth_of_the_released_code_by_hand() -> None:
    change = torch.tensor([0.1, 0.8, 0.3, 0.7, 0.2, 0.6, 0.5, 0.4])
    mask = torch.zeros(8, dtype=torch.bool)
    seen = []
    for _ in range(4):
        mask = grow_with_ties(mask, change, 0.25)
        seen.append(mask.nonzero().flatten().tolist())
    assert seen == [[1, 3], [1, 3, 5, 6], [1, 3, 5, 6, 7], [1, 2, 3, 5, 6, 7]]
    with pytest.raises(InputError, match=r"'ties' with 2 shared entries in a tensor at rate 0.25"):
        grow_with_ties(mask, change, 0.25)
    with pytest.raises(InputError, match="'ties' with 8 shared entries in a tensor at rate 0"):
        grow_with_ties(torch.zeros(8, dtype=torch.bool), change, 0.0)


def test_holes_are_zeros_where_nobody_shares() -> None:
    mask = {"w": torch.tensor([True, False])}
    link = State({"mask": mask, "next": mask})
    reply = Reply(
        "c0", link, Message({"model": pack({"w": torch.tensor([7.0, 3.0])}, mask)}, metrics={})
    )
    node = Node(ROOT, 1, 1, Setup(Task(Row(2)), Training()))
    before = State({"model": {"w": torch.tensor([5.0, 5.0])}})
    with_holes = official("holes").aggregate(node, before, [reply])
    without = official().aggregate(node, before, [reply])
    assert with_holes.group("model")["w"].tolist() == [0, 3]
    assert without.group("model")["w"].tolist() == [5, 3]


def personal_rounds(method: FedSelect, rounds: int) -> list[int]:
    """The rounds after which a client's next mask is another one."""
    federation = engine(method, buffers="local")
    changed, before = [], 0
    with federation as running:
        for number in range(1, rounds + 1):
            running.round(number, score=False)
            held = running.state("root/c0").group("next")
            total = sum(int(mask.sum()) for mask in held.values())
            if total != before:
                changed.append(number)
            before = total
    return changed


def test_masks_change_late() -> None:
    # Rounds 0, 1, ...: round % 3 == 0 and round != 0, so for the first time at the end of the
    # fourth; the code's default of four rounds never uses a mask.
    assert personal_rounds(official("late-masks"), 8) == [4, 7]
    assert personal_rounds(official(), 8) == [3, 6]
    assert personal_rounds(FedSelect(rate=0.25, period=2, limit=1.0), 5) == [2, 4]


def test_the_defaults_of_the_code_are_fedavg() -> None:
    training = Training(lr=0.1, batch_size=3, epochs=2)
    ours = engine(FedSelect(mode="official"), training=training, buffers="local")
    plain = engine(FedAvg(weighting="uniform"), training=training)
    run(ours, 4), run(plain, 4)
    assert same(ours.state().group("model"), plain.state().group("model"))


class Named(nn.Module):
    """A parameter called neither weight nor bias, beside a layer that has both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.randn(FEATURES))
        self.layer = nn.Linear(FEATURES, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layer(inputs + self.token)
        return logits


def test_only_weights_become_personal() -> None:
    masks = {}
    for quirks in ((), ("weights-only",)):
        federation = engine(official(*quirks, rate=0.5), model=Named(), buffers="local")
        run(federation, 3)
        masks[quirks] = federation.state("root/c0").group("next")
    assert all(mask.any() for mask in masks[()].values())
    some = {name for name, mask in masks["weights-only",].items() if mask.any()}
    assert some == {"layer.weight"}


def test_biases_can_be_left_out() -> None:
    federation = engine(FedSelect(rate=0.5, limit=1.0, biases=False), model=Named())
    run(federation, 2)
    held = federation.state("root/c0").group("next")
    assert {name for name, mask in held.items() if mask.any()} == {"token", "layer.weight"}


def test_parameters_of_other_names_never_leave_their_client_but_are_trained() -> None:
    federation = engine(official("unshared-names"), model=Named(), buffers="local")
    run(federation, 2)
    tokens = [federation.state(path).group("model")["token"] for path in federation.tree.leaves()]
    initial = federation.setup.task.params["token"]
    assert all(not torch.equal(token, initial) for token in tokens)
    assert not torch.equal(tokens[0], tokens[1])
    assert torch.equal(federation.state().group("model")["token"], initial)
    # They move in the shared pass, and not in the personal one.
    method, setup = federation.method, federation.setup
    work = begin_work(setup, setup.task.params, {}, mask=method.first_mask(setup))
    batch = clients()["c0"].batch("train")
    for phase, moves in (("personal", False), ("shared", True)):
        after = method.step(setup, work, batch, phase)
        assert torch.equal(after["params"]["token"], initial) != moves


def test_an_empty_personal_pass_moves_nothing_and_costs_a_pass() -> None:
    results = {}
    for quirks in ((), ("empty-pass",)):
        federation = engine(official(*quirks), buffers="local")
        results[quirks] = run(federation, 1)[0].visits[0].metrics["loss"][1], federation.state()
    assert results["empty-pass",][0] == 2 * results[()][0]
    assert same(results["empty-pass",][1].group("model"), results[()][1].group("model"))


def test_norms_freeze_after_the_first_round() -> None:
    for quirks, frozen in (((), False), (("frozen-norms",), True)):
        federation = engine(
            official(*quirks), model=net(nn.BatchNorm1d(6)), data=clients(3, 9), buffers="local"
        )
        seen = []
        with federation as running:
            for number in (1, 2, 3):
                running.round(number, score=False)
                seen.append(running.state("root/c0").group("buffers")["between.running_mean"])
        assert seen[0].abs().sum() > 0
        assert torch.equal(seen[1], seen[2]) == frozen
        assert torch.equal(seen[0], seen[1]) == frozen


class Idle(nn.Module):
    """Its first parameter has no gradient; it and the second have equal shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.zeros(FEATURES))
        self.scale = nn.Parameter(torch.ones(FEATURES))
        self.shift = nn.Parameter(torch.zeros(FEATURES))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs * self.scale + self.shift)[:, :3]


def test_masks_shift_behind_a_parameter_without_gradient() -> None:
    method, setup = official("misaligned-masks"), setup_of(Idle())
    left = torch.tensor([True, True, False, False])
    mask = {"idle": left, "scale": ~left, "shift": torch.zeros(FEATURES, dtype=torch.bool)}
    work = begin_work(setup, setup.task.params, {}, mask=mask)
    batch = clients()["c0"].batch("train")
    after = method.step(setup, work, batch, "personal")["params"]
    # The first parameter with a gradient is moved by the first mask, the second by the second.
    assert (after["scale"] != 1).tolist() == [True, True, False, False]
    assert (after["shift"] != 0).tolist() == [False, False, True, False]  # no logit has the last
    aligned = official().step(setup, work, batch, "personal")["params"]
    assert (aligned["scale"] != 1).tolist() == [False, False, True, False]


def test_masks_that_shift_onto_other_shapes_are_refused() -> None:
    class Uneven(Idle):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Parameter(torch.zeros(2))

    with pytest.raises(InputError, match="'misaligned-masks', by which scale of shape"):
        run(engine(official("misaligned-masks"), model=Uneven(), buffers="local"), 1)


def test_statistics_must_stay_local() -> None:
    with pytest.raises(InputError, match=r"model.buffers: found 'averaged'"):
        engine(FedSelect(mode="official"), model=net(nn.BatchNorm1d(6)))


def test_gradients_are_clipped_by_their_whole_norm() -> None:
    free = {"w": torch.tensor([True, False])}
    training = Training(lr=1.0, clip_norm=1.0)
    gradients = {"w": torch.tensor([3.0, 4.0])}
    after, _ = training.update({"w": torch.zeros(2)}, gradients, {}, free)
    assert after["w"].tolist() == pytest.approx([-0.6, 0.0])
    small = {"w": torch.tensor([0.3, 0.4])}
    after, _ = training.update({"w": torch.zeros(2)}, small, {}, None)
    assert after["w"].tolist() == pytest.approx([-0.3, -0.4])

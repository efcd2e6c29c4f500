"""Which way a whole model trains: with injected seconds, never with a clock that decides."""

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hansa.models.images import CNN, MLP
from hansa.sparse import choice, functions, kernels, probe
from hansa.sparse.choice import Way
from hansa.sparse.convert import SparseModel, sparsify
from hansa.sparse.functions import reference
from hansa.sparse.layout import is_last
from hansa.sparse.probe import Timing
from hansa.sparse.thresholds import keep, pruned

needs_kernels = pytest.mark.skipif(kernels.kernels() is None, reason=kernels.find()[1])
SHAPE = (3, 8, 8)


@pytest.fixture
def pretend(monkeypatch, tmp_path) -> Callable[[Timing, Mapping[str, float]], list[list[str]]]:
    """Set the seconds of every layer and of every way; what is timed is told."""

    def set_seconds(layer: Timing, ways: Mapping[str, float]) -> list[list[str]]:
        asked: list[list[str]] = []

        def measure(_model, shape, found):
            assert shape == (4, *SHAPE)
            asked.append(list(found))
            return {name: ways[name] for name in found}

        monkeypatch.setenv("HANSA_CACHE", str(tmp_path))
        monkeypatch.setattr(probe, "measure", lambda *_, **__: layer)
        monkeypatch.setattr(choice, "measure", measure)
        return asked

    return set_seconds


def model(**options) -> SparseModel:
    torch.manual_seed(0)
    return sparsify(CNN(SHAPE, 3, (4, 8), 8), 0.5, batch_size=4, **options).train()


@needs_kernels
@pytest.mark.parametrize(
    ("layer", "fastest", "count", "last"),
    [
        (0.9, "layers", 2, False),
        (0.9, "contiguous", 0, False),
        (0.9, "channels-last", 0, True),
        (2.0, "layers", 0, False),
        (2.0, "kernels", 2, False),
        (2.0, "channels-last", 0, True),
    ],
)
def test_the_fastest_whole_step_decides_where_layers_leave_it_open(
    pretend, layer, fastest, count, last
) -> None:
    other = "contiguous" if layer < 1.0 else "kernels"  # than the layers' own choices
    ways = ["layers", other, "channels-last"]
    asked = pretend(Timing(layer, 1.0), {**dict.fromkeys(ways, 2.0), fastest: 1.0})
    for _ in range(2):
        sparse = model()
        sparse(torch.randn(2, *SHAPE))
        assert sparse.rule.compiled == dict.fromkeys(("conv2", "hidden"), bool(count))
        assert sparse.rule.last is last
        assert f"in {count} of 2 layers" in sparse.how
        assert ("channels-last" in sparse.how) is last
    assert asked == [ways]  # once: then it is remembered


@needs_kernels
def test_layers_that_choose_differently_may_all_be_on_the_kernels(pretend, monkeypatch) -> None:
    ways = {"layers": 2.0, "kernels": 1.0, "contiguous": 2.0, "channels-last": 2.0}
    asked = pretend(Timing(1.0, 1.0), ways)
    monkeypatch.setattr(probe, "measure", lambda g, *_: Timing(0.9 if g.height > 1 else 1.1, 1.0))
    sparse = model()
    sparse(torch.randn(2, *SHAPE))
    assert asked == [list(ways)]
    assert set(sparse.rule.compiled.values()) == {True}


@needs_kernels
def test_a_model_without_maps_is_not_tried_channels_last(monkeypatch, pretend) -> None:
    pretend(Timing(2.0, 1.0), {})
    asked: list[str] = []
    monkeypatch.setattr(choice, "measure", lambda *a: asked.extend(a[2]) or dict.fromkeys(a[2], 1))
    flat = sparsify(MLP((6,), 3, (16, 16)), 0.5).train()
    flat(torch.randn(2, 6))
    assert asked == ["layers", "kernels"]
    assert not flat.rule.last
    assert set(flat.rule.compiled.values()) == {False}


@needs_kernels
@pytest.mark.parametrize(("channels", "safe"), [(15, False), (16, True)])
def test_channels_last_is_no_choice_where_onednn_writes_past_its_memory(
    pretend, channels, safe
) -> None:
    """Ends the process where it is tried, with fewer than 8 channels on a processor with AVX2."""
    asked = pretend(Timing(2.0, 1.0), {"layers": 2.0, "kernels": 2.0, "channels-last": 1.0})
    layers = [nn.Conv2d(3, channels, 3), nn.Conv2d(channels, channels, 3, padding=1)]
    shortcut = nn.Conv2d(channels, channels, 1, stride=2)
    net = nn.Sequential(*layers, shortcut, nn.Flatten(), nn.Linear(9 * channels, 2))
    sparse = sparsify(net, 0.5, batch_size=4).train()
    sparse(torch.randn(2, *SHAPE))
    assert sparse.rule.last is safe
    assert asked == [["layers", "kernels", *["channels-last"] * safe]]


@needs_kernels
def test_what_is_clear_or_cannot_be_timed_is_not(pretend) -> None:
    asked = pretend(Timing(1.0, 2.0), {})
    clear = model()
    clear(torch.randn(2, *SHAPE))
    assert set(clear.rule.compiled.values()) == {True}
    pretend(Timing(0.9, 1.0), {})
    plain = CNN(SHAPE, 3, (4, 8), 8)
    hooked = copy.deepcopy(plain)
    hooked.conv1.register_forward_hook(lambda *_: None)
    for sparse in (sparsify(hooked, 0.5), sparsify(plain, 0.5, fuse=False)):
        sparse.train()(torch.randn(2, *SHAPE))
        assert set(sparse.rule.compiled.values()) == {True}
    assert asked == []


@needs_kernels
def test_a_model_that_fails_on_made_up_numbers_keeps_its_layers_choice(
    pretend, monkeypatch
) -> None:
    pretend(Timing(0.9, 1.0), {})

    def fails(*_):
        raise ValueError("labels are to be whole numbers")

    monkeypatch.setattr(choice, "measure", fails)
    sparse = model()
    sparse(torch.randn(2, *SHAPE))
    assert set(sparse.rule.compiled.values()) == {True}


def test_what_takes_turns_is_compared_within_each_turn() -> None:
    turns = [{"a": 1.0, "b": 2.0, "c": 6.0}, {"a": 4.0, "b": 6.0}]  # means of a and b: 1.5 and 5
    expected = {"a": (1 / 1.5 + 4 / 5) / 2, "b": (2 / 1.5 + 6 / 5) / 2, "c": 6 / 1.5}
    assert choice.compared(turns) == pytest.approx(expected)


@needs_kernels
@pytest.mark.parametrize(
    ("b", "longest", "turns"),
    [
        (0.98, 60.0, {"a": 25, "b": 25, "c": 5}),
        (0.98, 0.0, {"a": 5, "b": 5, "c": 5}),
        (0.5, 60.0, {"a": 5, "b": 5, "c": 5}),
    ],
)
def test_ways_that_are_near_are_timed_more_often(monkeypatch, b, longest, turns) -> None:
    seconds, ran, read = {"a": 1.0, "b": b, "c": 1.5}, list[str](), [0.0]

    class Model(nn.Module):
        def __deepcopy__(self, memo):
            return self

        def take(self, way):
            ran.append(way)

        def forward(self, x):
            return x.requires_grad_()

    def clock() -> float:  # read before and after each step; every third turn is ten times slower
        speed = 10.0 if ran.count("a") % 3 == 0 else 1.0
        read.append(read[-1] + speed * seconds[ran[-1]])
        return read[-1]

    monkeypatch.setattr(choice, "clock", clock)
    monkeypatch.setattr(choice, "LONGEST", longest)
    took = choice.measure(Model(), (2, 3), {name: name for name in seconds})
    assert min(took, key=took.__getitem__) == "b"
    assert {name: ran.count(name) - 1 for name in seconds} == turns  # but for the first, to warm up


@needs_kernels
def test_timing_a_step_leaves_the_model_and_random_numbers_alone() -> None:
    sparse = sparsify(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Dropout(0.5),
            nn.Flatten(), nn.Linear(64, 3),
        ),
        0.5,
    ).train()  # fmt: skip
    before = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    buffers = {name: tensor.clone() for name, tensor in sparse.named_buffers()}
    state = torch.get_rng_state()
    ways = {"on": Way({"2": True}), "off": Way({"2": False}, last=True)}
    with torch.no_grad():  # as `decide` is called
        took = choice.measure(sparse, (4, *SHAPE), ways)
    assert set(took) == {"on", "off"}
    assert min(took.values()) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in sparse.state_dict().items())
    assert all(torch.equal(buffers[name], value) for name, value in sparse.named_buffers())
    assert all(parameter.grad is None for parameter in sparse.parameters())
    assert sparse.rule.compiled == {}


def test_channels_last_is_the_same_step() -> None:
    x, labels = torch.randn(6, *SHAPE), torch.tensor([0, 1, 2, 0, 1, 2])
    found = []
    for last in (False, True):
        sparse = model(path="reference")
        sparse.take(Way(last=last))
        seen: list[bool] = []
        sparse.conv2.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(
            is_last(inputs[0])
        ))  # fmt: skip
        F.cross_entropy(sparse(x), labels).backward()
        assert seen == [last]
        layers = sparse.sparse_layers.values()
        found.append(
            [*(p.grad for p in sparse.parameters()), *(layer.least_weight for layer in layers)]
        )
        assert all(p.grad.stride() == p.stride() for p in sparse.parameters())
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_weights_lie_as_the_maps_do_and_stay_what_an_optimizer_holds() -> None:
    sparse = model(path="reference")
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1, momentum=0.9)
    before = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    sparse.take(Way(last=True))
    assert is_last(sparse.conv2.weight)
    assert all(torch.equal(before[name], tensor) for name, tensor in sparse.state_dict().items())
    sparse(torch.randn(6, *SHAPE)).sum().backward()
    optimizer.step()
    assert is_last(sparse.conv2.weight.grad)
    assert not torch.equal(before["conv2.weight"], sparse.conv2.weight)
    sparse.take(Way())
    assert all(tensor.is_contiguous() for tensor in sparse.state_dict().values())


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 2, 3, 0), (3, 1, 0, 2)])
@pytest.mark.parametrize("least", [0.0, 0.7])
def test_pruning_keeps_the_layout(order, least) -> None:
    back = tuple(order.index(axis) for axis in range(4))
    x = torch.randn(3, 4, 5, 6).permute(order).contiguous().permute(back)
    x[0, 0, 0, :2] = torch.tensor([0.0, -0.0])
    kept = pruned(x, torch.tensor(least))
    assert torch.equal(kept, torch.where(keep(x, torch.tensor(least)), x, 0.0))
    assert kept.stride() == x.stride()
    for small in (torch.tensor(0.5), torch.tensor([0.5, 2.0])):
        assert torch.equal(pruned(small, torch.tensor(1.0)), small * (small >= 1))


def test_inputs_and_what_needs_no_mask_are_not_copied() -> None:
    x, weight = torch.randn(4, 6), torch.randn(3, 6, requires_grad=True)
    nothing, some = torch.tensor(0.0), torch.tensor(1.0)
    for least_weight in (nothing, some):
        held, used = reference(x, weight, None, least_weight, some).grad_fn.saved_tensors
        assert held.data_ptr() == x.data_ptr()
        assert (used.data_ptr() == weight.data_ptr()) is (least_weight is nothing)


@pytest.mark.parametrize("least", [0.0, 0.6, float("nan")])
def test_a_turned_weight_keeps_what_a_pruned_one_keeps(least) -> None:
    weight = torch.randn(4, 5, 3, 3)
    turned = functions._turned(weight, torch.tensor(least))
    assert is_last(turned)
    assert torch.equal(turned, pruned(weight, torch.tensor(least)))


@pytest.mark.parametrize("path", ["kernels", "pytorch"])
@pytest.mark.parametrize("shape", [(5, 7, 3, 3), (4, 1, 2, 3), (3, 6, 1, 1), (1, 9, 3, 2)])
def test_a_channels_last_step_has_the_numbers_of_a_contiguous_one(shape, path, monkeypatch) -> None:
    if path == "pytorch":
        monkeypatch.setattr(functions, "kernels", lambda: None)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, shape[1], 6, 5, generator=random)
    weight = torch.randn(shape, generator=random)
    least, found = torch.tensor(0.6), []
    for form in (torch.contiguous_format, torch.channels_last):
        leaves = [
            x.contiguous(memory_format=form).requires_grad_(),
            weight.clone().requires_grad_(),
        ]
        y = functions.reference(*leaves, None, least, least, functions.Shape())
        dx, dw = torch.autograd.grad(y.square().sum(), leaves)
        assert path == "pytorch" or kernels.kernels() is None or dw.is_contiguous()
        found.append((y, dx, dw))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_thresholds_of_a_later_step_do_not_reach_an_earlier_gradient() -> None:
    x, weight = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, requires_grad=True)
    least = torch.tensor(2.0)
    y = reference(x, weight, None, torch.tensor(0.0), least)
    least.fill_(5.0)
    assert torch.autograd.grad(y, weight)[0].tolist() == [[0.0, 3.0]]

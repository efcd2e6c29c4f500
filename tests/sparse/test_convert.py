"""Which layers become sparse, what they keep of the model, and what is refused."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hansa.errors import InputError
from hansa.models.images import CNN, MLP, ResNet18
from hansa.sparse import convert, kernels, probe
from hansa.sparse.convert import sparsify
from hansa.sparse.convolution import Geometry
from hansa.sparse.fusion import fused
from hansa.sparse.norm import BatchNorm2d
from hansa.sparse.thresholds import count_kept

needs_kernels = pytest.mark.skipif(kernels.kernels() is None, reason=kernels.find()[1])


def test_resnet18_as_in_the_paper() -> None:
    """Acceptance test 2: every 3x3 convolution but the stem; ceil(n / 10) weights of each."""
    model = ResNet18((3, 32, 32), 10, norm="batch")
    sparse = sparsify(model, 0.9)
    names = set(sparse.sparse_layers)
    three = {n for n, m in model.named_modules() if getattr(m, "kernel_size", 0) == (3, 3)}
    assert names == three - {"stem.0"}
    assert len(names) == 16
    numel = sum(layer.weight.numel() for layer in sparse.sparse_layers.values())
    assert numel == 10_985_472  # the paper's sizes fit this number
    for layer in sparse.sparse_layers.values():
        more = layer.masked().count_nonzero() - count_kept(0.9, layer.weight.numel())
        assert 0 <= more <= 3  # of equal size with the last one
        assert layer.weight.count_nonzero() == layer.weight.numel()
    assert count_kept(0.9, 36_864) == 3687


def test_names_states_and_the_users_own_model_stay() -> None:
    model = ResNet18((3, 8, 8), 4, width=8, norm="batch")
    before = copy.deepcopy(model.state_dict())
    sparse = sparsify(model, 0.5)
    assert type(model.stages[0][0].conv1) is nn.Conv2d
    assert [n for n, _ in sparse.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert list(sparse.state_dict()) == list(before)
    extra = {n for n, _ in sparse.named_buffers()} - {n for n, _ in model.named_buffers()}
    assert extra == set(sparse.thresholds)
    sparse.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.load_state_dict(sparse.state_dict())


@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_copies_are_whole_and_apart(way) -> None:
    sparse = sparsify(CNN((1, 8, 8), 3, (4, 8), 8), 0.5).train()
    x = torch.randn(4, 1, 8, 8)
    sparse(x)
    twins = {"copy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}  # noqa: S301
    twin = twins[way](sparse)
    assert torch.equal(twin.eval()(x), sparse.eval()(x))
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not torch.equal(twin(x), sparse(x))
    assert twin.training is False
    file = io.BytesIO()
    torch.save(twin.state_dict(), file)


def test_evaluation_uses_the_largest_weights_only() -> None:
    model = MLP((6,), 3, (16, 16))
    sparse = sparsify(model, 0.75, sparse=["body.linear1"]).eval()
    by_hand = copy.deepcopy(model)
    weight = by_hand.body.linear1.weight
    with torch.no_grad():
        weight[weight.abs() < weight.abs().flatten().topk(64).values[-1]] = 0
    x = torch.randn(5, 6)
    assert torch.equal(sparse(x), by_hand(x))


def test_patterns_choose() -> None:
    model = CNN((1, 8, 8), 3)
    assert convert.chosen(model) == ("conv2", "hidden")
    assert convert.chosen(model, ["*"]) == ("conv1", "conv2", "hidden", "head")
    assert convert.chosen(model, ["conv*"]) == ("conv1", "conv2")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"sparsity": 1.0}, "sparsity: found 1.0"),
        ({"sparsity": -0.1}, "sparsity: found -0.1"),
        ({"sparsity": float("nan")}, "sparsity: found nan"),
        ({"inputs": 1.5}, "inputs: found 1.5"),
        ({"refresh": 0}, "refresh: found 0"),
        ({"sparse": ["nowhere"]}, "nowhere"),
        ({"sparse": []}, "no pattern"),
        ({"sparse": "0"}, "a list"),
        ({"sparse": ["1"]}, "a BatchNorm2d"),
        ({"sparse": ["3"]}, "a ConvTranspose2d"),
        ({"sparse": ["4"]}, "a Conv2d"),
    ],
)
def test_what_makes_no_sense_is_refused(options, found) -> None:
    circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3),
        circular, nn.Conv2d(4, 4, 3),
    )  # fmt: skip
    with pytest.raises(InputError) as error:
        sparsify(model, **{"sparsity": 0.5, **options})
    assert found in str(error.value)
    with pytest.raises(InputError, match="no layer to sparsify"):
        sparsify(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 0.5)


def test_without_kernels_there_is_the_reference(monkeypatch) -> None:
    monkeypatch.setenv("HANSA_KERNELS", "off")
    kernels.find.cache_clear()
    try:
        model = CNN((1, 8, 8), 3, (4, 8), 8)
        with pytest.raises(InputError, match="HANSA_KERNELS is off"):
            sparsify(model, 0.5, path="kernels")
        sparse = sparsify(model, 0.5).train()
        sparse(torch.randn(4, 1, 8, 8)).sum().backward()
        assert sparse.how == "reference path (HANSA_KERNELS is off)"
    finally:
        kernels.find.cache_clear()


@needs_kernels
def test_odd_inputs_take_the_reference_path() -> None:
    sparse = sparsify(CNN((1, 8, 8), 3, (4, 8), 8), 0.5, path="kernels").train()
    x = torch.randn(4, 1, 16, 8)[:, :, ::2]
    assert not x.is_contiguous()
    assert torch.equal(sparse(x), sparse(x.contiguous()))
    wide = sparsify(CNN((1, 8, 8), 3, (4, 8), 8).double(), 0.5, path="kernels").train()
    wide(x.double()).sum().backward()  # float64
    assert wide.conv2.weight.grad.dtype is torch.float64


@needs_kernels
def test_what_is_no_number_stays_none() -> None:
    sparse = sparsify(CNN((1, 8, 8), 3, (4, 8), 8), 0.0, path="kernels").train()
    for value in (float("nan"), float("inf")):
        x = torch.randn(4, 1, 8, 8)
        x[0] = value
        loss = F.cross_entropy(sparse(x), torch.zeros(4, dtype=torch.long))
        assert not loss.isfinite()


@needs_kernels
def test_a_layer_is_timed_once_and_the_faster_way_is_taken(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HANSA_CACHE", str(tmp_path))
    calls: list[Geometry] = []

    def measure(geometry, *_, **__):
        calls.append(geometry)
        linear = geometry.height == 1
        return probe.Timing(1.0, 2.0) if linear else probe.Timing(2.0, 1.0)

    monkeypatch.setattr(probe, "measure", measure)
    x = torch.randn(4, 1, 8, 8)
    for _ in range(2):
        sparse = sparsify(CNN((1, 8, 8), 3, (4, 8), 8), 0.9, batch_size=4).train()
        sparse(x)
        assert sparse.rule.compiled == {"conv2": False, "hidden": True}
        assert "in 1 of 2 layers" in sparse.how
    assert len(calls) == 2
    for path in (tmp_path / "hansa" / "kernels").iterdir():
        path.write_text("damaged")
    sparsify(CNN((1, 8, 8), 3, (4, 8), 8), 0.9, batch_size=4).train()(x)
    assert len(calls) == 4


@needs_kernels
def test_a_layer_can_be_timed() -> None:
    for linear in (False, True):
        geometry = Geometry(4, 1, 1, 4) if linear else Geometry(4, 6, 6, 4, (3, 3), padding=(1, 1))
        took = probe.measure(geometry, 8, 0.5, 0.5, linear)
        assert took.compiled > 0
        assert took.reference > 0


class Block(nn.Module):
    """A residual block whose parts are used in several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.other, self.relu = BatchNorm2d(3), BatchNorm2d(3), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.kind:
            case "both":
                return F.relu(self.norm(x) + self.other(x))
            case "right":
                return self.relu(x + self.norm(x))
            case "scalar":
                return (self.norm(x) + 1).relu()
            case "itself":
                y = self.norm(x)
                return F.relu(y + y)
            case "shared":
                y = self.norm(x)
                return F.relu(y) + y
            case "no relu":
                return (self.norm(x) + x).sigmoid()
            case "module":
                return self.relu(self.norm(x))
        raise ValueError(self.kind)


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("both", 2), ("right", 1), ("scalar", 3), ("itself", 3), ("shared", 3), ("no relu", 2),
        ("module", 1),
    ],
)  # fmt: skip
def test_fusion_changes_no_number(kind, left) -> None:
    block = Block(kind).train()
    x = torch.randn(4, 3, 2, 2)
    wanted = copy.deepcopy(block)(x)
    graph = fused(block)
    steps = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    assert len(steps) == left
    torch.testing.assert_close(torch.fx.Interpreter(block, graph=graph).run(x), wanted)

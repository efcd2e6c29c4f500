"""Which layers become sparse, what they keep of the model, and what is refused."""

import copy
import io
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hansa.errors import InputError
from hansa.models.images import CNN, MLP, ResNet18
from hansa.sparse import choice, convert, kernels, probe
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
    for name, layer in sparse.sparse_layers.items():
        assert torch.equal(layer.weight, model.get_submodule(name).weight)  # none was set to zero
        more = layer.masked().count_nonzero() - count_kept(0.9, layer.weight.numel())
        assert 0 <= more <= 10  # of equal size with the last one
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
    ways = {"layers": 1.0, "kernels": 2.0, "contiguous": 2.0, "channels-last": 2.0}
    monkeypatch.setattr(choice, "measure", lambda *_: ways)
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


def _chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *layers, nn.Flatten(), nn.LazyLinear(3))


def _both(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the output of one training step by both paths, at sparsity 0."""
    model(x)  # for the lazy layer
    sparse = [sparsify(model, 0.0, path=path).train() for path in ("kernels", "reference")]
    return [one(x) for one in sparse]


@needs_kernels
@pytest.mark.parametrize(
    "layers",
    [
        [nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True)],
        [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(inplace=True)],
        [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=1, eps=1), nn.ReLU()],
        [nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4, eps=1), nn.ReLU()],
        [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.AvgPool2d(2)],
    ],
)
def test_common_forms_of_models_work_on_kernels(layers) -> None:
    one, other = _both(_chain(*layers), torch.randn(6, 2, 8, 8))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    one.sum().backward()


@needs_kernels
def test_a_frozen_normalisation_stays_frozen() -> None:
    model = _chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model(torch.randn(2, 2, 8, 8))
    sparse = sparsify(model, 0.5, path="kernels").train()
    norm = sparse.get_submodule("2").eval()
    before = norm.running_mean.clone()
    sparse(torch.randn(2, 2, 8, 8))
    assert not norm.training
    assert torch.equal(norm.running_mean, before)


@needs_kernels
@pytest.mark.parametrize("shape", [(4, 48), (0, 16), (4, 1_000_000)])
def test_inputs_that_do_not_fit_meet_pytorchs_own_error(shape) -> None:
    sparse = sparsify(MLP((16,), 3, (16, 16)), 0.5, path="kernels").train()
    sparse(torch.randn(4, 16))
    layer = sparse.get_submodule("body.linear1")
    if shape[0]:
        with pytest.raises(RuntimeError, match="shape"):
            layer(torch.randn(shape))
    else:
        assert sparse(torch.zeros(shape)).shape == (0, 3)


@needs_kernels
def test_a_number_that_is_none_reaches_the_loss() -> None:
    model = _chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(4, 2, 8, 8)
    model(x)
    sparse = sparsify(model, 0.5, path="kernels").train()
    sparse(x)
    x[0, 0, 4, 4] = float("nan")
    assert sparse(x).isnan().any()


@needs_kernels
def test_one_sample_autocast_and_several_arguments() -> None:
    layer = sparsify(MLP((16,), 3, (16, 16)), 0.5, path="kernels").train()
    assert layer(torch.randn(16)[None]).shape == (1, 3)
    assert layer.get_submodule("body.linear1")(torch.randn(16)).shape == (16,)
    model = sparsify(CNN((1, 8, 8), 3, (4, 8), 8), 0.5, path="kernels").train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(4, 1, 8, 8)).float().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    class Scaled(MLP):
        def forward(self, inputs, scale=1.0):
            return super().forward(inputs) * scale

    scaled = sparsify(Scaled((16,), 3, (16, 16)), 0.5, path="kernels").train()
    assert scaled(torch.randn(4, 16), scale=0.0).abs().sum() == 0


@pytest.mark.parametrize("path", ["kernels", "reference"])
def test_a_second_derivative_is_refused_and_not_wrong(path) -> None:
    if path == "kernels" and kernels.kernels() is None:
        pytest.skip("no kernels")
    model = sparsify(CNN((1, 8, 8), 3, (4, 8), 8), 0.5, path=path).train()
    loss = model(torch.randn(4, 1, 8, 8)).sum()

    def twice() -> None:
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        sum(g.square().sum() for g in gradients).backward()

    with pytest.raises(RuntimeError, match=r"twice|once_differentiable"):
        twice()


class Sly(nn.Module):
    """A block that a trace would freeze, in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.last = kind, nn.Conv2d(4, 4, 3, padding=1), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "keeps":
            self.last = x
        if self.kind == "draws":
            return self.conv(x) + torch.randn(4, 1, 1)
        if self.kind == "skips" and random.random() < 0.5:  # noqa: S311
            return x
        return F.dropout(self.conv(x), 0.5, self.training and self.kind == "drops")


@needs_kernels
@pytest.mark.parametrize("kind", ["keeps", "draws", "skips", "drops"])
def test_what_a_trace_would_freeze_runs_as_it_is_written(kind) -> None:
    model = _chain(Sly(kind), nn.Conv2d(4, 4, 3))
    x = torch.randn(4, 2, 8, 8)
    with torch.no_grad():
        model(x)
    sparse = sparsify(model, 0.0, path="kernels").train()
    outputs = {sparse(x).detach().sum().item() for _ in range(12)}
    block = sparse.get_submodule("1")
    assert (len(outputs) > 1) is (kind != "keeps")
    assert block.last is None or type(block.last) is torch.Tensor
    if kind == "drops":
        block.eval()
        assert len({sparse(x).detach().sum().item() for _ in range(4)}) == 1


@needs_kernels
def test_a_layer_that_is_exchanged_is_no_longer_run() -> None:
    model = _chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(4, 2, 8, 8)
    model(x)  # for the lazy layer
    sparse = sparsify(model, 0.5, path="kernels").train()
    assert sparse(x).any()
    last = nn.Linear(sparse.plain[-1].in_features, 3)
    for each in last.parameters():
        nn.init.zeros_(each)
    sparse.plain[-1] = last
    assert not sparse(x).any()


@needs_kernels
def test_hooks_are_called() -> None:
    model = _chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(4, 2, 8, 8)
    model(x)
    seen: list[int] = []
    model[3].register_forward_hook(lambda *_: seen.append(1))
    sparsify(model, 0.5, path="kernels").train()(x)
    assert 1 in seen


@needs_kernels
def test_all_processes_believe_the_first_that_measured(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HANSA_CACHE", str(tmp_path))
    geometry = Geometry(4, 1, 1, 4)

    def slower(*arguments):
        with monkeypatch.context() as other:  # another process measures meanwhile
            other.setattr(probe, "measure", lambda *_: probe.Timing(1.0, 2.0))
            assert probe.timing(geometry, 8, 0.5, 0.5) == probe.Timing(1.0, 2.0)
        return probe.Timing(2.0, 1.0)

    monkeypatch.setattr(probe, "measure", slower)
    assert probe.timing(geometry, 8, 0.5, 0.5) == probe.Timing(1.0, 2.0)
    monkeypatch.setenv("HANSA_CACHE", "/dev/null/nowhere")
    monkeypatch.setattr(probe, "measure", lambda *_: probe.Timing(3.0, 1.0))
    assert probe.timing(geometry, 8, 0.5, 0.5) == probe.Timing(3.0, 1.0)


@needs_kernels
def test_lists_of_many_batch_sizes_do_not_pile_up() -> None:
    sparse = sparsify(MLP((16,), 3, (16, 16)), 0.5, path="kernels").train()
    for batch in (32, 5, 32, 7, 32, 9):
        sparse(torch.randn(batch, 16))
    lists = sparse.get_submodule("body.linear1")._lists
    assert [batch for _, batch in lists] == [32, 9]

"""Whole channels: the smaller network is the masked one."""

import copy

import pytest
import torch
from torch import nn

from hansa.errors import InputError
from hansa.models.images import CNN, VGG16, ResNet18, ResNet20
from hansa.models.masks import attach
from hansa.models.resize import channels_of, resize
from hansa.pruning import Grasp, Magnitude, Objective, ProsPr, Random, Snip
from hansa.pruning.channels import prune_channels
from hansa.pruning.select import count
from pruning.test_saliency import images


class Depthwise(nn.Module):
    """Depthwise and transposed convolutions, biases, a residual sum, and a flattened end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.down = nn.Conv2d(6, 8, 2, stride=2)
        self.hidden = nn.Linear(8 * 64, 12)
        self.head = nn.Linear(12, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        maps = torch.relu(self.first(inputs))
        inner = torch.relu(self.norm(self.depth(maps)))
        maps = maps + self.down(torch.relu(self.up(inner)))
        return self.head(torch.relu(self.hidden(torch.relu(maps).flatten(1))))


MODELS = {
    "resnet18": lambda: ResNet18((3, 8, 8), 10, width=8, norm="batch"),
    "resnet20": lambda: ResNet20((3, 8, 8), 10, width=8, norm="batch"),
    "vgg16": lambda: VGG16((3, 8, 8), 10, width=4, norm="batch"),
    "cnn": lambda: CNN((3, 8, 8), 10, channels=(6, 9), hidden=14),
    "depthwise": Depthwise,
}


def trained(make) -> nn.Module:
    """A model whose running statistics are not what it began with."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for inputs, _ in images(3):
            model.train()(inputs)
    return model


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("scorer", [ProsPr(inner_steps=1), Random()])
@pytest.mark.parametrize("density", [0.5, 0.25])
def test_the_smaller_network_is_the_masked_one(name, scorer, density) -> None:
    model = trained(MODELS[name])
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = prune_channels(model, images(), density, scorer)
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    total = sum(len(kept) for kept in found.kept.values())
    assert sum(int(kept.sum()) for kept in found.kept.values()) == count(density, total)
    masked = attach(copy.deepcopy(model), found.masks).eval()
    inputs = images(1)[0][0]
    with torch.no_grad():
        expected, outputs = masked(inputs), found.model.eval()(inputs)
    assert torch.allclose(outputs, expected, atol=1e-5)
    sizes = [sum(p.numel() for p in each.parameters()) for each in (found.model, model)]
    assert sizes[0] < 0.8 * sizes[1]
    # And again from its sizes and its state, without the library.
    again = MODELS[name]()
    resize(again, channels_of(found.model))
    again.load_state_dict(found.model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(inputs), outputs)


def test_channels_of_residual_sums_go_together() -> None:
    model = trained(MODELS["resnet20"])
    found = prune_channels(model, images(), 0.5, Snip())
    sums = [
        "stem.0",
        *(f"stages.stage1.{k}.conv2" for k in range(3)),
        *(f"stages.stage1.{k}.norm2" for k in range(3)),
    ]
    rows = {
        tuple(found.masks[f"{layer}.weight"].flatten(1).any(1).tolist())
        for layer in sums
        if "conv" in layer or "stem" in layer
    }
    norms = {tuple(found.masks[f"{layer}.bias"].tolist()) for layer in sums if "norm" in layer}
    assert len(rows | norms) == 1


def test_a_channels_score_is_the_derivative_by_a_factor_on_its_output() -> None:
    """Central differences by scaling gamma and beta of one channel before the inner steps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten(), nn.Linear(180, 10)
    ).double()
    with torch.no_grad():
        model[1].bias.normal_()
    data = [(x.double(), y) for x, y in images()]
    scorer = ProsPr(inner_steps=1, inner_lr=0.3)
    found = prune_channels(model, data, 0.5, scorer).scores["0"]

    def outcome(channel: int, factor: float) -> float:
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed[1].weight[channel] *= factor
            changed[1].bias[channel] *= factor
        objective = Objective(changed)
        moved = {
            name: p - 0.3 * g
            for (name, p), g in zip(
                objective.params.items(),
                objective.gradient(objective.params, data[0]).values(),
                strict=True,
            )
        }
        return float(objective.loss(moved, data[1]))

    for channel in range(5):
        slope = (outcome(channel, 1 + 1e-4) - outcome(channel, 1 - 1e-4)) / 2e-4
        assert float(found[channel]) == pytest.approx(abs(slope), rel=1e-4)


def test_sums_of_element_scores() -> None:
    model = trained(MODELS["vgg16"])
    found = prune_channels(model, images(), 0.5, Magnitude()).scores
    name = "body.layer1_1.0"
    expected = model.get_parameter(f"{name}.weight").detach().abs().flatten(1).sum(1)
    assert torch.allclose(found[name].float(), expected)


def test_excluded_layers_keep_their_channels() -> None:
    model = trained(MODELS["vgg16"])
    found = prune_channels(model, images(), 0.5, Random(), exclude=["body.layer1_*"])
    assert found.model.get_submodule("body.layer1_2.0").out_channels == 4
    assert not any(root.startswith("body.layer1_") for root in found.kept)


class Joined(nn.Module):
    """Two convolutions side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        maps = torch.cat([self.first(inputs), self.second(inputs)], 1)
        return self.head(self.norm(maps).mean((2, 3)))


class Split(nn.Module):
    """A convolution whose channels are added to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(3, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        one, two = self.first(inputs).chunk(2, 1)
        return self.head((one + two).mean((2, 3)))


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )


@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        (Joined, {}, "norm"),
        (Split, {}, "first"),
        (lambda: chain(nn.Conv2d(8, 8, 3, groups=2)), {}, "2 groups"),
        (lambda: chain(nn.BatchNorm2d(8, affine=False)), {}, "without weights"),
        (lambda: ResNet18((3, 8, 8), 10, width=16), {}, "GroupNorm"),
        (MODELS["cnn"], {"by": "output", "scorer": Grasp()}, "output"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), {}, "no channels"),
        (MODELS["cnn"], {"density": 0.01}, "floor"),
    ],
)
def test_wrong_input_is_refused(model, options, match) -> None:
    with pytest.raises(InputError, match=match):
        prune_channels(model(), images(), **{"density": 0.5, **options})


@pytest.mark.parametrize(
    "channels",
    [
        {"nope": {}},
        {"conv1": {"in_channels": 3, "out_channels": 60, "groups": 1}},
        {"conv1": {"in_channels": 3, "out_channels": 0, "groups": 1}},
        {"conv1": {"out_channels": 2}},
    ],
)
def test_sizes_that_do_not_fit_are_refused(channels) -> None:
    with pytest.raises(InputError, match=r"architecture\.channels"):
        resize(MODELS["cnn"](), channels)

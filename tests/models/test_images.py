import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hansa.models.images import CNN, MLP, ResNet18, group_norm


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_resnet18_has_the_papers_number_of_parameters() -> None:
    assert size(ResNet18((3, 224, 224), 10, norm="batch", stem="large")) == 11_181_642


def test_group_norm_changes_no_number_of_parameters() -> None:
    shape = (3, 32, 32)
    assert size(ResNet18(shape, 10, norm="group")) == size(ResNet18(shape, 10, norm="batch"))


def test_the_small_stem_saves_the_difference_of_the_kernels() -> None:
    large, small = (ResNet18((3, 32, 32), 10, stem=stem) for stem in ("large", "small"))
    assert size(large) - size(small) == 3 * 64 * (7 * 7 - 3 * 3)


@pytest.mark.parametrize(
    ("stem", "stem_size", "sizes"),
    [("small", 32, [32, 16, 8, 4]), ("large", 8, [8, 4, 2, 1])],
)
def test_resnet18_halves_its_maps_between_stages(
    stem: str, stem_size: int, sizes: list[int]
) -> None:
    model = ResNet18((3, 32, 32), 10, width=4, stem=stem)
    maps = model.stem(torch.zeros(1, 3, 32, 32))
    assert maps.shape == (1, 4, stem_size, stem_size)
    found = []
    for stage in model.stages:
        maps = stage(maps)
        found.append(tuple(maps.shape))
    assert found == [(1, 4 * 2**k, size, size) for k, size in enumerate(sizes)]


def test_a_block_adds_its_input_before_the_last_relu() -> None:
    block = ResNet18((3, 8, 8), 2, width=4).get_submodule("stages.stage1.0")
    nn.init.zeros_(block.get_parameter("norm2.weight"))
    nn.init.constant_(block.get_parameter("norm2.bias"), -0.5)
    maps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(maps), F.relu(maps - 0.5))


def test_the_head_of_resnet18_sees_the_mean_of_every_map() -> None:
    model = ResNet18((3, 8, 8), 2, width=1)
    model.add_module("stem", nn.Identity())
    model.add_module("stages", nn.Identity())
    nn.init.ones_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    maps = torch.arange(32.0).reshape(1, 8, 2, 2)
    assert model(maps).tolist() == [[124.0, 124.0]]


@pytest.mark.parametrize(("norm", "buffers"), [("group", 0), ("batch", 3 * 20)])
def test_only_batch_norm_keeps_statistics(norm: str, buffers: int) -> None:
    model = ResNet18((3, 8, 8), 2, width=4, norm=norm)
    assert len(list(model.buffers())) == buffers


def test_with_group_norm_a_sample_does_not_see_the_others() -> None:
    torch.manual_seed(0)
    model = ResNet18((3, 8, 8), 2, width=16).train()
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(model(images)[:1], model(images[:1]))


@pytest.mark.parametrize("options", [{"norm": "layer"}, {"stem": "medium"}])
def test_resnet18_refuses_options_it_does_not_have(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="norm must be 'group' or 'batch'"):
        ResNet18((3, 8, 8), 2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("channels", "groups"), [(64, 4), (32, 2), (16, 1), (24, 1), (8, 1)])
def test_groups_have_16_channels_where_they_divide(channels: int, groups: int) -> None:
    norm = group_norm(channels)
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_groups, norm.num_channels) == (groups, channels)


def test_mlp_has_the_layers_it_is_told() -> None:
    model = MLP((1, 2, 2), 2, hidden=(3, 5))
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert shapes == [(3, 4), (3,), (5, 3), (5,), (2, 5), (2,)]


def test_mlp_computes_by_hand() -> None:
    model = MLP((1, 1, 2), 2, hidden=(2,))
    values = [[[1.0, 0.0], [0.0, -1.0]], [0.0, 1.0], [[1.0, 1.0], [0.0, 2.0]], [0.5, 0.0]]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(torch.tensor(value))
    # (3, 4) -> (3, -3) -> (3, 0) by ReLU -> (3.5, 0); (-1, -2) -> (-1, 3) -> (0, 3) -> (3.5, 6)
    logits = model(torch.tensor([[[[3.0, 4.0]]], [[[-1.0, -2.0]]]]))
    assert logits.tolist() == [[3.5, 0.0], [3.5, 6.0]]


def test_mlp_without_hidden_layers_is_linear() -> None:
    model = MLP((1, 2, 2), 3, hidden=())
    images = torch.arange(8.0).reshape(2, 1, 2, 2)
    expected = images.reshape(2, 4) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), expected)


def test_cnn_counts_its_parameters_by_hand() -> None:
    # 3x3x1x32+32, 3x3x32x64+64, (64x2x2)x128+128, 128x10+10
    assert size(CNN((1, 8, 8), 10)) == 320 + 18_496 + 32_896 + 1_290


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 9, 14)])
def test_cnn_takes_any_image_of_four_pixels_or_more(shape: tuple[int, int, int]) -> None:
    model = CNN(shape, 7, channels=(2, 3), hidden=5)
    assert model(torch.zeros(2, *shape)).shape == (2, 7)


def test_cnn_agrees_with_the_same_layers_in_sequence() -> None:
    torch.manual_seed(0)
    model = CNN((1, 8, 8), 3, channels=(2, 4), hidden=5)
    same = nn.Sequential(
        model.conv1,
        nn.ReLU(),
        nn.MaxPool2d(2),
        model.conv2,
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        model.hidden,
        nn.ReLU(),
        model.head,
    )
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(model(images), same(images))

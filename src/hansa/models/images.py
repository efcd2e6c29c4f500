"""Small image models. Each takes [batch, channels, height, width] and returns logits."""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.Module:
    """Return GroupNorm with groups of 16 channels where they divide: no running statistics."""
    groups = channels // 16 if channels % 16 == 0 else 1
    return nn.GroupNorm(groups, channels)


NORMS: dict[str, Norm] = {"group": group_norm, "batch": nn.BatchNorm2d}


class MLP(nn.Module):
    """Fully connected layers with ReLU between them."""

    def __init__(self, shape: Sequence[int], classes: int, hidden: Sequence[int] = (64,)) -> None:
        super().__init__()
        widths = [torch.Size(shape).numel(), *hidden]
        self.body = nn.Sequential()
        for k, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            self.body.add_module(f"linear{k}", nn.Linear(fan_in, fan_out))
            self.body.add_module(f"relu{k}", nn.ReLU())
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, classes]."""
        logits: torch.Tensor = self.head(self.body(inputs.flatten(1)))
        return logits


class CNN(nn.Module):
    """Two 3x3 convolutions, each with ReLU and 2x2 max-pooling, one hidden layer, a head."""

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        channels: tuple[int, int] = (32, 64),
        hidden: int = 128,
    ) -> None:
        super().__init__()
        depth, height, width = shape
        self.conv1 = nn.Conv2d(depth, channels[0], 3, padding=1)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 3, padding=1)
        self.hidden = nn.Linear(channels[1] * (height // 4) * (width // 4), hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, classes]."""
        maps = F.max_pool2d(F.relu(self.conv1(inputs)), 2)
        maps = F.max_pool2d(F.relu(self.conv2(maps)), 2)
        logits: torch.Tensor = self.head(F.relu(self.hidden(maps.flatten(1))))
        return logits


class _Block(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.norm1 = norm(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.norm2 = norm(fan_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or fan_in != fan_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), norm(fan_out)
            )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        inner = F.relu(self.norm1(self.conv1(maps)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(maps))


class _ResNet(nn.Module):
    """A stem, stages of residual blocks, and a linear head on the mean over positions."""

    stem: nn.Sequential

    def _grow(self, width: int, stages: int, blocks: int, classes: int, make: Norm) -> None:
        """Add stages, each but the first of half the size and twice the channels, and the head."""
        self.stages = nn.Sequential()
        fan_in = width
        for k in range(stages):
            fan_out = width * 2**k
            stage = nn.Sequential(_Block(fan_in, fan_out, 1 if k == 0 else 2, make))
            stage.extend(_Block(fan_out, fan_out, 1, make) for _ in range(blocks - 1))
            self.stages.add_module(f"stage{k + 1}", stage)
            fan_in = fan_out
        self.head = nn.Linear(fan_in, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, classes]."""
        maps = self.stages(self.stem(inputs))
        logits: torch.Tensor = self.head(maps.mean((2, 3)))
        return logits


class ResNet18(_ResNet):
    """ResNet-18 (He et al., CVPR 2016, Table 1).

    Args:
        shape: channels, height and width of an input.
        classes: number of classes.
        width: channels of the first stage; 64 in the paper.
        norm: ``group``, or ``batch`` for the paper's BatchNorm.
        stem: ``small`` is one 3x3 convolution, for images of about 32 pixels; ``large`` is the
            paper's 7x7 convolution of stride 2 with max-pooling.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        width: int = 64,
        norm: str = "group",
        stem: str = "small",
    ) -> None:
        super().__init__()
        if norm not in NORMS or stem not in ("small", "large"):
            raise ValueError("norm must be 'group' or 'batch', stem 'small' or 'large'")
        make = NORMS[norm]
        large = stem == "large"
        self.stem = nn.Sequential(
            nn.Conv2d(
                shape[0], width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False
            ),
            make(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1) if large else nn.Identity(),
        )
        self._grow(width, 4, 2, classes, make)


class ResNet20(_ResNet):
    """ResNet-20 for small images (He et al., CVPR 2016, section 4.2).

    Three stages of three blocks. Where a stage begins with fewer maps than it gives out, the
    shortcut is a 1x1 convolution, and not the paper's padding with zeros.

    Args:
        shape: channels, height and width of an input.
        classes: number of classes.
        width: channels of the first stage; 16 in the paper.
        norm: ``group``, or ``batch`` for the paper's BatchNorm.
    """

    def __init__(
        self, shape: Sequence[int], classes: int, width: int = 16, norm: str = "group"
    ) -> None:
        super().__init__()
        make = _norm(norm)
        self.stem = nn.Sequential(
            nn.Conv2d(shape[0], width, 3, 1, 1, bias=False), make(width), nn.ReLU()
        )
        self._grow(width, 3, 3, classes, make)


class VGG16(nn.Module):
    """VGG-16 (Simonyan and Zisserman, ICLR 2015, configuration D) with one linear layer at its end.

    Maps are halved after each of the five stages while they are larger than one pixel.

    Args:
        shape: channels, height and width of an input.
        classes: number of classes.
        width: channels of the first stage; 64 in the paper.
        norm: ``group`` or ``batch``; the paper has none.
    """

    def __init__(
        self, shape: Sequence[int], classes: int, width: int = 64, norm: str = "group"
    ) -> None:
        super().__init__()
        make = _norm(norm)
        self.body = nn.Sequential()
        fan_in, side = shape[0], min(shape[1:])
        for k, num in enumerate((2, 2, 3, 3, 3)):
            fan_out = width * min(2**k, 8)
            for i in range(num):
                layer = nn.Sequential(
                    nn.Conv2d(fan_in, fan_out, 3, 1, 1, bias=False), make(fan_out), nn.ReLU()
                )
                self.body.add_module(f"layer{k + 1}_{i + 1}", layer)
                fan_in = fan_out
            if side > 1:
                self.body.add_module(f"pool{k + 1}", nn.MaxPool2d(2))
                side //= 2
        self.head = nn.Linear(fan_in, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, classes]."""
        logits: torch.Tensor = self.head(self.body(inputs).mean((2, 3)))
        return logits


def _norm(name: str) -> Norm:
    if name not in NORMS:
        raise ValueError("norm must be 'group' or 'batch'")
    return NORMS[name]

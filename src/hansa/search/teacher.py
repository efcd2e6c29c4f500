"""What a trained network tells blocks: the inputs and outputs of its stages, and its logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hansa.errors import InputError
from hansa.models.blox import Blox
from hansa.models.modes import in_mode
from hansa.search.distillation import channel_variance

_BATCH = 256
"""Inputs that the teacher sees at once; in evaluation mode no output depends on it."""


@dataclass(frozen=True)
class Features:
    """A teacher's features of some inputs.

    Attributes:
        maps: input of every stage and, last, the output of the last one, float32
            [n, width * 2^k, side / 2^k, side / 2^k] each; ``maps[k]`` goes into stage k and
            ``maps[k + 1]`` comes out of it.
        variance: of every channel of ``maps[k]``, [channels].
        folder: of the files that hold the maps, None where they are in memory.
    """

    maps: tuple[torch.Tensor, ...]
    variance: tuple[torch.Tensor, ...]
    folder: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Give another process the files' names instead of what they hold."""
        if self.folder is None:
            return Features, (self.maps, self.variance)
        return _opened, (self.folder, [tuple(each.shape) for each in self.maps], self.variance)

    @property
    def num_bytes(self) -> int:
        """The size of the maps; at width w and side s 7.5 * w * s^2 bytes an input."""
        return sum(each.numel() * each.element_size() for each in self.maps)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Hold a module in evaluation mode and without gradients inside the block."""
    with in_mode(module, training=False), torch.no_grad():
        yield


def features(teacher: Blox, inputs: torch.Tensor, folder: Path | None = None) -> Features:
    """Return a teacher's features of inputs, each computed once.

    Args:
        teacher: a trained network; it is asked in evaluation mode.
        inputs: float32 [n, channels, side, side].
        folder: where given, the maps lie there in files mapped into memory (``maps-K.bin``), for
            data whose features do not fit into it; what they hold is not read again later.
    """
    if not len(inputs):
        raise InputError("inputs", "none", "at least one")
    found: list[torch.Tensor] = []
    with evaluating(teacher):
        for start in range(0, len(inputs), _BATCH):
            part = teacher.features(inputs[start : start + _BATCH])
            if not found:
                shapes = [(len(inputs), *each.shape[1:]) for each in part]
                found = [_empty(shape, folder, k) for k, shape in enumerate(shapes)]
            for whole, own in zip(found, part, strict=True):
                whole[start : start + len(own)] = own
    return Features(tuple(found), tuple(channel_variance(each) for each in found), folder)


def _opened(
    folder: Path, shapes: list[tuple[int, ...]], variance: tuple[torch.Tensor, ...]
) -> Features:
    maps = tuple(_empty(shape, folder, k) for k, shape in enumerate(shapes))
    return Features(maps, variance, folder)


def _empty(shape: tuple[int, ...], folder: Path | None, number: int) -> torch.Tensor:
    if folder is None:
        return torch.empty(shape)
    folder.mkdir(parents=True, exist_ok=True)
    size = torch.Size(shape).numel()
    name = str(folder / f"maps-{number}.bin")
    return torch.from_file(name, shared=True, size=size).view(shape)


def logits_after(network: Blox, stage: int, maps: torch.Tensor) -> torch.Tensor:
    """Return the logits [n, classes] of a network from the output of one of its stages.

    Args:
        network: asked as it is, in whatever mode.
        stage: the position of the stage whose output the maps are; -1 for the stem.
        maps: [n, channels, side, side].
    """
    for later in list(network.stages)[stage + 1 :]:
        maps = later(maps)
    logits: torch.Tensor = network.head(maps.mean((2, 3)))
    return logits


def shape_of(network: Blox) -> dict[str, Any]:
    """Return the options that make another network of the same widths, as JSON values."""
    convolution, norm = network.stem[0], network.stem[1]
    return {
        "channels": convolution.in_channels,
        "classes": network.head.out_features,
        "width": convolution.out_channels,
        "norm": "batch" if isinstance(norm, nn.BatchNorm2d) else "group",
    }


def reduction_of(stage: nn.Module) -> nn.Module:
    """Return the part of a stage that every candidate has."""
    return stage.get_submodule("reduction")

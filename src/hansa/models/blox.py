"""The networks of Blox (arXiv 2210.07271, section 3): a stem, three searched stages, a head."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from hansa.errors import InputError
from hansa.models.blox_space import CELLS, NUM_STAGES, RawVector, cells_of, check_id, id_of
from hansa.models.images import NORMS, Norm


class _Layer(nn.Sequential):
    """A convolution with its bias, a norm and ReLU."""

    def __init__(
        self, fan_in: int, fan_out: int, kernel: int, norm: Norm, stride: int = 1, groups: int = 1
    ) -> None:
        padding = (kernel - 1) // 2
        super().__init__(
            nn.Conv2d(fan_in, fan_out, kernel, stride, padding, groups=groups),
            norm(fan_out),
            nn.ReLU(),
        )


class _Excitation(nn.Module):
    """Channels weighted by what the mean over positions says; nothing is squeezed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 1)
        self.second = nn.Conv2d(channels, channels, 1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        weights = self.second(F.relu(self.first(maps.mean((2, 3), keepdim=True))))
        scaled: torch.Tensor = maps * weights.sigmoid()
        return scaled


class _Residual(nn.Sequential):
    """Layers whose input is added to what they return."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = super().forward(maps)
        return maps + inner


def _conv(c: int, norm: Norm) -> nn.Module:
    return nn.Sequential(*(_Layer(c, c, 3, norm) for _ in range(4)))


def _mbconv(c: int, norm: Norm) -> nn.Module:
    """Two residual units of a full convolution to twice the channels and one back."""
    return nn.Sequential(
        *(
            _Residual(_Layer(c, 2 * c, 3, norm), _Excitation(2 * c), _Layer(2 * c, c, 1, norm))
            for _ in range(2)
        )
    )


def _bconv(c: int, norm: Norm) -> nn.Module:
    """Six residual units around a depthwise convolution, of half, equal and twice the channels."""
    return nn.Sequential(
        *(
            _Residual(_Layer(c, m, 1, norm), _Layer(m, m, 5, norm, groups=m), _Layer(m, c, 1, norm))
            for m in (c // 2, c, 2 * c) * 2
        )
    )


_MAKE = (_conv, _mbconv, _bconv)


class BloxCell(nn.Module):
    """One cell: maps [batch, C, S, S] in and out.

    Args:
        number: of the cell, see ``blox_space.CELLS``.
        channels: C.
        norm: makes a norm for a number of channels.
    """

    def __init__(self, number: int, channels: int, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.wiring = CELLS[number].wiring
        self.operations = nn.ModuleList(
            _MAKE[op](channels, norm) for op in CELLS[number].operations
        )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Return what the cell makes of its input."""
        first: torch.Tensor = self.operations[0](maps)
        if self.wiring == "single":
            return first
        if self.wiring == "parallel":
            inner = maps
        else:
            inner = first + maps if self.wiring in ("inner_skip", "both_skips") else first
        second: torch.Tensor = self.operations[1](inner)
        return second if self.wiring in ("sequential", "inner_skip") else second + first


class _Reduction(nn.Module):
    """Half the size, twice the channels: two ways, added."""

    def __init__(self, c: int, norm: Norm) -> None:
        super().__init__()
        self.long = nn.Sequential(_Layer(c, 2 * c, 3, norm, 2), _Layer(2 * c, 2 * c, 3, norm))
        self.short = _Layer(c, 2 * c, 2, norm, 2)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.long(maps) + self.short(maps)
        return added


class BloxStage(nn.Sequential):
    """A cell and the reduction after it: [batch, C, S, S] to [batch, 2C, S/2, S/2]."""

    def __init__(self, number: int, channels: int, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.add_module("cell", BloxCell(number, channels, norm))
        self.add_module("reduction", _Reduction(channels, norm))


class Blox(nn.Module):
    """A model of the space.

    Args:
        shape: channels, height and width of an input; height and width multiples of 8.
        classes: number of classes.
        arch: the model's number, or a raw vector.
        width: channels of the first stage, an even number; 32 in the paper.
        norm: ``batch`` as in the paper, or ``group``.

    Raises:
        InputError: no model of the space, or sizes that do not fit it.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        arch: int | RawVector,
        width: int = 32,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise InputError("model.options.norm", repr(norm), "'group' or 'batch'")
        if width < 2 or width % 2:
            raise InputError("model.options.width", width, "an even number from 2")
        if len(shape) != 3 or any(side % 2**NUM_STAGES or side < 1 for side in shape[1:]):
            allowed = "channels, height and width, both multiples of 8"
            raise InputError("shape of an input", tuple(shape), allowed)
        make = NORMS[norm]
        self.number = check_id(arch) if isinstance(arch, int) else id_of(arch)
        self.stem = _Layer(shape[0], width, 3, make)
        self.stages = nn.ModuleList(
            BloxStage(cell, width * 2**k, make) for k, cell in enumerate(cells_of(self.number))
        )
        self.head = nn.Linear(width * 2**NUM_STAGES, classes)

    def features(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Return the input of every stage and, last, the output of the last one.

        ``features(x)[k]`` goes into stage k and ``features(x)[k + 1]`` comes out of it, each
        [batch, width * 2^k, side / 2^k, side / 2^k]: what stages are trained on one by one.
        """
        found = [self.stem(inputs)]
        for stage in self.stages:
            found.append(stage(found[-1]))
        return found

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, classes]."""
        logits: torch.Tensor = self.head(self.features(inputs)[-1].mean((2, 3)))
        return logits

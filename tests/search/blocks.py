"""A small teacher and its data, which tests of blocks share."""

import torch
from torch import nn

from hansa.models.blox import Blox
from hansa.search.blockwise import BlockFitting

OPTIONS = BlockFitting(steps=6, batch_size=4, evaluations=3)


def teacher(norm: str = "batch") -> Blox:
    torch.manual_seed(1)
    network = Blox((3, 8, 8), 5, 2000, width=4, norm=norm)
    norms = [each for each in network.modules() if isinstance(each, nn.BatchNorm2d)]
    for each in norms:
        each.momentum = None  # statistics of all that it saw, as of a trained network
    network(torch.randn(64, 3, 8, 8))
    for each in norms:
        each.momentum = 0.1
    return network


def inputs(num: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def labels(num: int = 12) -> torch.Tensor:
    return torch.arange(num) % 5

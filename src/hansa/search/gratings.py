"""Made-up images that tell models apart: each holds two gratings, and the pair is its class.

A grating is one of eight (four directions, two periods). An image holds two of them under
Gaussian windows, each at its own random place, phase and colour, and noise; its class is which of
twelve pairs. Every grating stands in three pairs, so one alone never tells the class.
"""

import math

import torch

from hansa.seeding import generator

PAIRS = tuple((k, (k + step) % 8) for k in range(8) for step in (1, 4) if step == 1 or k < 4)
"""The twelve pairs."""


def gratings(
    num: int, seed: int, side: int = 16, noise: float = 0.15
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images float32 [num, 3, side, side] and classes int64 [num].

    Args:
        num: number of images.
        seed: of the stream they are drawn from; the first images of two lengths are equal.
        side: height and width in pixels.
        noise: standard deviation; a grating's amplitude is 1 in its own colour.
    """
    rng = generator(seed, "gratings")
    draws = torch.rand(num, 2 + 2 * 6, generator=rng)  # row by row, so that a prefix stays one
    labels = (draws[:, 0] * len(PAIRS)).long()
    images = torch.zeros(num, 3, side, side)
    rows, columns = torch.meshgrid(
        torch.arange(side) * 1.0, torch.arange(side) * 1.0, indexing="ij"
    )
    pairs = torch.tensor(PAIRS)[labels]
    for part in range(2):
        own = draws[:, 2 + 6 * part : 8 + 6 * part]
        kind = pairs[:, part]
        angle, period = (kind % 4) * (math.pi / 4), torch.where(kind < 4, 3.0, 6.0)
        centre = (0.2 + 0.6 * own[:, :2]) * side
        down = rows[None] - centre[:, 0, None, None]
        right = columns[None] - centre[:, 1, None, None]
        along = right * angle.cos()[:, None, None] + down * angle.sin()[:, None, None]
        wave = (2 * math.pi * (along / period[:, None, None] + own[:, 2, None, None])).sin()
        window = (-(down**2 + right**2) / (2 * (side / 5) ** 2)).exp()
        colour = torch.nn.functional.normalize(own[:, 3:6] - 0.5, dim=1)
        images += colour[:, :, None, None] * (wave * window)[:, None]
    for k in range(num):
        own_noise = generator(seed, "grating noise", k)
        images[k] += noise * torch.randn(3, side, side, generator=own_noise)
    return images, labels

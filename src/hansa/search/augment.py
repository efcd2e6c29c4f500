"""Augmentation of training batches: a shift, or the original's RandAugment, flip, crop, cutout."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
_OPERATIONS = 2
_MAGNITUDE = 14 / 30
_CUTOUT = 16


def shift(inputs: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Return images [n, c, h, w], each moved by up to one pixel in both directions."""
    return _crops(inputs, 1, rng)


def randaugment(inputs: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Return images float32 in [-1, 1] [n, 3, h, w] changed as in arXiv 2210.07271, section 4.

    RandAugment (arXiv 1909.13719) with two operations of magnitude 14 of 30, a flip with
    probability one half, a crop after padding by 4, and a square of 16 pixels set to the mean.
    """
    pixels = inputs.add(1).mul(127.5).round().clamp(0, 255).byte()
    pixels = pixels.permute(0, 2, 3, 1).contiguous()
    draws = torch.rand(len(inputs), _OPERATIONS, 2, generator=rng)
    changed = np.stack([_changed(image.numpy(), own) for image, own in zip(pixels, draws)])  # noqa: B905
    made = torch.from_numpy(changed).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    flipped = torch.rand(len(made), generator=rng) < 0.5
    made = torch.where(flipped[:, None, None, None], made.flip(3), made)
    made = _crops(made, 4, rng)
    height, width = made.shape[2:]
    centre = torch.rand(len(made), 2, generator=rng) * torch.tensor([height, width])
    down = torch.arange(height)[None] - centre[:, :1].floor() + _CUTOUT // 2
    right = torch.arange(width)[None] - centre[:, 1:].floor() + _CUTOUT // 2
    inside = [(each >= 0) & (each < _CUTOUT) for each in (down, right)]
    return made.masked_fill((inside[0][:, :, None] & inside[1][:, None])[:, None], 0.0)


def _crops(inputs: torch.Tensor, padding: int, rng: torch.Generator) -> torch.Tensor:
    num, _, height, width = inputs.shape
    padded = F.pad(inputs, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, num), generator=rng)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    picked = padded.permute(0, 2, 3, 1)[
        torch.arange(num)[:, None, None], rows[:, :, None], columns[:, None, :]
    ]
    return picked.permute(0, 3, 1, 2)


def _affine(*values: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, values)


def _changed(pixels: Pixels, draws: torch.Tensor) -> Pixels:
    image = Image.fromarray(pixels)
    for which, sign in draws.tolist():
        image = _apply(image, int(which * 14), 1 if sign < 0.5 else -1)
    return np.asarray(image)


def _apply(image: Image.Image, which: int, sign: int) -> Image.Image:
    """Return an image after one of fourteen operations, those of RandAugment's paper, Figure 2."""
    m, side = sign * _MAGNITUDE, image.size[0]
    strength = 1 + 0.9 * m
    shear, move = 0.3 * m, 150 / 331 * side * m
    operations: tuple[Callable[[], Image.Image], ...] = (
        lambda: image,
        lambda: ImageOps.autocontrast(image),
        lambda: ImageOps.equalize(image),
        lambda: image.rotate(30 * m),
        lambda: ImageOps.solarize(image, round(256 * (1 - _MAGNITUDE))),
        lambda: ImageOps.posterize(image, 8 - round(4 * _MAGNITUDE)),
        lambda: ImageEnhance.Color(image).enhance(strength),
        lambda: ImageEnhance.Contrast(image).enhance(strength),
        lambda: ImageEnhance.Brightness(image).enhance(strength),
        lambda: ImageEnhance.Sharpness(image).enhance(strength),
        lambda: _affine(1, shear, 0, 0, 1, 0)(image),
        lambda: _affine(1, 0, 0, shear, 1, 0)(image),
        lambda: _affine(1, 0, move, 0, 1, 0)(image),
        lambda: _affine(1, 0, 0, 0, 1, move)(image),
    )
    return operations[which]()

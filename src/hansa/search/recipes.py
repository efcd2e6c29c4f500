"""Recipes by name: what a model of a table was trained on, at which size, and how.

An accuracy means nothing without its recipe, so rows carry the recipe's name and tables its
digest. ``cifar100-w32`` is the original's (arXiv 2210.07271, section 4); the two others are far
smaller, and nobody should take their accuracies for the original's.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from hansa.data.sources import SourceOptions, load
from hansa.errors import InputError
from hansa.models.build import Architecture, build
from hansa.search.gratings import PAIRS, gratings
from hansa.seeding import derive

Part = tuple[torch.Tensor, torch.Tensor]


class Recipe(BaseModel):
    """How models of a table are trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    source: Literal["digits", "gratings", "path"]
    """Where samples come from; ``path`` is a file or folder of the user's."""
    train: int = Field(ge=1)
    """Training samples."""
    validation: int = Field(ge=1)
    test: int = Field(ge=1)
    width: int
    """Channels of the first stage."""
    side: int
    """Height and width of an input in pixels."""
    channels: int
    classes: int
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    lr: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    annealed: Literal["epoch", "step"]
    """How often the cosine that takes the learning rate to 0 is evaluated."""
    augmentation: Literal["shift", "randaugment"]
    """``shift`` by up to one pixel; or RandAugment, flip, crop and cutout as in the original."""

    @property
    def digest(self) -> str:
        """SHA-256 over all values, 16 hex digits."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one input."""
        return self.channels, self.side, self.side

    def architecture(self, model: int, norm: str = "batch") -> Architecture:
        """Return the description of a model at this recipe's size."""
        options = {"arch": int(model), "width": self.width, "norm": norm}
        return Architecture(name="blox", options=options, shape=self.shape, classes=self.classes)

    def build(self, model: int, seed: int) -> nn.Module:
        """Return a model with initial values drawn from a seed and its number."""
        return build(self.architecture(model), seed=derive(seed, "blox", int(model)))


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="digits16-w8",
            source="digits",
            train=1000,
            validation=397,
            test=400,
            width=8,
            side=16,
            channels=1,
            classes=10,
            epochs=4,
            batch_size=50,
            lr=0.05,
            nesterov=True,
            annealed="step",
            augmentation="shift",
        ),
        Recipe(
            name="gratings16-w8",
            source="gratings",
            train=1024,
            validation=640,
            test=640,
            width=8,
            side=16,
            channels=3,
            classes=len(PAIRS),
            epochs=5,
            batch_size=32,
            lr=0.05,
            nesterov=True,
            annealed="step",
            augmentation="shift",
        ),
        Recipe(
            name="cifar100-w32",
            source="path",
            train=45_000,
            validation=5_000,
            test=10_000,
            width=32,
            side=32,
            channels=3,
            classes=100,
            epochs=200,
            batch_size=256,
            lr=0.01,
            annealed="epoch",
            augmentation="randaugment",
        ),
    )
}


def recipe_of(name: str) -> Recipe:
    """Return a recipe.

    Raises:
        InputError: nobody has written one of this name.
    """
    if name not in RECIPES:
        raise InputError("recipe", repr(name), ", ".join(RECIPES))
    return RECIPES[name]


@dataclass(frozen=True)
class Splits:
    """The samples of a recipe.

    Attributes:
        train: inputs float32 [n, channels, side, side] and labels int64 [n].
        validation: the same; models are chosen by these.
        test: the same; models are reported by these.
    """

    train: Part
    validation: Part
    test: Part


def open_data(recipe: Recipe, path: str | Path | None = None) -> Splits:
    """Return the samples of a recipe.

    Args:
        recipe: which.
        path: of ``cifar100-w32``, a folder with the training and the test images as Parquet files
            whose names hold ``train`` and ``test``, with the columns ``img`` and ``fine_label``.

    Raises:
        InputError: no path where one is needed, one where none is, or other data behind it.
    """
    if recipe.source != "path":
        if path is not None:
            raise InputError("--data", path, f"nothing: {recipe.name} brings its own")
        return _made(recipe)
    if path is None:
        raise InputError("--data", "nothing", f"a folder with the images of {recipe.name}")
    trained, tested = (_read(recipe, Path(path), part) for part in ("train", "test"))
    if len(trained[1]) != recipe.train + recipe.validation or len(tested[1]) != recipe.test:
        found = f"{len(trained[1])} and {len(tested[1])} images"
        allowed = f"{recipe.train + recipe.validation} to train and validate, {recipe.test} to test"
        raise InputError("--data", found, allowed)
    # The original's split: a permutation by NumPy's generator of seed 0.
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(trained[1])))
    cut = recipe.train
    parts = [(trained[0][index], trained[1][index]) for index in (order[:cut], order[cut:])]
    return Splits(parts[0], parts[1], tested)


@cache
def _made(recipe: Recipe) -> Splits:
    sizes = [recipe.train, recipe.validation, recipe.test]
    if recipe.source == "gratings":
        inputs, labels = gratings(sum(sizes), seed=0, side=recipe.side)
    else:
        source = load(SourceOptions(size=(recipe.side, recipe.side)))
        order = np.random.RandomState(0).permutation(len(source.labels))
        inputs = source.read(order)
        labels = torch.from_numpy(source.labels[order])
    return Splits(*zip(inputs.split(sizes), labels.split(sizes), strict=True))


def _read(recipe: Recipe, path: Path, part: str) -> Part:
    options = SourceOptions(source=f"parquet:{path / f'*{part}*.parquet'}")
    source = load(options)
    index = np.arange(len(source.labels))
    inputs = source.read(index)
    if tuple(inputs.shape[1:]) != recipe.shape or len(source.classes) != recipe.classes:
        found = f"images {tuple(inputs.shape[1:])} of {len(source.classes)} classes"
        raise InputError("--data", found, f"{recipe.shape} of {recipe.classes} classes")
    if inputs.dtype == torch.uint8:  # floats are scaled already
        inputs = inputs.float().div_(127.5).sub_(1)
    return inputs, torch.from_numpy(source.labels)

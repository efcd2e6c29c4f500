"""What a table of models holds, as arrays: foreign files become this, and searches replay it."""

from dataclasses import dataclass, field

import numpy as np

from hansa.errors import InputError
from hansa.search.spaces import Floats, Ints, Space

BY_SEED = ("validation", "test", "train_seconds")
BY_MODEL = ("parameters", "multiply_adds")


@dataclass(frozen=True)
class Columns:
    """Models of one space, trained under one recipe, in ascending order of number.

    Attributes:
        space: whose models they are.
        recipe: name of how they were trained.
        models: their numbers, int64 [n].
        seeds: of the trainings, ascending.
        validation: share of correct answers, float64 [n, seeds]; nan where a seed is missing.
        test: the same on test data, of the weights of the best epoch by validation.
        train_seconds: float64 [n, seeds]; nan where unknown.
        parameters: number of parameters, float64 [n]; nan where unknown.
        multiply_adds: of one input, float64 [n]; nan where unknown.
        latency: device -> seconds of one input, float64 [n]; nan where unknown.
        curves: name -> values after every epoch, float64 [n, seeds, epochs]; names such as
            ``validation`` and ``validation_loss``.

    Raises:
        InputError: models that are not in ascending order or not of the space, or arrays of
            other shapes.
    """

    space: Space
    recipe: str
    models: Ints
    seeds: tuple[int, ...]
    validation: Floats
    test: Floats
    train_seconds: Floats
    parameters: Floats
    multiply_adds: Floats
    latency: dict[str, Floats] = field(default_factory=dict)
    curves: dict[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.space.check(self.models)
        if not len(self.models) or (np.diff(self.models) <= 0).any():
            raise InputError("models", f"{len(self.models)}, some twice or none", "ascending order")
        by_model: tuple[int, ...] = (len(self.models),)
        by_seed = (*by_model, len(self.seeds))
        shapes = {name: (getattr(self, name).shape, by_seed) for name in BY_SEED}
        shapes |= {name: (getattr(self, name).shape, by_model) for name in BY_MODEL}
        shapes |= {f"latency.{name}": (each.shape, by_model) for name, each in self.latency.items()}
        shapes |= {f"curves.{n}": (each.shape[:2], by_seed) for n, each in self.curves.items()}
        for name, (found, allowed) in shapes.items():
            if found != allowed:
                raise InputError(name, f"shape {found}", f"shape {allowed}")

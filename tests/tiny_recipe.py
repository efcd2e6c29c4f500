"""A recipe so small that a model trains in a tenth of a second."""

from hansa.search.recipes import RECIPES, Recipe

TINY: Recipe = RECIPES["gratings16-w8"].model_copy(
    update={
        "name": "tiny",
        "train": 48,
        "validation": 24,
        "test": 24,
        "width": 2,
        "side": 8,
        "epochs": 2,
        "batch_size": 24,
    }
)

"""What is known of models before the first is asked for: by blocks, a supernet, or a proxy."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field

from hansa.errors import InputError
from hansa.files import write_atomic
from hansa.models.blox import Blox
from hansa.models.blox_space import CELLS, NUM_MODELS, Cell, id_of_cells
from hansa.search.blockwise import BlockFitting, train_blocks
from hansa.search.proxies import proxy
from hansa.search.rankings import dna, donna, lana
from hansa.search.recipes import Recipe, Splits
from hansa.search.spaces import Floats, Ints
from hansa.search.supernet import SupernetFitting, search_supernet
from hansa.search.teacher import features
from hansa.search.training import train_model
from hansa.search.tuning import scores_of, swap_accuracies
from hansa.tensor_files import read_tensors

BLOCKWISE = ("dna", "donna", "lana")
PRIORS = (*BLOCKWISE, "supernet")
Watch = Callable[[str, int, int], None]
Accuracies = Callable[[Sequence[int]], Floats]

_TEACHER = id_of_cells([CELLS.index(Cell("both_skips", (1, 1)))] * 3)
"""Two ``mbconv`` with both skips in each stage: the largest cell, and quick to train."""


class PriorOptions(BaseModel):
    """How blocks or a supernet are trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: int = Field(_TEACHER, ge=0, lt=NUM_MODELS)
    """The model that blocks are trained to stand in for; it is trained by the recipe."""
    loss: Literal["mse", "nsr"] = "nsr"
    """Which loss of blocks ``dna`` adds up; ``donna`` goes by that of noise to signal."""
    steps: int = Field(80, ge=1)
    """Of each of the 135 blocks, or of the supernet of each kind."""
    lr: float = Field(0.05, gt=0)
    """The first step's learning rate."""
    fitted: int = Field(16, ge=4)
    """How many trained models ``donna`` is fitted on."""
    workers: int = Field(0, ge=0)
    """Processes that train blocks; 0 is none but this one."""


def prior_of(
    name: str,
    recipe: Recipe,
    splits: Splits,
    folder: Path,
    options: PriorOptions,
    seed: int,
    accuracies: Accuracies,
    fitted: Ints,
    watch: Watch,
) -> Floats:
    """Return a number for every model, float64 [91125], larger where better is expected.

    The teacher and the blocks are kept in the folder, so that another call goes on from them.

    Args:
        name: one of ``PRIORS``.
        recipe: by which the teacher is trained.
        splits: its data.
        folder: of the teacher and the blocks.
        options: how blocks or a supernet are trained.
        seed: of all draws.
        accuracies: returns validation accuracies of models, for ``donna``.
        fitted: the models that those are asked of.
        watch: called with what is being done, how much of it is done, and of how much.

    Raises:
        InputError: no such prior; too few models for ``donna``.
    """
    if name not in PRIORS:
        raise InputError("prior", repr(name), ", ".join(PRIORS))
    if name == "supernet":
        size = min(SupernetFitting().batch_size, recipe.train, recipe.validation)
        found = search_supernet(
            splits.train,
            splits.validation,
            recipe.classes,
            recipe.width,
            options=SupernetFitting(steps=options.steps, lr=options.lr, batch_size=size),
            seed=seed,
            watch=lambda done, total: watch("training the supernet", done, total),
        )
        return found.ranking()
    folder.mkdir(exist_ok=True)
    teacher = _teacher(recipe, splits, folder / "teacher.safetensors", options.teacher, seed, watch)
    blocks = train_blocks(
        teacher,
        splits.train[0],
        splits.validation[0],
        folder / "blocks",
        BlockFitting(steps=options.steps, lr=options.lr),
        seed,
        workers=options.workers,
        watch=lambda done, total: watch("training blocks", done, total),
    )
    if name == "dna":
        return dna(blocks.scores[options.loss])
    if name == "donna":
        quality = np.log(blocks.scores["nsr"].clip(1e-9, 1e9))
        return donna(quality, fitted, accuracies(fitted.tolist())).ranking()
    held = features(teacher, splits.validation[0])
    swapped = swap_accuracies(blocks, teacher, held, splits.validation[1])
    return lana(swapped, scores_of(teacher, splits.validation)["accuracy"])


def proxy_scores(
    name: str, recipe: Recipe, splits: Splits, models: Ints, seed: int, watch: Callable[[int], None]
) -> Floats:
    """Return a zero-cost proxy's scores of models at their first weights, -inf for nan.

    Args:
        name: one of ``proxies.PROXIES``.
        recipe: that models are built by.
        splits: its data; two batches of training samples are looked at.
        models: their numbers.
        seed: of weights, and of what a network draws.
        watch: called with how many are done.
    """
    inputs, labels = splits.train
    size = max(recipe.batch_size, 64)
    batches = [(inputs[k : k + size], labels[k : k + size]) for k in (0, size)]
    found = np.empty(len(models))
    for k, model in enumerate(models.tolist()):
        value = proxy(name, recipe.build(model, seed), batches, seed=seed)
        found[k] = -np.inf if np.isnan(value) else value
        watch(k + 1)
    return found


def _teacher(
    recipe: Recipe, splits: Splits, path: Path, model: int, seed: int, watch: Watch
) -> Blox:
    made = recipe.build(model, seed)
    assert isinstance(made, Blox)  # noqa: S101 recipes build no other
    about = {"model": str(model), "seed": str(seed), "recipe": recipe.digest}
    if path.is_file():
        with safetensors.safe_open(path, framework="pt") as file:
            if file.metadata() != about:
                found = f"{path}, of another model, seed or recipe"
                raise InputError("priors.teacher", found, "the one it was begun with, or --out NEW")
        made.load_state_dict(read_tensors(path))
    else:
        watch("training the teacher", 0, 1)
        train_model(made, recipe, splits, seed)
        made.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        write_atomic(path, safetensors.torch.save(made.state_dict(), metadata=about))
        watch("training the teacher", 1, 1)
    return made.eval()

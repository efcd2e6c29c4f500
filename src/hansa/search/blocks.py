"""Trained blocks: candidate stages, their scores, and models put together from them.

The blocks of one teacher lie in a folder:

``blocks.json``
    the options, and digests of the teacher and of the data.
``teacher.safetensors``
    the teacher's weights: stem and head of what is assembled.
``stage-K-cell-C.safetensors``
    a block's best weights; its scores stand in the file's own metadata.

Every file is there whole or not at all.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import nn

from hansa.errors import InputError
from hansa.models.blox import Blox, BloxStage
from hansa.models.blox_space import NUM_CELLS, NUM_STAGES, cells_of, id_of_cells
from hansa.models.images import NORMS
from hansa.models.task import Tensors
from hansa.search.distillation import BLOCK_LOSSES
from hansa.search.spaces import Floats
from hansa.tensor_files import read_tensors
from hansa.untrusted import json_of, read_text

FORMAT, ABOUT, TEACHER = 1, "blocks.json", "teacher.safetensors"
ALL = tuple((stage, cell) for stage in range(NUM_STAGES) for cell in range(NUM_CELLS))
"""Every block: (stage, cell)."""


@dataclass(frozen=True)
class Blocks:
    """The trained blocks of a folder.

    Attributes:
        folder: where they lie.
        about: what they were made of, as JSON values.
        scores: ``mse`` and ``nsr`` on validation data -> float64 [3, 45], smaller is better; nan
            where a block is missing.
    """

    folder: Path
    about: Mapping[str, Any]
    scores: Mapping[str, Floats]

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Blocks that are not there: (stage, cell)."""
        return [each for each in ALL if np.isnan(self.scores[BLOCK_LOSSES[0]][each])]

    def weights(self, stage: int, cell: int) -> Tensors:
        """Return a block's parameters and buffers by name.

        Raises:
            InputError: it is not there.
        """
        path = path_of(self.folder, stage, cell)
        try:
            return read_tensors(path)
        except (OSError, ValueError) as error:
            raise InputError(str(path), "no block", "a trained block") from error

    def stage(self, stage: int, cell: int) -> BloxStage:
        """Return a block as a module in evaluation mode.

        Raises:
            InputError: it is not there.
        """
        shape = self.about["shape"]
        module = BloxStage(cell, shape["width"] * 2**stage, NORMS[shape["norm"]])
        module.load_state_dict(dict(self.weights(stage, cell)))
        return module.eval()


def read_blocks(folder: Path) -> Blocks:
    """Return the blocks of a folder, as many as are there.

    Raises:
        InputError: it is no folder of blocks, or a file in it is broken.
    """
    try:
        about = json_of(read_text(folder / ABOUT))
        if about["format"] != FORMAT:
            raise InputError(f"{folder / ABOUT}: format", about["format"], str(FORMAT))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(folder), "no blocks", "a folder of trained blocks") from error
    scores = {name: np.full((NUM_STAGES, NUM_CELLS), np.nan) for name in BLOCK_LOSSES}
    for stage, cell in ALL:
        path = path_of(folder, stage, cell)
        if not path.is_file():
            continue
        try:
            with safe_open(path, "pt") as file:
                own = json.loads(file.metadata()["block"])["scores"]
            for name in BLOCK_LOSSES:
                scores[name][stage, cell] = own[name]
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(str(path), "a broken file", "a block, or no file") from error
    return Blocks(folder, about, scores)


def assemble(blocks: Blocks, model: int | Iterable[int]) -> Blox:
    """Return a model whose stages are blocks and whose stem and head are the teacher's.

    Args:
        blocks: trained blocks.
        model: its number, or its three cells.

    Raises:
        InputError: a block is missing, or no such model.
    """
    shape, side = blocks.about["shape"], 2**NUM_STAGES
    number = id_of_cells(list(model)) if isinstance(model, Iterable) else int(model)
    network = Blox(
        (shape["channels"], side, side),
        shape["classes"],
        number,
        shape["width"],
        shape["norm"],
    )
    try:
        held = read_tensors(blocks.folder / TEACHER)
    except (OSError, ValueError) as error:
        raise InputError(str(blocks.folder / TEACHER), "no teacher", "its weights") from error
    for part in ("stem", "head"):
        own = {name: value for name, value in held.items() if name.startswith(f"{part}.")}
        module: nn.Module = getattr(network, part)
        module.load_state_dict({name[len(part) + 1 :]: value for name, value in own.items()})
    for stage, cell in enumerate(cells_of(network.number)):
        network.stages[stage].load_state_dict(dict(blocks.weights(stage, cell)))
    return network.eval()


def path_of(folder: Path, stage: int, cell: int) -> Path:
    """Return the file of a block."""
    return folder / f"stage-{stage}-cell-{cell:02d}.safetensors"

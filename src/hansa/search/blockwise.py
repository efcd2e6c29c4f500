"""Blockwise training (Blox, arXiv 2210.07271, section 5; DNA, arXiv 1911.13053).

Each of the 3 x 45 candidate stages is trained alone: it reads what the teacher's stage reads and
is to return what the teacher's stage returns. So 135 small trainings say something about all
91,125 models. No block depends on another, so that what a kill costs is the blocks that were
being trained.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from pydantic import Field
from torch import nn

from hansa.bundle import digest
from hansa.errors import InputError
from hansa.files import write_atomic
from hansa.models.blox import Blox, BloxStage
from hansa.models.images import NORMS
from hansa.processes import one_thread, pool
from hansa.search.blocks import ABOUT, ALL, FORMAT, TEACHER, Blocks, path_of, read_blocks
from hansa.search.distillation import BLOCK_LOSSES, block_loss, channel_error
from hansa.search.fitting import Fitting, fit
from hansa.search.teacher import Features, features, reduction_of, shape_of
from hansa.seeding import global_stream

Watch = Callable[[int, int], None]
_BATCH = 256


class BlockFitting(Fitting):
    """How blocks are trained.

    Attributes:
        loss: what they descend and what their best weights are chosen by, see ``block_loss``.
        inherit: whether a block's reduction, which every candidate has, starts as the teacher's;
            else it is drawn like the cell.
        clip: see ``Fitting``; a new block may be far from its teacher, and SGD would diverge.
    """

    loss: Literal["mse", "nsr"] = "nsr"
    inherit: bool = True
    clip: float | None = Field(1.0, gt=0)


def train_blocks(
    teacher: Blox,
    train: torch.Tensor,
    validation: torch.Tensor,
    folder: Path,
    options: BlockFitting | None = None,
    seed: int = 0,
    *,
    which: Iterable[tuple[int, int]] = ALL,
    workers: int = 0,
    is_mapped: bool = False,
    watch: Watch | None = None,
) -> Blocks:
    """Train blocks against a teacher, each on its own, and keep them in a folder.

    Blocks that are there already are kept; the others come out as if there had been no
    interruption. All draws belong to (seed, stage, cell), and PyTorch is held to one thread. The
    teacher's features are computed once, so inputs are not augmented; they take
    7.5 * width * side^2 bytes an input (15 kB at width 8 and side 16).

    Args:
        teacher: a trained network, left as it is.
        train: inputs float32 [n, channels, side, side].
        validation: inputs that blocks are scored on and their best weights chosen by.
        folder: where blocks are kept.
        options: how they are trained.
        seed: of all draws.
        which: (stage, cell) of the blocks that are wanted.
        workers: processes; 0 trains in this one.
        is_mapped: whether features lie in files of the folder, for data that do not fit in memory.
        watch: called after every block with how many are done and how many there are in all.

    Raises:
        InputError: a folder of other blocks.
    """
    options = options or BlockFitting()
    wanted = list(dict.fromkeys(which))
    _claim(folder, teacher, train, validation, options, seed)
    missing = set(read_blocks(folder).missing)
    todo = [each for each in wanted if each in missing]
    with one_thread():
        if todo:
            places = [folder / "features" / part if is_mapped else None for part in ("a", "b")]
            trainer = _Trainer(
                features(teacher, train, places[0]),
                features(teacher, validation, places[1]),
                [dict(reduction_of(stage).state_dict()) for stage in teacher.stages],
                NORMS[shape_of(teacher)["norm"]],
                folder,
                options,
                seed,
            )
            for number, _ in enumerate(_run(trainer, todo, workers), len(wanted) - len(todo) + 1):
                if watch:
                    watch(number, len(wanted))
    return read_blocks(folder)


@dataclass(frozen=True)
class _Trainer:
    """All that a block's training needs; what another process is given."""

    train: Features
    validation: Features
    reductions: list[dict[str, torch.Tensor]]
    norm: Callable[[int], nn.Module]
    folder: Path
    options: BlockFitting
    seed: int

    def __call__(self, stage: int, cell: int) -> None:
        """Train a block and write its file."""
        options, seed = self.options, self.seed
        inputs, targets = self.train.maps[stage : stage + 2]
        held_inputs, held_targets = self.validation.maps[stage : stage + 2]
        variance = self.train.variance[stage + 1]
        with global_stream(seed, "block", stage, cell):
            module = BloxStage(cell, inputs.shape[1], self.norm)
        if options.inherit:
            reduction_of(module).load_state_dict(self.reductions[stage])

        def loss_of(chosen: torch.Tensor) -> torch.Tensor:
            error = channel_error(module(inputs[chosen]), targets[chosen])
            return block_loss(options.loss, error, variance)

        def evaluate() -> dict[str, float]:
            error = torch.zeros(held_targets.shape[1], dtype=torch.float64)
            for start in range(0, len(held_inputs), _BATCH):
                part = slice(start, start + _BATCH)
                own = channel_error(module(held_inputs[part]), held_targets[part])
                error += own.double() * len(held_inputs[part]) / len(held_inputs)
            held = self.validation.variance[stage + 1].double()
            return {name: float(block_loss(name, error, held)) for name in BLOCK_LOSSES}

        found = fit(
            module,
            loss_of,
            len(inputs),
            evaluate,
            lambda figures: (-figures[options.loss],),
            options,
            seed,
            "block order",
            stage,
            cell,
        )
        # One entry: the order of several is not the same every time.
        about = {"block": json.dumps({"scores": found.figures, "step": found.step})}
        data = safetensors.torch.save(dict(found.weights), about)
        write_atomic(path_of(self.folder, stage, cell), data)


_trainers: list[_Trainer] = []


def _start(trainer: _Trainer) -> None:
    _trainers.append(trainer)


def _one(stage: int, cell: int) -> None:
    _trainers[-1](stage, cell)


def _run(trainer: _Trainer, todo: list[tuple[int, int]], workers: int) -> Iterator[tuple[int, int]]:
    if not workers:
        for each in todo:
            trainer(*each)
            yield each
        return
    with pool(min(workers, len(todo)), _start, trainer) as processes:
        asked = {processes.submit(_one, *each): each for each in todo}
        for future in as_completed(asked):
            future.result()
            yield asked[future]


def _claim(
    folder: Path,
    teacher: Blox,
    train: torch.Tensor,
    validation: torch.Tensor,
    options: BlockFitting,
    seed: int,
) -> None:
    weights = {name: value.contiguous() for name, value in teacher.state_dict().items()}
    data = safetensors.torch.save(weights)
    about = {
        "format": FORMAT,
        "options": options.model_dump(mode="json"),
        "seed": seed,
        "shape": shape_of(teacher),
        "model": teacher.number,
        "teacher": hashlib.sha256(data).hexdigest(),
        "train": digest({"inputs": train}),
        "validation": digest({"inputs": validation}),
    }
    if (folder / ABOUT).is_file():
        found = read_blocks(folder).about
        other = [key for key in about if found.get(key) != about[key]]
        if other:
            allowed = "the same, or another folder"
            raise InputError(str(folder), f"blocks of another {other[0]}", allowed)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / TEACHER, data)
    write_atomic(folder / ABOUT, json.dumps(about, indent=2))

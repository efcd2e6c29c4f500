"""Spaces of models: a row of slots, each with so many choices, and a number for every model.

A model's number is its choices in mixed radix, the first slot the most significant: in Blox the
number of ``hansa.models.blox_space``, in NAS-Bench-Macro its eight digits read in base three.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hansa.errors import InputError
from hansa.models.blox_space import CELLS, NUM_CELLS, NUM_STAGES, WIRINGS
from hansa.models.blox_space import Ints as Ints

Floats = np.ndarray[Any, np.dtype[np.float64]]
Singles = np.ndarray[Any, np.dtype[np.float32]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

GLOBAL, INPUT = 0, 1
"""The first two nodes of every graph: one that reads all others, and the model's input."""


@dataclass(frozen=True)
class Space:
    """A row of slots, in each of which one of so many choices stands.

    Attributes:
        name: what a table of its models says.
        sizes: number of choices of every slot.
    """

    name: str
    sizes: tuple[int, ...]

    @property
    def num_models(self) -> int:
        """How many models there are; their numbers begin at 0."""
        return math.prod(self.sizes)

    @property
    def num_neighbours(self) -> int:
        """How many models differ from one in exactly one slot."""
        return sum(self.sizes) - len(self.sizes)

    @cached_property
    def weights(self) -> Ints:
        """What one step of each slot adds to a model's number, int64 [slots]."""
        return np.array([math.prod(self.sizes[k + 1 :]) for k in range(len(self.sizes))])

    @cached_property
    def _steps(self) -> tuple[Ints, Ints]:
        """Slot of every neighbour, and by how many choices it is turned on."""
        slots = np.repeat(np.arange(len(self.sizes)), np.array(self.sizes) - 1)
        turns = np.concatenate([np.arange(1, size) for size in self.sizes])
        return slots, turns

    def split(self, models: Iterable[int] | Ints) -> Ints:
        """Return the choices of many models, int64 [n, slots], without a check."""
        numbers = np.asarray(models, dtype=np.int64)
        choices: Ints = numbers[:, None] // self.weights % np.array(self.sizes)
        return choices

    def number(self, choices: Sequence[int]) -> int:
        """Return the number of the model with these choices.

        Raises:
            InputError: not one choice for every slot, or a choice that a slot does not have.
        """
        known = [isinstance(c, int | np.integer) and not isinstance(c, bool) for c in choices]
        fits = len(choices) == len(self.sizes) and all(known)
        if not fits or not all(0 <= c < n for c, n in zip(choices, self.sizes, strict=True)):
            allowed = f"{len(self.sizes)} numbers, each from 0 and below {list(self.sizes)}"
            raise InputError("choices", list(choices), allowed)
        return int(np.array(choices) @ self.weights)

    def check(self, models: Iterable[int] | Ints, key: str = "models") -> Ints:
        """Return the numbers of models as int64 [n].

        Raises:
            InputError: no model of the space has one of them.
        """
        numbers = np.asarray(models, dtype=np.int64)
        strange = (numbers < 0) | (numbers >= self.num_models)
        if strange.any():
            allowed = f"a model of {self.name}, 0 to {self.num_models - 1}"
            raise InputError(key, int(numbers[strange][0]), allowed)
        return numbers

    def neighbours(self, model: int) -> Ints:
        """Return the models that differ from one in exactly one slot, int64 [num_neighbours]."""
        slots, turns = self._steps
        own = model // self.weights % np.array(self.sizes)
        before = own[slots]
        after = (before + turns) % np.array(self.sizes)[slots]
        found: Ints = model + (after - before) * self.weights[slots]
        return found

    def traits(self, models: Iterable[int] | Ints) -> Ints:
        """Return what linear predictors see of each model, int64 [n, traits].

        The choices themselves; in Blox, whose choices have parts, also each cell's wiring, first
        and second operation (3 where there is none).
        """
        choices = self.split(models)
        if self != BLOX:
            return choices
        return np.concatenate([choices, _PARTS[choices].reshape(len(choices), -1)], axis=1)

    def graph(self, models: Iterable[int] | Ints) -> tuple[Singles, Singles]:
        """Return the graphs of models for a predictor.

        Node 0 is global: it reads all nodes and nobody reads it. Node 1 is the model's input.
        A node that a model does not have reads nothing, is read by nobody and has no feature.

        Returns:
            Adjacency, float32 [n, nodes, nodes], 1 where the node of the row reads that of the
            column (no node reads itself), and one-hot features, float32 [n, nodes, features].
            Blox: 12 nodes (global, input, per stage two operations and the reduction, output), 15
            features (operation or reduction by stage, input, output, global). Others: a chain
            of global, input, slots and output; choice by slot, input, output, global.
        """
        choices = self.split(models)
        return _blox_graph(choices) if self == BLOX else self._chain(choices)

    def _chain(self, choices: Ints) -> tuple[Singles, Singles]:
        num, slots = choices.shape
        nodes, total = slots + 3, sum(self.sizes)
        adjacency = np.zeros((nodes, nodes), np.float32)
        for node in range(INPUT + 1, nodes):
            adjacency[node, node - 1] = 1
        adjacency[GLOBAL, INPUT:] = 1
        features = np.zeros((num, nodes, total + 3), np.float32)
        offsets = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        rows = np.arange(num)[:, None]
        features[rows, np.arange(2, 2 + slots)[None], offsets + choices] = 1
        _mark_ends(features, total)
        return np.broadcast_to(adjacency, (num, nodes, nodes)).copy(), features


BLOX = Space("blox", (NUM_CELLS,) * NUM_STAGES)
MACRO = Space("nas-bench-macro", (3,) * 8)

_NONE = 3
"""Stands for a second operation that a cell does not have."""
_PARTS: Ints = np.array(
    [
        (WIRINGS.index(cell.wiring), cell.operations[0], (*cell.operations, _NONE)[1])
        for cell in CELLS
    ]
)


def _mark_ends(features: Singles, first: int) -> None:
    """Set the features of input (``first``), output and global node."""
    features[:, INPUT, first] = features[:, -1, first + 1] = features[:, GLOBAL, first + 2] = 1


def _cell_graphs() -> tuple[Singles, Singles]:
    """Return of every cell who reads whom among (entry, op1, op2, reduction), and the features."""
    entry, first, second, out = range(4)
    reads = np.zeros((NUM_CELLS, 4, 4), np.float32)
    features = np.zeros((NUM_CELLS, 3, 4), np.float32)  # op1, op2, reduction by kind
    for number, cell in enumerate(CELLS):
        reads[number, first, entry] = 1
        features[number, 0, cell.operations[0]] = features[number, 2, 3] = 1
        if cell.wiring == "single":
            reads[number, out, first] = 1
            continue
        features[number, 1, cell.operations[1]] = reads[number, out, second] = 1
        reads[number, second, first] = cell.wiring != "parallel"
        reads[number, second, entry] = cell.wiring in ("inner_skip", "both_skips", "parallel")
        reads[number, out, first] = cell.wiring in ("outer_skip", "both_skips", "parallel")
    return reads, features


_READS, _KINDS = _cell_graphs()


def _blox_graph(choices: Ints) -> tuple[Singles, Singles]:
    num, nodes = len(choices), 3 + 3 * NUM_STAGES
    adjacency = np.zeros((num, nodes, nodes), np.float32)
    features = np.zeros((num, nodes, 4 * NUM_STAGES + 3), np.float32)
    for stage in range(NUM_STAGES):
        entry = INPUT + 3 * stage  # the input, or the reduction of the stage before
        own = slice(entry + 1, entry + 4)
        adjacency[:, own, entry : entry + 4] = _READS[choices[:, stage], 1:]
        features[:, own, 4 * stage : 4 * stage + 4] = _KINDS[choices[:, stage]]
    adjacency[:, -1, -2] = 1
    _mark_ends(features, 4 * NUM_STAGES)
    adjacency[:, GLOBAL, INPUT:] = features[:, INPUT:].any(-1)
    return adjacency, features

"""The space of Blox (arXiv 2210.07271, section 3): 45 cells, 91,125 models, by arithmetic alone.

A cell holds one or two operations. The first reads the cell's input x, the second reads
``prev * op1(x) + inp * x``, and the cell returns ``op2(.) + sc * op1(x)``. Raw vectors write a
cell as ``[[op1], [op2, prev, inp, sc]]``; many of them mean the same cell, and some none. Here
every cell has one number (0 to 44) and every model one (0 to 91,124), so two vectors mean the
same model exactly where their numbers are equal.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hansa.errors import InputError

OPERATIONS = ("conv", "mbconv", "bconv")
WIRINGS = ("single", "sequential", "inner_skip", "outer_skip", "both_skips", "parallel")
NUM_STAGES = 3

Ints = np.ndarray[Any, np.dtype[np.int64]]
RawVector = Sequence[Sequence[Sequence[int]]]

# (prev, inp, sc) of the wirings with two operations whose order matters.
_BITS = {"sequential": (1, 0, 0), "inner_skip": (1, 1, 0), "outer_skip": (1, 0, 1)}
_BITS |= {"both_skips": (1, 1, 1), "parallel": (0, 1, 1)}
_WIRING_OF = {bits: wiring for wiring, bits in _BITS.items()}


@dataclass(frozen=True)
class Cell:
    """One cell of the space.

    Attributes:
        wiring: one of ``WIRINGS``.
        operations: positions in ``OPERATIONS``, one for ``single`` and else two; those of a
            ``parallel`` cell in ascending order.
    """

    wiring: str
    operations: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.wiring}({', '.join(OPERATIONS[op] for op in self.operations)})"


def _cells() -> tuple[Cell, ...]:
    ops = range(len(OPERATIONS))
    pairs = [(first, second) for first in ops for second in ops]
    return (
        *(Cell("single", (op,)) for op in ops),
        *(Cell(wiring, pair) for wiring in WIRINGS[1:5] for pair in pairs),
        *(Cell("parallel", pair) for pair in pairs if pair[0] <= pair[1]),
    )


CELLS = _cells()
"""All cells; a cell's number is its position."""
NUM_CELLS = len(CELLS)
NUM_MODELS = NUM_CELLS**NUM_STAGES
_NUMBER = {cell: number for number, cell in enumerate(CELLS)}

COUNTS: Ints = np.array([[cell.operations.count(op) for op in range(3)] for cell in CELLS])
"""How often each cell holds each operation, int64 [45, 3]."""


def id_of_cells(cells: Sequence[int]) -> int:
    """Return the number of the model with these cells, the first stage's first.

    Raises:
        InputError: not three numbers from 0 to 44.
    """
    known = [isinstance(each, int | np.integer) and 0 <= each < NUM_CELLS for each in cells]
    if len(known) != NUM_STAGES or not all(known):
        raise InputError("cells", list(cells), f"{NUM_STAGES} numbers from 0 to {NUM_CELLS - 1}")
    first, second, third = (int(each) for each in cells)
    return (first * NUM_CELLS + second) * NUM_CELLS + third


def cells_of(model: int) -> tuple[int, int, int]:
    """Return the numbers of a model's three cells.

    Raises:
        InputError: no model has this number.
    """
    number = check_id(model)
    return number // NUM_CELLS**2, number // NUM_CELLS % NUM_CELLS, number % NUM_CELLS


def check_id(model: Any) -> int:
    """Return a model's number as an int.

    Raises:
        InputError: no model has this number.
    """
    is_number = isinstance(model, int | np.integer) and not isinstance(model, bool)
    if not is_number or not 0 <= model < NUM_MODELS:
        raise InputError("model", repr(model), f"a number from 0 to {NUM_MODELS - 1}")
    return int(model)


def id_of(vector: RawVector) -> int:
    """Return the number of the model that a raw vector means.

    Raises:
        InputError: no vector of the space, or a cell in which no path leads from input to output.
    """
    if not isinstance(vector, list | tuple) or len(vector) != NUM_STAGES:
        raise InputError("arch_vec", vector, "three cells, each [[op1], [op2, prev, inp, sc]]")
    return id_of_cells([_NUMBER[_cell(raw, stage)] for stage, raw in enumerate(vector)])


def _cell(raw: Any, stage: int) -> Cell:
    key = f"arch_vec[{stage}]"
    try:
        (op1,), (op2, *bits) = raw
        ops_known = all(type(op) is int and 0 <= op < len(OPERATIONS) for op in (op1, op2))
        is_code = ops_known and len(bits) == 3 and all(b in (0, 1) for b in bits)
    except (TypeError, ValueError):
        is_code = False
    if not is_code:
        allowed = "[[op1], [op2, prev, inp, sc]] with operations 0, 1, 2 and bits 0, 1"
        raise InputError(key, raw, allowed)
    prev, inp, sc = bits
    if not (prev or inp):  # the second operation reads nothing
        if not sc:
            raise InputError(key, f"{raw}, in which nothing reaches the output", "a path to it")
        return Cell("single", (op1,))
    if not (prev or sc):  # nobody reads the first
        return Cell("single", (op2,))
    wiring = _WIRING_OF[prev, inp, sc]
    ordered = (min(op1, op2), max(op1, op2)) if wiring == "parallel" else (op1, op2)
    return Cell(wiring, ordered)


def vector_of(model: int) -> list[list[list[int]]]:
    """Return one raw vector of a model: operations that are not used are 0.

    Raises:
        InputError: no model has this number.
    """
    made = []
    for number in cells_of(model):
        cell = CELLS[number]
        if cell.wiring == "single":
            made.append([[cell.operations[0]], [0, 0, 0, 1]])
        else:
            first, second = cell.operations
            made.append([[first], [second, *_BITS[cell.wiring]]])
    return made


def describe(model: int) -> str:
    """Return a model's cells in words, such as ``single(conv) | parallel(conv, bconv) | ...``."""
    return " | ".join(str(CELLS[number]) for number in cells_of(model))


def split(models: Iterable[int] | Ints) -> Ints:
    """Return the cells of many models at once, int64 [n, 3], without a check."""
    numbers = np.asarray(models, dtype=np.int64)
    return np.stack(
        [numbers // NUM_CELLS**2, numbers // NUM_CELLS % NUM_CELLS, numbers % NUM_CELLS], -1
    )


def parameters(
    models: Iterable[int] | Ints, width: int = 32, classes: int = 100, channels: int = 3
) -> Ints:
    """Return the number of parameters of each model, int64 [n], in closed form.

    Weights, biases and the two vectors of every BatchNorm count; running statistics do not.

    Args:
        models: numbers of models.
        width: channels of the first stage.
        classes: of the head.
        channels: of an input.
    """
    counts = COUNTS[split(models)]
    total = np.full(len(counts), 9 * channels * width + 3 * width + 8 * width * classes + classes)
    for stage in range(NUM_STAGES):
        c = width * 2**stage
        each = np.array([36 * c**2 + 12 * c, 56 * c**2 + 26 * c, 14 * c**2 + 235 * c])
        total = total + 62 * c**2 + 18 * c + counts[:, stage] @ each
    return total


def multiply_adds(
    models: Iterable[int] | Ints,
    width: int = 32,
    side: int = 32,
    classes: int = 100,
    channels: int = 3,
) -> Ints:
    """Return the multiply-adds of convolutions and linear layers for one input, int64 [n].

    The released tables count those of BatchNorm, ReLU and biases as well, by a tool whose answer
    depends on its version; this is Hansa's own definition.

    Args:
        models: numbers of models.
        width: channels of the first stage.
        side: height and width of an input in pixels, a multiple of 8.
        classes: of the head.
        channels: of an input.
    """
    counts = COUNTS[split(models)]
    total = np.full(len(counts), 9 * channels * width * side**2 + 8 * width * classes)
    for stage in range(NUM_STAGES):
        c, area = width * 2**stage, (side // 2**stage) ** 2
        each = np.array(
            [36 * c**2 * area, 40 * c**2 * area + 16 * c**2, (14 * c**2 + 175 * c) * area]
        )
        total = total + 31 * c**2 * area // 2 + counts[:, stage] @ each
    return total

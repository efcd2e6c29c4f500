"""Gradients of single samples, as rows of numbers by block of the model, in pieces.

A block is one trainable tensor (of LoRA, one matrix A or B). Its gradient may be sketched to fewer
numbers: every entry is added, with a random sign, to one random place (count sketch, Charikar et
al. 2002; as features, Weinberger et al., ICML 2009). Inner products are kept in expectation.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from hansa.curation.sequences import Pair, spans
from hansa.federation.message import Tensors
from hansa.models.task import Task
from hansa.seeding import generator

ENTRIES = 1 << 24
"""Entries of gradients that are held at once, by default."""


@dataclass(frozen=True)
class Sketch:
    """A random projection of every block to at most ``size`` numbers, the same for all samples.

    Attributes:
        size: numbers of a block; None leaves gradients as they are.
        seed: what places and signs are drawn from.
    """

    size: int | None = None
    seed: int = 0

    def __call__(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows [n, entries] of one block as [n, numbers]."""
        entries = rows.shape[1]
        if self.size is None or entries <= self.size:
            return rows
        rng = generator(self.seed, name, "sketch")
        places = torch.randint(self.size, (entries,), generator=rng)
        signs = 2.0 * torch.randint(2, (entries,), generator=rng) - 1
        return rows.new_zeros(len(rows), self.size).index_add_(1, places, rows * signs)


def gradients(
    task: Task,
    params: Tensors,
    buffers: Tensors,
    samples: Pair,
    sketch: Sketch | None = None,
    entries: int = ENTRIES,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield pieces, in order: name of a block -> gradients of some samples' losses [m, numbers].

    The loss of a sample is the mean over its own tokens, so gradients do not depend on which
    samples are taken at once.

    Args:
        task: a causal model.
        params: name -> parameter; those that have no part in the loss have a gradient of 0.
        buffers: name -> buffer.
        samples: inputs and labels [n, T].
        sketch: how gradients are projected; by default not at all.
        entries: most entries of gradients at once; at least one sample's.
    """
    inputs, labels = samples
    sketch = sketch or Sketch()
    starts, lengths = spans(labels)
    ends = starts + lengths

    def loss(leaves: Tensors, row: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        after = {name: b.clone() for name, b in buffers.items()}
        return task.loss(leaves, after, (row[None], wanted[None]), training=False)[0]

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    at = {name: p.detach() for name, p in params.items()}
    size = max(1, entries // max(1, sum(p.numel() for p in at.values())))
    for first in range(0, len(labels), size):
        rows = slice(first, first + size)
        width = int(ends[rows].max())
        with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for fused attention
            found = each(at, inputs[rows, :width], labels[rows, :width])
        yield {name: sketch(name, g.detach().flatten(1)) for name, g in found.items()}


def mean_gradient(pieces: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean over all samples: name of a block -> [numbers], float64."""
    sums: dict[str, torch.Tensor] = {}
    num = 0
    for piece in pieces:
        num += len(next(iter(piece.values())))
        for name, rows in piece.items():
            sums[name] = sums.get(name, 0) + rows.double().sum(0)
    return {name: total / num for name, total in sums.items()}


class GradientStore:
    """Gradients on disk, read again piece by piece, so that memory does not grow with the data.

    Args:
        folder: where they lie: one file of float32 [n, numbers of all blocks], and its layout.
    """

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "layout.json").read_text())
        self._sizes: dict[str, int] = about["blocks"]
        self.num = int(about["num"])
        width = sum(self._sizes.values())
        self._rows = np.memmap(folder / "rows.bin", np.float32, "r", shape=(self.num, width))

    @classmethod
    def write(cls, folder: Path, pieces: Iterator[dict[str, torch.Tensor]]) -> "GradientStore":
        """Write pieces as they come, and return the store; none may be empty."""
        sizes: dict[str, int] = {}
        num = 0
        with (folder / "rows.bin").open("wb") as file:
            for piece in pieces:
                sizes = {name: rows.shape[1] for name, rows in piece.items()}
                joined = torch.cat([piece[name].float() for name in sizes], 1)
                file.write(joined.contiguous().numpy().tobytes())
                num += len(joined)
        (folder / "layout.json").write_text(json.dumps({"blocks": sizes, "num": num}))
        return cls(folder)

    def pieces(self, entries: int = ENTRIES) -> Iterator[dict[str, torch.Tensor]]:
        """Yield what was written, in order, in pieces of at most so many entries."""
        width = max(1, self._rows.shape[1])
        size = max(1, entries // width)
        for first in range(0, self.num, size):
            rows = torch.from_numpy(np.array(self._rows[first : first + size]))
            blocks = rows.split(list(self._sizes.values()), 1)
            yield dict(zip(self._sizes, blocks, strict=True))


@contextmanager
def stored(pieces: Iterator[dict[str, torch.Tensor]]) -> Iterator[GradientStore]:
    """Hold gradients on disk for as long as they are needed."""
    with TemporaryDirectory(prefix="hansa-gradients-") as folder:
        yield GradientStore.write(Path(folder), pieces)

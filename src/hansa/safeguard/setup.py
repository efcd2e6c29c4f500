"""What a phase of a safeguard works on, and every draw that it makes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hansa.errors import InputError
from hansa.safeguard.losses import Output, run
from hansa.safeguard.rows import Data, Part, Preferences, Rows
from hansa.seeding import generator

Metrics = dict[str, float]
Advance = Callable[[int], Metrics]
"""Adds up the gradients of one step, by its number from 0, and tells its losses."""
Collect = Callable[[Any, nn.Module, int], tuple[list[torch.Tensor], Metrics]]


@dataclass(frozen=True, eq=False)
class Setup:
    """A model under training, and what stays the same meanwhile.

    Attributes:
        model: a causal model of ``transformers``, float32; it is changed in place.
        reference: the model before any safeguard, which is only looked at.
        data: what is trained on.
        seed: of the run.
        precision: what matrix products are computed in; weights stay float32.
        rank: number of this process among those that train one model together.
        ranks: how many they are. Each takes its own rows of the same batches, so that their mean
            gradient is that of one process.
        purpose: what tells this phase's draws from those of others.
        collect: asks clients for the gradients of a phase's attacks, at a model and in a step;
            None where there are no clients.
    """

    model: nn.Module
    reference: nn.Module
    data: Data
    seed: int = 0
    precision: torch.dtype = torch.float32
    rank: int = 0
    ranks: int = 1
    purpose: tuple[str | int, ...] = ()
    collect: Collect | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def params(self) -> list[nn.Parameter]:
        """Parameters that are trained, tied ones once."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def rng(self, *purpose: str | int) -> torch.Generator:
        """Return the generator of one purpose, the same on every rank."""
        return generator(self.seed, "safeguard", *self.purpose, *purpose)

    def rows(self, part: Part, size: int, *purpose: str | int) -> Rows:
        """Return this rank's rows of a batch of ``size``."""
        drawn = self.data.source(part).draw(size, self.rng(part, *purpose))
        return drawn[self._mine(size)].to(self.device)

    def pairs(self, part: Part, size: int, *purpose: str | int) -> Preferences:
        """Return this rank's pairs of answers of a batch of ``size``."""
        drawn = self.data.preferences(part).draw(size, self.rng(part, "pairs", *purpose))
        mine = self._mine(size)
        return Preferences(drawn.chosen[mine].to(self.device), drawn.rejected[mine].to(self.device))

    def run(self, rows: Rows, hidden: bool = False) -> Output:
        """Return what the model makes of rows."""
        with self._mixed():
            return run(self.model, rows, hidden)

    @torch.no_grad()
    def refer(self, rows: Rows, hidden: bool = False) -> Output:
        """Return what the reference makes of rows."""
        with self._mixed():
            return run(self.reference, rows, hidden)

    @contextmanager
    def _mixed(self) -> Iterator[None]:
        mixed = self.precision is not torch.float32
        with torch.autocast(self.device.type, self.precision, enabled=mixed):
            yield

    def _mine(self, size: int) -> slice:
        if size % self.ranks:
            found = f"{size} rows for {self.ranks} processes"
            raise InputError("phases.batch_size", found, "a multiple of the processes")
        return slice(self.rank, size, self.ranks)

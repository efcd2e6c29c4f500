"""What is kept of one model on one device, and whether it is worth keeping."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hansa.search.profile.rounds import rank_correlation

KEY = ("model", "device", "backend", "batch", "threads", "dtype")
"""The columns by which a row is known: there is one for each such combination."""

_RANKED = 8  # fewer ranks say nothing: two near-equal models among three give 0.5


@dataclass(frozen=True)
class Latency:
    """Seconds of one run of one model; one run is one batch.

    Attributes:
        model: the model's number.
        device: name of the machine.
        backend: what ran it.
        batch: inputs in a run.
        threads: threads of the backend.
        dtype: of weights and inputs.
        runs: timed runs.
        wall_min, wall_median, wall_p90: of the wall's clock.
        cpu_min, cpu_median, cpu_p90: of the processor's work for this process.
        cpu_first, cpu_second: least processor time in each of two interleaved repeats.
        joules: energy of one run, None where the machine tells none.
        anchor: number of the model that is measured in every window.
        anchor_cpu_min: its least processor time in this window.
        drift: relative change of that since the first window.
        usable: whether window and repeats held what the options ask.
        load: mean number of running processes over the last minute, -1 where not known.
        torch: PyTorch's version.
        backend_version: the backend's.
        processor: the processor as it calls itself.
    """

    model: int
    device: str
    backend: str
    batch: int
    threads: int
    dtype: str
    runs: int
    wall_min: float
    wall_median: float
    wall_p90: float
    cpu_min: float
    cpu_median: float
    cpu_p90: float
    cpu_first: float
    cpu_second: float
    joules: float | None
    anchor: int
    anchor_cpu_min: float
    drift: float
    usable: bool
    load: float
    torch: str
    backend_version: str
    processor: str

    @property
    def key(self) -> tuple[int | str, ...]:
        """The values of ``KEY``."""
        return tuple(getattr(self, name) for name in KEY)

    def row(self) -> dict[str, Any]:
        """Return name -> value, for a table."""
        return asdict(self)

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Latency":
        """Return what a row of a table says."""
        return cls(**row)


def agreement(rows: Sequence[Latency]) -> float | None:
    """Return Spearman's correlation of two repeats of the least processor time.

    None for fewer than eight models.
    """
    if len(rows) < _RANKED:
        return None
    return rank_correlation([r.cpu_first for r in rows], [r.cpu_second for r in rows])


def difference(rows: Sequence[Latency]) -> float:
    """Return the median over models of how far their two repeats lie apart, relative to less."""
    apart = [abs(r.cpu_first - r.cpu_second) / min(r.cpu_first, r.cpu_second) for r in rows]
    return float(np.median(apart))

"""Windows: some models and the anchor, measured together, and judged."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from hansa.errors import InputError
from hansa.search.profile.backends import BACKENDS, backend_version
from hansa.search.profile.energy import Meter
from hansa.search.profile.latency import Latency, agreement, difference
from hansa.search.profile.options import ProfileOptions
from hansa.search.profile.rounds import Clock, Runner, Times, take_turns


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    Attributes:
        number: the model's.
        make: makes the module.
    """

    number: int
    make: Callable[[], nn.Module]


@dataclass(frozen=True)
class Bench:
    """What measures windows.

    Attributes:
        options: how.
        anchor: the model that takes part in each window.
        clock: what tells the time.
        meter: of energy, None without.
        processor: the processor as it calls itself.
    """

    options: ProfileOptions
    anchor: Candidate
    clock: Clock
    meter: Meter | None
    processor: str

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes, each once."""
        return tuple(dict.fromkeys(self.options.batches))

    def key(self, model: Candidate, batch: int) -> tuple[int | str, ...]:
        """Return the key under which a model's latency is kept."""
        o = self.options
        return (model.number, o.device_name, o.backend, batch, o.threads, o.dtype)

    def measure(
        self, window: Sequence[Candidate], inputs: torch.Tensor, earlier: Sequence[Latency]
    ) -> list[Latency]:
        """Return a window's rows, measured again while they do not count.

        Args:
            window: the models.
            inputs: one batch.
            earlier: rows of the same device, backend and batch.

        Raises:
            InputError: they never count, and the options do not force them.
        """
        make = BACKENDS[self.options.backend]
        everyone = [*window, self.anchor]
        runners = [make(each.make(), inputs, self.options.threads) for each in everyone]
        same = [row for row in earlier if row.anchor == self.anchor.number and row.usable]
        reference = same[0].anchor_cpu_min if same else None
        for attempt in range(self.options.retries + 1):
            purpose = (len(inputs), window[0].number, len(earlier), attempt)
            o = self.options
            times = take_turns(runners, o.rounds, o.warmup, self.clock, o.seed, *purpose)
            rows = self._rows(window, times, len(inputs), reference)
            fault = self._fault(rows, same)
            if fault is None:
                break
        else:
            if not self.options.force:
                allowed = "a quieter machine, or --force to keep it marked as unusable"
                raise InputError("profile", fault, allowed)
        return self._with_energy(
            [replace(row, usable=fault is None) for row in rows], runners[: len(window)]
        )

    def _rows(
        self, window: Sequence[Candidate], times: Times, batch: int, reference: float | None
    ) -> list[Latency]:
        o, repeats = self.options, times.repeats()
        wall, cpu = (np.quantile(each, [0, 0.5, 0.9], axis=0) for each in (times.wall, times.cpu))
        anchor = float(cpu[0, -1])
        return [
            Latency(
                model=each.number,
                device=o.device_name,
                backend=o.backend,
                batch=batch,
                threads=o.threads,
                dtype=o.dtype,
                runs=o.rounds,
                wall_min=float(wall[0, k]),
                wall_median=float(wall[1, k]),
                wall_p90=float(wall[2, k]),
                cpu_min=float(cpu[0, k]),
                cpu_median=float(cpu[1, k]),
                cpu_p90=float(cpu[2, k]),
                cpu_first=float(repeats[0, k]),
                cpu_second=float(repeats[1, k]),
                joules=None,
                anchor=self.anchor.number,
                anchor_cpu_min=anchor,
                drift=anchor / reference - 1 if reference else 0.0,
                usable=False,
                load=os.getloadavg()[0] if hasattr(os, "getloadavg") else -1.0,
                torch=str(torch.__version__),
                backend_version=backend_version(o.backend),
                processor=self.processor,
            )
            for k, each in enumerate(window)
        ]

    def _fault(self, rows: Sequence[Latency], earlier: Sequence[Latency]) -> str | None:
        """Return why a window does not count, None where it does."""
        drift = rows[0].drift
        if abs(drift) > self.options.max_drift:
            most = self.options.max_drift
            return (
                f"model {self.anchor.number} {drift:+.0%} since the first window, over {most:.0%}"
            )
        agreed = agreement(rows)
        if agreed is None:  # a small window is judged together with what was measured before
            agreed = agreement([*earlier, *rows])
        if agreed is None:
            apart = difference(rows)
            if apart > self.options.max_drift:
                return f"repeats {apart:.0%} apart, over {self.options.max_drift:.0%}"
        elif not agreed >= self.options.min_agreement:
            least = self.options.min_agreement
            return f"repeats with a rank correlation of {agreed:.2f}, under {least}"
        return None

    def _with_energy(self, rows: list[Latency], runners: Sequence[Runner]) -> list[Latency]:
        meter = self.meter
        if meter is None:
            return rows
        return [
            replace(row, joules=meter.joules_per_run(run, self.clock.wall))
            for row, run in zip(rows, runners, strict=True)
        ]

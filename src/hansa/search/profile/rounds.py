"""Runs of several models in random turns, and what is kept of their times."""

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import ConstantInputWarning, spearmanr

from hansa.search.spaces import Floats
from hansa.seeding import numpy_generator

Runner = Callable[[], object]
"""Runs one model once on inputs it holds."""


@dataclass(frozen=True)
class Clock:
    """Two clocks, both in seconds: of the wall, and of the processor's work for this process."""

    wall: Callable[[], float] = field(default=time.perf_counter)
    cpu: Callable[[], float] = field(default=time.process_time)


@dataclass(frozen=True)
class Times:
    """Times of every run of some models.

    Attributes:
        wall: seconds, float64 [rounds, models].
        cpu: seconds of processor time, float64 [rounds, models].
    """

    wall: Floats
    cpu: Floats

    def repeats(self) -> Floats:
        """Return the least processor time in even and in odd rounds, [2, models]."""
        return np.stack([self.cpu[0::2].min(0), self.cpu[1::2].min(0)])


def take_turns(
    runners: Sequence[Runner],
    rounds: int,
    warmup: int,
    clock: Clock,
    seed: int,
    *purpose: str | int,
) -> Times:
    """Run each model once a round, in an order that is drawn anew for each round.

    So what slows the machine for a while slows all of them. Python's garbage is collected before
    and not within.

    Args:
        runners: one per model.
        rounds: runs of each that are timed.
        warmup: runs of each before.
        clock: the clocks.
        seed: of the orders.
        *purpose: what the orders are for.
    """
    wall, cpu = np.zeros((2, rounds, len(runners)))
    rng = numpy_generator(seed, "turns", *purpose)
    for run in runners:
        for _ in range(warmup):
            run()
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for model in rng.permutation(len(runners)):
                run = runners[model]
                wall_before, cpu_before = clock.wall(), clock.cpu()
                run()
                cpu_after, wall_after = clock.cpu(), clock.wall()
                wall[number, model] = wall_after - wall_before
                cpu[number, model] = cpu_after - cpu_before
    finally:
        if collects:
            gc.enable()
    return Times(wall, cpu)


def rank_correlation(first: Sequence[float] | Floats, second: Sequence[float] | Floats) -> float:
    """Return Spearman's correlation, ties at their mean rank; nan where all values are equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(spearmanr(first, second).statistic)

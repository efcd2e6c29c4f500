"""Latency of models on this machine, measured so that it can be trusted or is refused.

Models take turns in random order, in windows of at most 50; an anchor takes part in each window.
A window counts where the anchor is as fast as in the first one and two interleaved repeats rank
its models alike. The least processor time is what repeats on a machine with other work; the wall's
clock is kept beside it.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from hansa.processes import processor, threads
from hansa.search.profile.energy import Meter
from hansa.search.profile.latency import KEY, Latency, agreement, difference
from hansa.search.profile.options import ProfileOptions, default_device
from hansa.search.profile.rounds import Clock, rank_correlation
from hansa.search.profile.windows import Bench, Candidate
from hansa.seeding import generator

__all__ = [
    "KEY",
    "Clock",
    "Latency",
    "Meter",
    "ProfileOptions",
    "agreement",
    "default_device",
    "difference",
    "profile",
    "rank_correlation",
]


def profile(
    models: Iterable[tuple[int, Callable[[], nn.Module]]],
    shape: Sequence[int],
    options: ProfileOptions | None = None,
    done: Iterable[Latency] = (),
    keep: Callable[[list[Latency]], None] | None = None,
    watch: Callable[[int, int], None] | None = None,
    clock: Clock | None = None,
    meter: Meter | None = None,
) -> list[Latency]:
    """Measure models and return their latencies in the order of batch sizes, then of models.

    An interrupted profile is resumed by ``done``: what stands there under the same key is not
    measured again, and its windows and the new ones share an anchor.

    Args:
        models: (number, what makes the module); the first is the anchor.
        shape: of one input, without the batch.
        options: how to measure.
        done: latencies that are there already.
        keep: called with the rows of every window that is finished.
        watch: called with how many latencies are there, and of how many.
        clock: what tells the time.
        meter: of energy, such as ``Meter.open()``; without it ``joules`` is None.

    Raises:
        InputError: a window that drifts or does not repeat after all retries, unless forced; a
            backend that is not there.
    """
    options = options or ProfileOptions()
    listed = [Candidate(number, make) for number, make in models]
    if not listed:
        return []
    bench = Bench(options, listed[0], clock or Clock(), meter, processor().split(":")[-1].strip())
    found = {row.key: row for row in done if row.usable or options.force}
    keys = {
        batch: {each.number: bench.key(each, batch) for each in listed} for batch in bench.batches
    }
    total = sum(len(each) for each in keys.values())

    def tell() -> None:
        if watch is not None:
            watch(sum(key in found for each in keys.values() for key in each.values()), total)

    tell()
    for batch, by_number in keys.items():
        inputs = torch.randn(
            (batch, *shape), generator=generator(options.seed, "profile", batch)
        ).to(getattr(torch, options.dtype))
        missing = [each for each in listed if by_number[each.number] not in found]
        for first in range(0, len(missing), options.window):
            window = missing[first : first + options.window]
            earlier = [found[key] for key in by_number.values() if key in found]
            with threads(options.threads):
                rows = bench.measure(window, inputs, earlier)
            found.update((row.key, row) for row in rows)
            if keep is not None:
                keep(rows)
            tell()
    return [found[key] for each in keys.values() for key in each.values()]

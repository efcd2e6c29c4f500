"""Seconds and memory of a round against the clients asked and the clients registered.

Clients of the digits model (8x8 images, one hidden layer of 64) train one epoch over 50 samples by
FedPer, whose clients keep their own heads, on disk. Every point is a process of its own.

    python benchmarks/scaling.py [--quick] [--plot FILE.svg] [--json]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from hansa.data.clients import Client

COHORTS = (10, 30, 100, 300, 1000)
REGISTERED = (100, 1000, 10_000, 100_000)
SAMPLES, BATCH, WARM_UP, ROUNDS = 50, 10, 2, 6


def made(registered: int) -> "tuple[torch.nn.Module, dict[str, Client]]":
    """Return the digits model and so many clients, who share made-up images."""
    from hansa.data.clients import Client
    from hansa.models import Architecture, build
    from hansa.seeding import generator

    stream = generator(0, "benchmark")
    pool = torch.randn(5000, 1, 8, 8, generator=stream)
    labels = (pool.flatten(1) @ torch.randn(64, 10, generator=stream)).argmax(1)
    clients = {}
    for k in range(registered):
        rows = (np.arange(SAMPLES) + k * 7) % len(pool)
        clients[f"c{k:06}"] = Client(
            pool, labels, {"train": rows, "validation": rows[:0], "test": rows[:1]}
        )
    architecture = Architecture(name="mlp", shape=(1, 8, 8), classes=10, options={"hidden": [64]})
    return build(architecture, 0), clients


def one(registered: int, cohort: int) -> None:
    """Print the figures of one point as JSON."""
    from hansa import Federation, Participation, Training
    from hansa.federation.methods import FedPer
    from hansa.federation.store import DiskStore

    start = time.perf_counter()
    federation = Federation(
        *made(registered),
        FedPer(),
        Training(lr=0.05, batch_size=BATCH),
        participation=Participation(fraction=cohort / registered),
    )
    with tempfile.TemporaryDirectory() as folder:
        federation.keep_states_in(DiskStore(Path(folder), cache_bytes=1 << 26))
        seconds, states = [], []
        for result in federation.rounds(10**6, score_every=0):
            seconds.append(result.seconds)
            states.append(len(result.visits))
            if result.number == WARM_UP + ROUNDS:
                break
        row = {
            "registered": registered,
            "cohort": cohort,
            "seconds": median(seconds[WARM_UP:]),
            "start": time.perf_counter() - start - sum(seconds),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "engine": result.engine,
        }
    print("RESULT " + json.dumps(row), flush=True)
    os._exit(0)  # the generator of rounds is left unfinished


def measure(registered: int, cohort: int) -> dict[str, Any]:
    """Return the figures of one point, from a process of its own."""
    command = [sys.executable, __file__, "--one", str(registered), str(cohort)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line[7:])
    return found


def plot(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw seconds and memory over both sizes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "hansa"
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col")
    for column, (name, rows) in enumerate(curves.items()):
        sizes = [row[name] for row in rows]
        for line, (key, label) in enumerate([("seconds", "seconds a round"), ("peak_mb", "MB")]):
            axis = axes[line][column]
            axis.plot(sizes, [row[key] for row in rows], marker="o", color="#0b6e6e")
            axis.set(xscale="log", ylabel=label)
            axis.set_yscale("log" if (key, name) == ("seconds", "cohort") else "linear")
            if axis.get_yscale() == "linear":
                axis.set_ylim(bottom=0)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.3)
        axes[1][column].set_xlabel(f"clients {'asked' if name == 'cohort' else 'registered'}")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure both curves and print tables, or with ``--json`` one object."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the smallest and the largest only")
    parser.add_argument("--plot", type=Path, help="write the plot there as SVG")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(*options.one)
    step = 10 if options.quick else 1
    curves = {
        "cohort": [measure(1000, size) for size in (*COHORTS[:1:1], *COHORTS[1:-1][::step], 1000)],
        "registered": [
            measure(size, 100) for size in (*REGISTERED[:1], *REGISTERED[1:-1][::step], 100_000)
        ],
    }
    for name, rows in curves.items():
        print(f"| {name} | seconds a round | peak MB | seconds to set up | engine |")
        print("|---|---|---|---|---|")
        for row in rows:
            print(
                f"| {row[name]} | {row['seconds']:.3f} | {row['peak_mb']:.0f} "
                f"| {row['start']:.1f} | {row['engine']} |"
            )
        print()
    if options.plot:
        plot(curves, options.plot)
    if options.json:
        print(json.dumps(curves))


if __name__ == "__main__":
    main()

"""Accuracy against density of every scorer and control, and what scoring costs.

Accuracy: a model is pruned at its initialisation and trained for a short schedule; its accuracy on
held-out data after the last step is shown, over 3 seeds. Tasks: handwritten digits with a small
convolutional network; with ``--data`` also CIFAR-10, scaled down to 16 pixels, with ResNet-20 and a
narrow VGG-16. All scorers of a seed share weights, batches and schedule. The controls change
ProsPr's one-shot masks: entries shuffled within each layer, other initial weights under the same
masks, the lowest scores kept.

Cost: one scoring of ResNet-20 (32 pixels, batch 128, one thread) against one training step of it,
each in a process of its own; time is CPU time, memory is the peak above what the process held
before. glibc's allocator is told to give large blocks back at once (MALLOC_MMAP_THRESHOLD_), unless
that is set already, so that what a program freed does not count as held.

    python benchmarks/pruning.py [--quick] [--json] [--processes 2] [--only cost|accuracy]
        [--data 'PATH/cifar10-*.parquet'] [--output FOLDER]

Results are kept in FOLDER (by default ``runs/pruning``): the same command goes on where it was
stopped.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hansa.data.federate import DataOptions, federate
from hansa.files import write_atomic
from hansa.models import Architecture, build
from hansa.pruning import SCORERS, attach, find_masks, scores, select
from hansa.seeding import generator

DENSITIES = (0.1, 0.05, 0.02, 0.01)
QUICK = (0.05,)
SEEDS = 3
ROWS: dict[str, dict[str, Any]] = {
    "random": {"scorer": "random"},
    "random, ERK": {"scorer": "random", "scope": "erk"},
    "magnitude": {"scorer": "magnitude"},
    "snip": {"scorer": "snip"},
    "snip, 20 iterations": {"scorer": "snip", "iterations": 20},
    "force, 20 iterations": {"scorer": "force", "iterations": 20},
    "grasp": {"scorer": "grasp"},
    "synflow, 100 iterations": {"scorer": "synflow", "iterations": 100},
    "prospr, first order": {"scorer": "prospr", "options": {"order": "first"}},
    "prospr": {"scorer": "prospr"},
    "prospr, 10 iterations": {"scorer": "prospr", "iterations": 10},
    "prospr, masks shuffled": {"scorer": "prospr", "control": "shuffled"},
    "prospr, other weights": {"scorer": "prospr", "control": "reinitialised"},
    "prospr, lowest kept": {"scorer": "prospr", "control": "inverted"},
}
COST: dict[str, dict[str, Any]] = {
    "snip": {"scorer": "snip"},
    "grasp": {"scorer": "grasp"},
    "synflow": {"scorer": "synflow"},
    **{
        f"prospr {order}, M={steps}": {
            "scorer": "prospr",
            "options": {"order": order, "inner_steps": steps},
        }
        for order in ("first", "exact", "unrolled")
        for steps in (1, 3, 6)
    },
}


@dataclass(frozen=True)
class Task:
    """What is trained, and for how long."""

    source: dict[str, Any]
    model: dict[str, Any]
    steps: int
    batch: int
    lr: float


@dataclass(frozen=True)
class Cell:
    """One training: a task, a row of the table, a density, a seed."""

    task: str
    row: str
    density: float
    seed: int

    def __str__(self) -> str:
        return f"{self.task}.{self.row}.{self.density:g}.{self.seed}".replace(" ", "-")


def tasks(data: str | None, quick: bool) -> dict[str, Task]:
    """Return the tasks by name."""
    few = 4 if quick else 1
    digits = {"source": "digits", "validation": 0.0}
    model = {"name": "cnn", "options": {"channels": [16, 32], "hidden": 64}}
    made = {"digits, cnn": Task(digits, model, 400 // few, 64, 0.1)}
    if data is not None:
        cifar = {"source": f"parquet:{data}", "size": [16, 16], "validation": 0.0, "test": 0.05}
        for name, width in (("resnet20", 16), ("vgg16", 8)):
            model = {"name": name, "options": {"norm": "batch", "width": width}}
            made[f"cifar10, {name}"] = Task(cifar, model, 100 // few, 64, 0.05)
    return made


def accuracy(cell: Cell, task: Task) -> float:
    """Prune, train, and return the accuracy on held-out data after the last step."""
    torch.set_num_threads(1)
    data, shape, classes = _samples(json.dumps(task.source))
    architecture = Architecture(**task.model, shape=shape, classes=classes)
    model = build(architecture, cell.seed)
    # Scored on batches that come before those of the training.
    batches = [next(_batches(data["train"], 64, cell.seed, "score", k)) for k in range(8)]
    if cell.row != "dense":
        masks = find(model, batches, cell)
        if ROWS[cell.row].get("control") == "reinitialised":
            model = build(architecture, cell.seed + 1000)
        attach(model, masks)
    train(model, data["train"], task, cell.seed)
    model.eval()
    with torch.no_grad():
        parts = zip(*(part.split(1024) for part in data["test"]), strict=True)
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
    return correct / len(data["test"][1])


def find(model: nn.Module, batches: list[Any], cell: Cell) -> dict[str, torch.Tensor]:
    """Return the masks of a row."""
    row = ROWS[cell.row]
    scorer = SCORERS[row["scorer"]].model_validate(row.get("options", {}))
    if row.get("control") == "inverted":
        found = scores(model, batches, scorer=scorer, seed=cell.seed)
        return select({name: -tensor for name, tensor in found.items()}, cell.density)
    masks = find_masks(
        model,
        batches,
        cell.density,
        scorer,
        iterations=row.get("iterations", 1),
        scope=row.get("scope", "global"),
        seed=cell.seed,
    ).masks
    if row.get("control") == "shuffled":
        for name, mask in masks.items():
            order = torch.randperm(mask.numel(), generator=generator(cell.seed, "shuffle", name))
            masks[name] = mask.flatten()[order].reshape(mask.shape)
    return masks


def train(model: nn.Module, data: Any, task: Task, seed: int) -> None:
    """SGD with momentum 0.9 and weight decay 5e-4; the rate falls linearly to zero."""
    optimizer = torch.optim.SGD(model.parameters(), task.lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / task.steps)
    model.train()
    epochs = (_batches(data, task.batch, seed, "train", epoch) for epoch in itertools.count())
    for inputs, labels in itertools.islice(itertools.chain.from_iterable(epochs), task.steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        schedule.step()


_HELD: dict[str, Any] = {}


def _samples(source: str) -> Any:
    """Return a task's data, read once in each process: splits, the inputs' shape, the classes."""
    if source not in _HELD:
        data = federate(DataOptions.model_validate({**json.loads(source), "clients": 1}), 0)
        (client,) = data.clients.values()
        splits = {split: client.batch(split) for split in ("train", "test")}
        _HELD[source] = (splits, data.shape, len(data.classes))
    return _HELD[source]


def _batches(data: Any, size: int, seed: int, *purpose: str | int) -> Iterator[Any]:
    inputs, labels = data
    order = torch.randperm(len(labels), generator=generator(seed, *purpose))
    for chosen in order.split(size):
        if len(chosen) == size:
            yield inputs[chosen], labels[chosen]


def cost(name: str, batch: int) -> dict[str, float]:
    """Return CPU seconds and peak bytes of one scoring, or of one training step."""
    torch.set_num_threads(1)
    # Before anything large was allocated, the peak that counts is that of the scoring.
    architecture = Architecture(
        name="resnet20", options={"norm": "batch"}, shape=(3, 32, 32), classes=10
    )
    model = build(architecture)
    rng = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(batch, 3, 32, 32, generator=rng), torch.randint(10, (batch,), generator=rng))
        for _ in range(7)
    ]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batches[0][0]), batches[0][1])
        loss.backward()
        optimizer.step()

    work: Callable[[], object] = step
    if name != "step":
        row = COST[name]
        scorer = SCORERS[row["scorer"]].model_validate(row.get("options", {}))

        def work() -> object:
            return scores(model, batches, scorer=scorer)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds = []
    for _ in range(2):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return {"seconds": statistics.median(seconds), "bytes": 1024 * peak}


def keep(cell: Cell, task: Task, folder: Path) -> None:
    """Measure a cell and write what it gave, unless that is there already."""
    path = folder / f"{cell}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(accuracy(cell, task)))


def measure_accuracy(
    known: dict[str, Task],
    folder: Path,
    seeds: int,
    densities: tuple[float, ...],
    processes: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Train every cell and print a table per task.

    Returns:
        Task -> row -> density -> mean accuracy in per cent, and ``DENSITY std``.
    """
    cells = [
        Cell(task, row, density, seed)
        for task in known
        for seed in range(seeds)
        for row in ("dense", *ROWS)
        for density in (densities if row != "dense" else (1.0,))
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        jobs = [pool.submit(keep, cell, known[cell.task], folder) for cell in cells]
        for number, job in enumerate(jobs, 1):
            job.result()
            if sys.stderr.isatty():
                print(f"\r  {number}/{len(jobs)}", end="", file=sys.stderr, flush=True)
    result: dict[str, dict[str, dict[str, float]]] = {}
    for task in known:
        rows: dict[str, dict[str, float]] = {}
        for row in ("dense", *ROWS):
            for density in densities if row != "dense" else (1.0,):
                values = [
                    100 * json.loads((folder / f"{Cell(task, row, density, s)}.json").read_text())
                    for s in range(seeds)
                ]
                about = rows.setdefault(row, {})
                about[f"{density:g}"] = statistics.mean(values)
                about[f"{density:g} std"] = statistics.pstdev(values)
        result[task] = rows
        dense = rows["dense"]["1"]
        print(f"\n{task}: {seeds} seeds, {known[task].steps} steps; dense {dense:.1f} %\n")
        print("| scorer |" + "".join(f" {100 * d:g} % kept |" for d in densities))
        print("|---|" + "---|" * len(densities))
        for row in ROWS:
            line = " | ".join(
                f"{rows[row][f'{d:g}']:.1f} ± {rows[row][f'{d:g} std']:.1f}" for d in densities
            )
            print(f"| {row} | {line} |")
    return result


def measure_cost(batch: int) -> dict[str, Any]:
    """Measure every scorer and print a table."""
    context = multiprocessing.get_context("spawn")
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")

    def alone(name: str) -> dict[str, float]:
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(cost, name, batch).result()

    step = alone("step")
    found = {name: alone(name) for name in COST}
    print(f"\nResNet-20, batch {batch} of 32 pixels, one thread: multiples of one training step")
    print(f"({step['seconds']:.3f} s of CPU time, {step['bytes'] / 1e6:.0f} MB)\n")
    print("| scorer | time | peak memory |\n|---|---|---|")
    for name, figures in found.items():
        times, memory = (figures[key] / step[key] for key in ("seconds", "bytes"))
        print(f"| {name} | {times:.1f} | {memory:.2f} |")
    exact = {steps: found[f"prospr exact, M={steps}"] for steps in (1, 3, 6)}
    return {
        "exact_memory_m6_over_m1": exact[6]["bytes"] / exact[1]["bytes"],
        "exact_over_unroll_memory_m6": exact[6]["bytes"] / found["prospr unrolled, M=6"]["bytes"],
        "exact_time_in_steps": exact[3]["seconds"] / step["seconds"],
    }


def main() -> None:
    """Run the benchmark and print its tables, or with ``--json`` also one object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed, a quarter of the steps, one density; small batches for the cost",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--processes", type=int, default=2, help="trainings at the same time")
    parser.add_argument("--only", choices=("cost", "accuracy"), help="one of the two parts")
    parser.add_argument("--data", help="pattern of CIFAR-10's Parquet files")
    parser.add_argument("--output", default="runs/pruning", help="folder of the results")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    if options.only != "accuracy":
        result["cost"] = measure_cost(32 if options.quick else 128)
    if options.only != "cost":
        folder = Path(options.output + ("-quick" if options.quick else ""))
        known = tasks(options.data, options.quick)
        seeds = 1 if options.quick else SEEDS
        densities = QUICK if options.quick else DENSITIES
        result["accuracy"] = measure_accuracy(known, folder, seeds, densities, options.processes)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

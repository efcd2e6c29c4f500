"""Accuracy of FedAvg under every robust rule, by attack and by share of attackers, over 3 seeds.

20 clients hold handwritten digits, with ``--data`` those of CIFAR-10, dealt by a Dirichlet
distribution. Shown is the accuracy of the common model after the last round on the test data of the
honest clients, mean and standard deviation over seeds, which draw the clients' data, the initial
weights, the batches and the attackers. Every rule that must be told how many attackers there may
be is told 30 %, whatever the truth.

    python benchmarks/robustness.py [--quick] [--json] [--processes 2]
        [--data 'PATH/cifar10-*.parquet'] [--output FOLDER]

Results are kept in FOLDER (by default ``runs/robustness``): the same command goes on where it was
stopped.
"""

import argparse
import hashlib
import json
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hansa.data.federate import DataOptions, FederatedData, federate
from hansa.federation.attackers import Attackers
from hansa.federation.engines.plan import EngineOptions
from hansa.federation.federation import Federation
from hansa.federation.methods import FedAvg
from hansa.federation.optimizer import Training
from hansa.federation.robust import Robust
from hansa.files import write_atomic
from hansa.models import Architecture, build

CLIENTS, SEEDS = 20, 3
ASSUMED = 0.3
"""Share of attackers that rules are told."""
SHARES = (0.1, 0.2, 0.3)
RULES: dict[str, dict[str, Any] | None] = {
    "mean": None,
    "median": {"rule": "median"},
    "trimmed_mean": {"rule": "trimmed_mean", "attackers": ASSUMED},
    "krum": {"rule": "krum", "attackers": ASSUMED},
    "multi_krum": {"rule": "multi_krum", "attackers": ASSUMED},
    "geometric_median": {"rule": "geometric_median"},
    "norm_bound": {"rule": "norm_bound", "bound": "median"},
}
ATTACKS: dict[str, dict[str, Any]] = {
    "sign_flip": {"kind": "sign_flip", "scale": 5.0},
    "noise": {"kind": "noise", "scale": 10.0},
    "label_flip": {"kind": "label_flip"},
    "little": {"kind": "little", "scale": 1.5},
    "inner_product": {"kind": "inner_product", "scale": 0.5},
}


@dataclass(frozen=True)
class Task:
    """Data, model and schedule."""

    source: str
    model: dict[str, Any]
    rounds: int
    lr: float
    batch: int

    def options(self) -> DataOptions:
        """Return where the data come from and how they are dealt."""
        dealt = {"kind": "dirichlet", "alpha": 1.0, "min_samples": 20}
        return DataOptions.model_validate(
            {**json.loads(self.source), "clients": CLIENTS, "test": 0.3, "partition": dealt}
        )


@dataclass(frozen=True)
class Cell:
    """One training."""

    rule: str
    attack: str
    share: float
    seed: int

    def __str__(self) -> str:
        return f"{self.rule}-{self.attack}-{100 * self.share:.0f}-{self.seed}"


def task(data: str | None, quick: bool) -> Task:
    """Return what is trained."""
    if data is None:
        model = {"name": "mlp", "options": {"hidden": [32]}}
        return Task("{}", model, 5 if quick else 15, 0.3, 32)
    source = {"source": f"parquet:{data}", "size": [16, 16], "train_per_class": 400}
    source["test_per_class"] = 100
    model = {"name": "cnn", "options": {"channels": [16, 32], "hidden": 64}}
    return Task(json.dumps(source), model, 5 if quick else 40, 0.05, 16)


def cells(quick: bool) -> list[Cell]:
    """Return all trainings; without attackers one serves every attack."""
    shares = (SHARES[-1],) if quick else SHARES
    return [
        Cell(rule, attack, share, seed)
        for seed in range(1 if quick else SEEDS)
        for rule in RULES
        for attack in ("none", *ATTACKS)
        for share in (shares if attack != "none" else (0.0,))
    ]


@cache
def dealt(work: str, seed: int) -> FederatedData:
    """Return a seed's clients, dealt once in each process."""
    return federate(Task(**json.loads(work)).options(), seed)


def accuracy(cell: Cell, work: Task) -> float:
    """Train a cell and return the mean test accuracy over honest clients."""
    torch.set_num_threads(1)
    data = dealt(json.dumps(asdict(work)), cell.seed)
    architecture = Architecture(**work.model, shape=data.shape, classes=len(data.classes))
    rule, attack = RULES[cell.rule], ATTACKS.get(cell.attack)
    federation = Federation(
        build(architecture, cell.seed),
        data.clients,
        FedAvg(),
        Training(lr=work.lr, batch_size=work.batch),
        seed=cell.seed,
        engine=EngineOptions(kind="stacked", stack=CLIENTS, workers=1),
        compare_up_to=0,
        robust=Robust.model_validate(rule) if rule else None,
        attackers=Attackers.model_validate({**attack, "share": cell.share}) if attack else None,
    )
    metrics = federation.run(work.rounds, score_every=0).summary()["metrics"]
    return float(metrics["accuracy"]["mean"])


def keep(cell: Cell, work: Task, folder: Path) -> None:
    """Measure a cell and write what it gave, unless that is there already."""
    path = folder / f"{cell}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(accuracy(cell, work)))


def gathered(folder: Path, todo: list[Cell]) -> dict[str, dict[str, dict[str, float]]]:
    """Return rule -> attack -> share in per cent -> mean accuracy in per cent, and ``.. std``."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for cell in todo:
        value = 100 * json.loads((folder / f"{cell}.json").read_text())
        row = found.setdefault(cell.rule, {}).setdefault(cell.attack, {})
        row.setdefault(f"{100 * cell.share:.0f}", []).append(value)
    return {
        rule: {
            attack: {
                **{share: statistics.mean(values) for share, values in row.items()},
                **{f"{share} std": statistics.pstdev(values) for share, values in row.items()},
            }
            for attack, row in rows.items()
        }
        for rule, rows in found.items()
    }


def show(result: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print one table of what happens without attackers, and one per attack."""
    for attack in result["mean"]:
        shares = [key for key in result["mean"][attack] if not key.endswith("std")]
        print(f"\n{attack}\n\n| rule |" + "".join(f" {share} % attack |" for share in shares))
        print("|---|" + "---|" * len(shares))
        for rule, rows in result.items():
            row = rows[attack]
            print(
                f"| {rule} | "
                + " | ".join(f"{row[s]:.1f} ± {row[f'{s} std']:.1f}" for s in shares)
                + " |"
            )


def main() -> None:
    """Run the benchmark and print its tables, or with ``--json`` also one object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, 30 % attackers, 5 rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--processes", type=int, default=2, help="trainings at the same time")
    parser.add_argument("--data", help="pattern of CIFAR-10's Parquet files")
    parser.add_argument("--output", default="runs/robustness", help="folder of the results")
    options = parser.parse_args()
    name = "cifar10" if options.data else "digits"
    work, todo = task(options.data, options.quick), cells(options.quick)
    # What was kept of other settings must not be taken for these.
    settings = json.dumps([asdict(work), RULES, ATTACKS, CLIENTS], sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
    folder = Path(options.output) / f"{name}-{digest}"
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(keep, cell, work, folder) for cell in todo]
        for number, job in enumerate(jobs, 1):
            job.result()
            if sys.stderr.isatty():
                print(f"\r  {number}/{len(jobs)}", end="", file=sys.stderr, flush=True)
    result = gathered(folder, todo)
    print(f"{name}: {CLIENTS} clients, {work.rounds} rounds, {1 if options.quick else SEEDS} seeds")
    show(result)
    if options.json:
        print(json.dumps({"accuracy": result}))


if __name__ == "__main__":
    main()

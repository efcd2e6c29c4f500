"""Test accuracy of every method on skewed clients, the cheap baselines included.

Digits over 10 clients with 2 or 4 classes each and 5 training images per class; with ``--data``
also CIFAR-10 from Parquet files, 20 training images per class. One learning rate for all methods.
Mean and standard deviation over seeds of the mean over clients, after the last round.

    python benchmarks/methods.py [--quick] [--json] [--data 'PATH/cifar10-*.parquet']
"""

import argparse
import json
import tempfile
from statistics import mean, pstdev
from typing import Any

import hansa
from hansa.demo import config_of
from hansa.federation.methods import METHODS


def tasks(data: str | None) -> dict[str, dict[str, Any]]:
    """Return the configuration of every task, but its method."""
    digits = config_of("local")
    made = {
        f"digits-{classes}": {
            **digits,
            "data": {**digits["data"], "partition": {"kind": "shards", "classes": classes}},
        }
        for classes in (2, 4)
    }
    if data is not None:
        for classes in (2, 4):
            made[f"cifar10-{classes}"] = {
                "name": "cifar10",
                "rounds": 10,
                "data": {
                    "source": f"parquet:{data}",
                    "clients": 10,
                    "train_per_class": 20,
                    "test_per_class": 100,
                    "partition": {"kind": "shards", "classes": classes},
                },
                "model": {"name": "cnn", "options": {"channels": [16, 32], "hidden": 64}},
                "training": {"lr": 0.05, "batch_size": 20, "epochs": 5},
            }
    return made


def main() -> None:
    """Run the comparison and print a table, or with ``--json`` one object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, half the rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--data", help="pattern of CIFAR-10's Parquet files")
    options = parser.parse_args()
    seeds = 1 if options.quick else 3
    result: dict[str, dict[str, dict[str, float]]] = {}
    for task, config in tasks(options.data).items():
        rounds = config["rounds"] // (2 if options.quick else 1)
        print(f"{task}: {seeds} seeds, {rounds} rounds")
        for name in METHODS:
            values, sent = [], []
            for seed in range(seeds):
                with tempfile.TemporaryDirectory() as folder:
                    changes = {"method": {"name": name}, "seed": seed, "rounds": rounds}
                    run = hansa.train({**config, **changes, "score_every": 0, "output": folder})
                summary = run.history.summary()
                values.append(100 * summary["metrics"]["accuracy"]["mean"])
                sent.append((summary["bytes"]["up"] + summary["bytes"]["down"]) / 1e6)
            row = {"mean": mean(values), "std": pstdev(values), "megabytes": mean(sent)}
            result.setdefault(task, {})[name] = row
            print(
                f"  {name:14} {row['mean']:5.1f} +- {row['std']:.1f} %  {row['megabytes']:8.2f} MB",
                flush=True,
            )
    if options.json:
        print(json.dumps({"accuracy": result}))


if __name__ == "__main__":
    main()

"""Test accuracy of every personalised method and its baselines on skewed clients.

Tasks: handwritten digits in shards of 2, 4 and 5 classes per client with small steps, in shards of
2 also with larger ones, and digits seen through different shifts; with ``--data`` CIFAR-10 from
Parquet files in shards of 2 and 4; with ``--handwriting`` characters by their writers.

A task's model, learning rate, batches and rounds are part of it, set by hand and the same for all
methods. FedSelect's rate and limit, the workshop form's rate and Ditto's pull are chosen for each
task by mean validation accuracy over the seeds; test data have no part in that choice. Random mask
and least change take the rate and limit chosen for FedSelect, so that their masks are of equal
size; on digits random mask is also tuned by itself.

    python benchmarks/personalisation.py [--quick] [--json] [--processes 2] [--tasks a,b]
        [--data 'PATH/cifar10-*.parquet'] [--handwriting 'PATH/*.parquet'] [--output FOLDER]

Runs are kept in FOLDER (by default ``runs/personalisation``): the same command goes on where it
was stopped.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

import hansa
from hansa.report.comparison import percent
from hansa.report.sizes import size

PLAIN = (
    "local",
    "fedavg",
    "fedavg-tuned",
    "fedprox",
    "scaffold",
    "fedper",
    "fedrep",
    "lg-fedavg",
    "fedbabu",
    "pfedme",
    "lotteryfl",
    "head-mask",
)
CONTROLS = ("random-mask", "least-change")


EXAMPLES: dict[str, dict[str, Any]] = {
    "local": {},
    "fedavg": {},
    "fedavg-tuned": {},
    "fedselect": {"rate": 0.05, "limit": 0.3},
}
"""Methods with an example ``digits-METHOD.toml``, of the same configuration as here."""


def config_of(method: str) -> dict[str, Any]:
    """Return the configuration of one of them: ten clients with two classes of digits each."""
    return {
        "name": f"digits-{method}",
        "rounds": 20,
        "data": {
            "source": "digits",
            "clients": 10,
            "validation": 0.2,
            "test": 0.5,
            "train_per_class": 5,
            "partition": {"kind": "shards", "classes": 2},
        },
        "model": {"name": "mlp", "options": {"hidden": [64]}},
        "training": {"lr": 0.1, "batch_size": 5, "epochs": 5},
        "method": {"name": method, **EXAMPLES[method]},
    }


def grids(task: str) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Return what is tuned for a task: row of the table -> method and options tried."""
    small = task.startswith("digits")
    rates = (0.05, 0.25) if small else (0.25,)
    shares = [{"rate": rate, "limit": limit} for rate in rates for limit in (0.05, 0.3, 0.8)]
    workshop = {"mode": "workshop", "select_epochs": 5 if small else 1}
    made: dict[str, tuple[str, list[dict[str, Any]]]] = {
        "fedselect": ("fedselect", shares),
        "fedselect-workshop": ("fedselect", [{**workshop, "rate": p} for p in (0.25, 0.5, 0.75)]),
        "ditto": ("ditto", [{"mu": mu} for mu in (0.1, 1.0)]),
    }
    return made | ({"random-mask-tuned": ("random-mask", shares)} if small else {})


def tasks(data: str | None, handwriting: str | None) -> dict[str, dict[str, Any]]:
    """Return the configuration of every task, but its method and seed."""
    small = {"lr": 0.0075, "batch_size": 10, "epochs": 5}
    digits = {**config_of("local"), "training": small}
    made = {f"digits-{s}": _with(digits, {"kind": "shards", "classes": s}) for s in (2, 4)}
    made["digits-5"] = _with(digits, {"kind": "shards", "classes": 5}, rounds=30)
    made["digits-5"]["data"]["train_per_class"] = 2
    larger = config_of("local")["training"]
    made["digits-2-larger-steps"] = {**made["digits-2"], "training": larger}
    shifts = {"kind": "shift", "shifts": ["none", "noise", "rotation"]}
    made["digits-shift"] = _with(digits, shifts)
    made["digits-shift"]["data"]["train_per_class"] = 2
    made["digits-shift"]["training"] = {"lr": 0.1, "batch_size": 10, "epochs": 5}
    if data is not None:
        cifar: dict[str, Any] = {
            "rounds": 10,
            "data": {
                "source": f"parquet:{data}",
                "clients": 10,
                "train_per_class": 20,
                "test_per_class": 100,
            },
            "model": {"name": "cnn", "options": {"channels": [8, 16], "hidden": 32}},
            "training": {"lr": 0.05, "batch_size": 20, "epochs": 5},
        }
        made |= {f"cifar10-{s}": _with(cifar, {"kind": "shards", "classes": s}) for s in (2, 4)}
    if handwriting is not None:
        made["handwriting"] = {
            "rounds": 20,
            "data": {
                "source": f"parquet:{handwriting}",
                "label_column": "character",
                "group_column": "writer_id",
                "channels": 1,
                "clients": 50,
                "partition": {"kind": "group", "min_samples": 20},
            },
            "model": {"name": "cnn", "options": {"channels": [16, 32], "hidden": 64}},
            "training": {"lr": 0.05, "batch_size": 10, "epochs": 2},
        }
    return made


def _with(base: Mapping[str, Any], partition: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**base, "data": {**base["data"], "partition": partition}, **changes}


def measure(
    config: dict[str, Any], seeds: range, processes: int
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Run one task.

    Returns:
        Row -> figures (see ``Comparison.rows``), and row -> the options chosen for it.
    """

    def run(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        grid = {**config, "score_every": 0, "compare_up_to": 0, "methods": tables}
        return hansa.compare(grid, seeds=seeds, processes=processes, watch=_watch).rows

    tables: dict[str, dict[str, Any]] = {label: {} for label in PLAIN}
    labels: dict[str, dict[str, dict[str, Any]]] = {}
    for row, (method, tried) in grids(config["name"]).items():
        labels[row] = {_label(method, options): options for options in tried}
        tables |= {label: {"name": method, **o} for label, o in labels[row].items()}
    found = run(tables)
    rows = {label: found[label] for label in PLAIN}
    chosen = {}
    for row, tables in labels.items():
        best = max(tables, key=lambda label: found[label]["validation"]["mean"])
        rows[row], chosen[row] = found[best], tables[best]
    same = chosen["fedselect"]
    found = run({_label(name, same): {"name": name, **same} for name in CONTROLS})
    rows |= {row["method"]: row for row in found.values()}
    return rows, {row: _text(options) for row, options in chosen.items()}


def _label(method: str, options: Mapping[str, Any]) -> str:
    return ".".join([method, *(str(value) for value in options.values())])


def _text(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {options[key]}" for key in ("rate", "limit", "mu") if key in options)


def _watch(done: int, total: int, run: hansa.Run) -> None:
    if sys.stderr.isatty():
        print(f"\r  {done}/{total} {run.path.name:40}", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Run the comparison and print a table per task, or with ``--json`` also one object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, a quarter of the rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time")
    parser.add_argument("--tasks", help="names of tasks, by default all")
    parser.add_argument("--data", help="pattern of CIFAR-10's Parquet files")
    parser.add_argument("--handwriting", help="pattern of Parquet files with writer_id, character")
    parser.add_argument("--output", default="runs/personalisation", help="folder of the runs")
    options = parser.parse_args()
    known = tasks(options.data, options.handwriting)
    names = options.tasks.split(",") if options.tasks else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--tasks: found {unknown[0]!r}; allowed: {', '.join(known)}")
    seeds = range(1 if options.quick else 3)
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name in names:
        config, folder = known[name], options.output
        if options.quick:
            config["rounds"] //= 4
            folder += "-quick"
        config |= {"name": name, "output": folder}
        rows, chosen = measure(config, seeds, options.processes)
        print(f"\n{name}: {len(seeds)} seeds, {config['rounds']} rounds\n")
        print("| method | accuracy | worst tenth | bytes | chosen |\n|---|---|---|---|---|")
        for label, row in rows.items():
            scores = f"{percent(row['accuracy'])} | {percent(row['worst_tenth'])}"
            print(f"| {label} | {scores} | {size(row['bytes'])} | {chosen.get(label, '')} |")
        result[name] = {
            label: {key: 100 * value for key, value in row["accuracy"].items()}
            for label, row in rows.items()
        }
    if options.json:
        first = result.get("digits-2") or next(iter(result.values()))
        print(json.dumps({"accuracy": first, "tasks": result}))


if __name__ == "__main__":
    main()

"""Accuracy and bytes of sparse federated training against sparsity and mask ratio, on CIFAR-10.

20 clients of equal size and skewed classes (Dirichlet, alpha 1), 10 of them a round, one local
epoch on samples scaled down to 16 pixels; a network of three convolutions with GroupNorm, of which
the second and the third train sparsely; 40 rounds, the rate falling from 0.1 to 0.01. The schedule
is a small part of the paper's (700 rounds, ResNet-18), so only differences between rows mean
anything. Controls: FedAvg dense, FedAvg under a random mask of equal size (fixed before the first
round), and clients that train alone.

    python benchmarks/sparse_accuracy.py --data PATH/cifar10-test.parquet [--quick] [--json]
        [--processes 2] [--output FOLDER]

Runs are kept in FOLDER (by default ``runs/sparse-accuracy``): the same command goes on where it was
stopped.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import hansa
from hansa.report.comparison import percent
from hansa.report.sizes import size

ROUNDS = 40


class Small(nn.Module):
    """Three convolutions with GroupNorm and ReLU, pooling between them, and a linear head."""

    def __init__(self, shape: Sequence[int], classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(1, 16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(2, 32)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.norm3 = nn.GroupNorm(4, 64)
        self.head = nn.Linear(64, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, classes]."""
        maps = F.max_pool2d(F.relu(self.norm1(self.conv1(inputs))), 2)
        maps = F.max_pool2d(F.relu(self.norm2(self.conv2(maps))), 2)
        maps = F.relu(self.norm3(self.conv3(maps)))
        logits: torch.Tensor = self.head(maps.mean((2, 3)))
        return logits


def tables() -> dict[str, dict[str, Any]]:
    """Return the rows: label -> method and options."""
    made: dict[str, dict[str, Any]] = {"local": {}, "fedavg": {}}
    ratios = {
        (0.9, "topk_weights"): (0.0, 0.1),
        (0.95, "topk_weights"): (0.0, 0.1, 0.2),
        (0.95, "diff_topk_weights"): (0.0, 0.1),
        (0.95, "topk_diff"): (0.0, 0.1),
    }
    for sparsity in (0.9, 0.95):
        made[f"swat.{100 * sparsity:g}"] = {"name": "swat", "sparsity": sparsity}
    for (sparsity, uplink), tried in ratios.items():
        for ratio in tried:
            made[f"zerofl.{100 * sparsity:g}.{uplink}.{ratio:g}"] = {
                "name": "zerofl",
                "sparsity": sparsity,
                "uplink": uplink,
                "mask_ratio": ratio,
            }
    zero = {"name": "zerofl", "sparsity": 0.95, "mask_ratio": 0.0}
    made["zerofl.95.topk_weights.0.counts"] = {**zero, "aggregation": "counts"}
    server = {"kind": "fedadam", "lr": 0.01}
    made["swat.95.fedadam"] = {"name": "swat", "sparsity": 0.95, "server": server}
    made["sparsyfed.95"] = {"name": "sparsyfed", "sparsity": 0.95}
    return made


def config(data: str, output: str, quick: bool) -> dict[str, Any]:
    """Return what all runs share."""
    rounds = ROUNDS // 4 if quick else ROUNDS
    return {
        "name": "sparse",
        "output": output + ("-quick" if quick else ""),
        "rounds": rounds,
        "score_every": 0,
        "compare_up_to": 0,
        "data": {
            "source": f"parquet:{data}",
            "size": [16, 16],
            "clients": 20,
            "partition": {"kind": "dirichlet", "alpha": 1.0, "equal": True},
            "validation": 0.1,
            "test": 0.15,
        },
        "model": {"name": "sparse_accuracy:Small"},
        "training": {
            "lr": 0.1,
            "lr_end": 0.01,
            "lr_rounds": rounds,
            "batch_size": 32,
            "epochs": 1,
        },
        "participation": {"fraction": 0.5},
        "engine": {"kind": "sequential"},
    }


def measure(data: str, output: str, quick: bool, processes: int) -> dict[str, dict[str, Any]]:
    """Return row -> ``accuracy`` (mean, std over seeds), bytes a round and client, ``nonzero``."""
    seeds = range(1 if quick else 3)
    shared = config(data, output, quick)
    # The layers that ZeroFL leaves dense stay dense here as well.
    exclude = ["conv1.*", "head.*"]
    random = {"method": "random", "density": 0.05, "scope": "layer", "exclude": exclude}
    control = {"fedavg.random-mask.95": {"name": "fedavg"}}
    grids = [
        {**shared, "methods": tables()},
        {**shared, "name": "sparse-control", "pruning": random, "methods": control},
    ]
    rows: dict[str, dict[str, Any]] = {}
    for grid in grids:
        comparison = hansa.compare(grid, seeds=seeds, processes=processes, watch=_watch)
        for label, found in comparison.rows.items():
            runs = comparison.runs[label].values()
            rows[label] = {"accuracy": found["accuracy"], **_traffic(list(runs))}
    return rows


def _traffic(runs: list[Any]) -> dict[str, float]:
    """Return bytes of a client's reply, as sent and as CSR, and the root's share of non-zeros."""
    up, csr, replies = 0, 0, 0
    nonzero = []
    for run in runs:
        ledger = run.history.table("ledger").to_pylist()
        sent = [row for row in ledger if row["round"] > 0 and row["up"]]
        up += sum(row["up"] for row in sent)
        csr += sum(row["csr"] for row in sent)
        replies += len(sent)
        scores = run.history.table("scores").to_pylist()
        nonzero += [row["sum"] / row["count"] for row in scores if row["metric"] == "nonzero"]
    figures = {"up": up / replies, "csr": csr / replies} if replies else {"up": 0.0, "csr": 0.0}
    return figures | ({"nonzero": statistics.mean(nonzero)} if nonzero else {})


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    print("\n| method | accuracy | reply | as CSR | non-zero |\n|---|---|---|---|---|")
    for label, row in rows.items():
        sent = f"{size(row['up'])} | {size(row['csr'])}" if row["up"] else "none | none"
        share = f"{row['nonzero']:.2f}" if "nonzero" in row else ""
        print(f"| {label} | {percent(row['accuracy'])} | {sent} | {share} |")


def _watch(done: int, total: int, run: hansa.Run) -> None:
    if sys.stderr.isatty():
        print(f"\r  {done}/{total} {run.path.name:48}", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Run all, print a table, and with ``--json`` one object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="pattern of CIFAR-10's Parquet files")
    parser.add_argument("--quick", action="store_true", help="one seed, a quarter of the rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time")
    parser.add_argument("--output", default="runs/sparse-accuracy", help="folder of the runs")
    options = parser.parse_args()
    rows = measure(options.data, options.output, options.quick, options.processes)
    show(rows)
    if options.json:
        print(json.dumps({"accuracy": rows}))


if __name__ == "__main__":
    main()

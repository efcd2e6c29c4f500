"""How much the seeds of Hansa's own table differ, and what goes with accuracy in it.

    python benchmarks/search_seeds.py [--table FILE] [--json]

Rank correlations are Spearman's, of test accuracy after the epoch of the best validation accuracy.
"""

import argparse
import json
from itertools import combinations
from typing import Any

import numpy as np

from hansa.models import blox_space
from hansa.search.profile.rounds import rank_correlation
from hansa.search.spaces import Floats
from hansa.search.table import Table
from hansa.search.tables import SMALL, open_table


def alike(first: Floats, second: Floats) -> float:
    """Return a rank correlation."""
    return round(rank_correlation(first, second), 3)


def between_seeds(table: Table) -> dict[str, Any]:
    """Return how alike seeds rank models, and how far they are apart, in points of accuracy."""
    models = [int(model) for model in table.models]
    counts = [len(table.seeds_of(model)) for model in models]

    def accuracy(num: int) -> Floats:
        """Return models that have so many seeds -> accuracy by seed."""
        chosen = [model for model, count in zip(models, counts, strict=True) if count >= num]
        rows = [[table.test_accuracy(m, seed=seed) for seed in range(num)] for m in chosen]
        return 100 * np.array(rows)

    two, all_ = accuracy(2), accuracy(max(counts))
    better = two[np.argsort(-two.sum(1), kind="stable")[: len(two) // 2]]
    pairs = [alike(all_[:, a], all_[:, b]) for a, b in combinations(range(max(counts)), 2)]
    half = max(counts) // 2
    return {
        "models": len(models),
        "runs": sum(counts),
        "two_seeds": alike(*two.T),
        "two_seeds_better_half": alike(*better.T),
        "most_seeds": {"models": len(all_), "seeds": max(counts)},
        "pairs_of_most": round(float(np.mean(pairs)), 3),
        "halves_of_most": alike(all_[:, :half].mean(1), all_[:, half : 2 * half].mean(1)),
        "std_within": round(float(np.median(all_.std(1, ddof=1))), 1),
        "std_of_means": round(float(all_.mean(1).std(ddof=1)), 1),
    }


def with_accuracy(table: Table) -> dict[str, Any]:
    """Return the range of mean accuracies, and what ranks models like them."""
    models = [int(model) for model in table.models]
    mean = np.array([table.test_accuracy(model) for model in models])
    found = {name: table.column(name) for name in ("parameters", "multiply_adds")}
    found["latency"] = table.latencies(str(table.profiles[0]["device"]), 1)
    operations = blox_space.COUNTS[blox_space.split(models)].sum(1)
    found |= dict(zip(blox_space.OPERATIONS, operations.T.astype(float), strict=True))
    marks = {"least": mean.min(), "median": np.median(mean), "most": mean.max()}
    return {
        "accuracy": {name: round(100 * float(value), 1) for name, value in marks.items()},
        "train_seconds": round(float(np.median([table.train_seconds(m) for m in models])), 1),
        "alike": {name: alike(mean, values) for name, values in found.items()},
    }


def main() -> None:
    """Print what was found as lines, or with ``--json`` as one object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--table", default=SMALL, help="a table's name or file")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    table = open_table(options.table)
    found = {**between_seeds(table), **with_accuracy(table)}
    print(json.dumps(found) if options.json else "\n".join(f"{k}: {v}" for k, v in found.items()))


if __name__ == "__main__":
    main()

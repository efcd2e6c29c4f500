"""Searchers on tables of trained models: what each has found after so many trainings.

A search is replayed on a table: each question is answered by the accuracy of one training of the
model, drawn among its seeds. Two figures, in percent, as mean and standard error over searches:

best    the largest mean test accuracy of what was asked (what that run and many papers show)
chosen  the mean test accuracy of the model with the best answer (what a user would have)

Tables: the one that comes with Hansa, and NAS-Bench-Macro with ``--data``
(github.com/xiusu/NAS-Bench-Macro, data/nas-bench-macro_cifar10.json), without limits and where
models may have at most the median multiply-adds, or parameters, of all. The order by multiply-adds
stands among the searchers. On NAS-Bench-Macro the curve of an independent run of random search,
evolution and local search stands below ours, with the distance in standard errors of the
difference (less the rounding of that run's figures), and below random search what it must have in
expectation. That run's evolution asks for models again, as published; ours does not, unless told
to.

    python benchmarks/search.py --data PATH.json [--quick] [--json] [--searchers random,brp]
        [--limits none,multiply_adds,parameters] [--tables small,data] [--processes 2]
        [--output FOLDER]

Questions a second, and the seconds that it takes to go through the whole space, are told as well.
Finished searches are kept in FOLDER (by default ``runs/search``): the same command goes on where
it was stopped.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import gammaln

from hansa.files import write_atomic
from hansa.models import blox_space
from hansa.search.columns import Columns
from hansa.search.searchers import SEARCHERS, Searcher
from hansa.search.simulate import simulate
from hansa.search.spaces import MACRO, Bools, Floats
from hansa.search.tables import SMALL, open_table

MARKS = (20, 50, 100, 150)
LIMITS = ("none", "multiply_adds", "parameters")
ROWS: dict[str, dict[str, Any]] = {
    "random": {"searcher": "random"},
    "evolution": {"searcher": "evolution", "options": {"population": 20, "tournament": 5}},
    "evolution-repeats": {
        "searcher": "evolution",
        "options": {"population": 20, "tournament": 5, "repeats": True},
    },
    "local": {"searcher": "local"},
    "reinforce": {"searcher": "reinforce"},
    "ridge": {"searcher": "ridge"},
    "brp": {"searcher": "brp"},
    "optuna": {"searcher": "optuna"},
    "by_cost": {"searcher": "by_cost"},
}
RUNS = {"random": 1000, "evolution": 400, "evolution-repeats": 400, "local": 400, "reinforce": 200}
"""Searches of a row where they are cheap; 100 of the others."""
REFERENCE = {
    "random": (92.61, 92.79, 92.88, 92.93),
    "evolution-repeats": (92.60, 92.91, 93.07, 93.10),
    "local": (92.82, 93.03, 93.08, 93.10),
}
"""An independent run of 200 searches each: ``best`` at the marks, rounded to 0.01."""
REFERENCE_RUNS = 200
ROUNDING = 0.005
PART = 20
"""Searches of one piece of work."""


@dataclass(frozen=True)
class Piece:
    """Some searches of one row under one limit; ``start`` seeds them."""

    data: str
    limit: str
    row: str
    start: int
    runs: int

    def __str__(self) -> str:
        return f"{Path(self.data).name}.{self.limit}.{self.row}.{self.start}.{self.runs}"


def searcher_of(row: str) -> Searcher:
    """Return the searcher of a row."""
    about = ROWS[row]
    return SEARCHERS[about["searcher"]].model_validate(about.get("options", {}))


def feasible(columns: Columns, limit: str) -> Bools:
    """Return which models keep a limit: at most the median of all."""
    if limit == "none":
        return np.ones(len(columns.models), bool)
    values = getattr(columns, limit)
    kept: Bools = values <= np.median(values)
    return kept


def work(piece: Piece, folder: Path) -> None:
    """Replay searches and keep their figures, unless they are kept already."""
    path = folder / f"{piece}.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    columns = open_table(piece.data).columns
    found = simulate(
        searcher_of(piece.row),
        columns,
        piece.runs,
        MARKS[-1],
        feasible(columns, piece.limit),
        seed=piece.start,
    )
    at = np.minimum(MARKS, len(columns.models)) - 1
    kept = {"best": found.best[:, at].tolist(), "chosen": found.chosen[:, at].tolist()}
    write_atomic(path, json.dumps({**kept, "optimum": found.optimum}))


def pieces(data: str, rows: Sequence[str], limits: Sequence[str], quick: bool) -> list[Piece]:
    """Return what there is to do, the unlimited searches first."""
    made = []
    for limit in limits:
        for row in rows:
            total = 10 if quick else RUNS.get(row, 100)
            if data == SMALL:
                total = min(total, 100)
            if limit != "none":
                total = min(total, 100)
            part = min(PART, total)
            made += [Piece(data, limit, row, start, part) for start in range(0, total, part)]
    return made


def expected(accuracy: Floats, queries: int) -> float:
    """Return the expected best of so many models drawn at random without replacement.

    The k-th smallest of n is the best of q with probability C(k - 1, q - 1) / C(n, q).
    """
    ranked = np.sort(accuracy)
    rank = np.arange(queries, len(ranked) + 1)
    chance = gammaln(rank) - gammaln(queries) - gammaln(rank - queries + 1)
    total = gammaln(len(ranked) + 1) - gammaln(queries + 1) - gammaln(len(ranked) - queries + 1)
    return float(np.exp(chance - total) @ ranked[queries - 1 :])


def show(
    folder: Path, done: Sequence[Piece], columns: Columns, limit: str, rows: Sequence[str]
) -> dict[str, Any]:
    """Print what was found under one limit; return row -> mark -> chosen accuracy, 0 to 1."""
    incumbent: dict[str, dict[str, float]] = {}
    is_macro = columns.space == MACRO
    lines, optimum = [], 0.0
    for row in rows:
        own = [
            json.loads((folder / f"{piece}.json").read_text())
            for piece in done
            if (piece.limit, piece.row) == (limit, row)
        ]
        optimum = own[0]["optimum"]
        cells = []
        runs = sum(len(each["best"]) for each in own)
        for kind in ("best", "chosen"):
            values = 100 * np.concatenate([np.array(each[kind]) for each in own])
            errors = values.std(0, ddof=1) / np.sqrt(runs)
            cells += [f"{m:.3f} ± {e:.3f}" for m, e in zip(values.mean(0), errors, strict=True)]
            if kind == "best" and is_macro and limit == "none" and row in REFERENCE:
                both = errors * np.sqrt(1 + runs / REFERENCE_RUNS)  # as noisy as ours, by search
                apart = values.mean(0) - np.array(REFERENCE[row])
                beside = np.sign(apart) * (np.abs(apart) - ROUNDING).clip(min=0) / both
            if kind == "chosen":
                means = values.mean(0) / 100
                incumbent[row] = dict(zip(map(str, MARKS), means.tolist(), strict=True))
        lines.append(f"| {row} | {runs} | {' | '.join(cells)} |")
        if row == "random":
            accuracy = np.nanmean(columns.test[feasible(columns, limit)], axis=1)
            most = len(accuracy)
            exact = [f"{100 * expected(accuracy, min(mark, most)):.3f}" for mark in MARKS]
            lines.append(f"| *random, exact expectation* | | {' | '.join(exact)} | | | | |")
        if is_macro and limit == "none" and row in REFERENCE:
            shown = [f"{v:.2f} ({b:+.1f})" for v, b in zip(REFERENCE[row], beside, strict=True)]
            lines.append(
                f"| *{row}, independent run* | {REFERENCE_RUNS} | {' | '.join(shown)} | | | | |"
            )
    told = "" if limit == "none" else f", at most the median {limit.replace('_', '-')}"
    name = f"{columns.recipe}, {len(columns.models):,} models{told}"
    print(f"\n{name}: optimum {100 * optimum:.3f} %\n")
    marks = [f"{kind} at {mark}" for kind in ("best", "chosen") for mark in MARKS]
    print(f"| searcher | searches | {' | '.join(marks)} |")
    print("|---|---|" + "---|" * len(marks))
    print("\n".join(lines))
    return incumbent


def on_table(
    data: str, rows: Sequence[str], limits: Sequence[str], quick: bool, processes: int, folder: Path
) -> dict[str, Any]:
    """Replay all searches on a table; return limit -> row -> mark -> accuracy."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = open_table(data).columns  # what is wrong with it is told before anything else
    todo = pieces(data, rows, limits, quick)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        jobs = [pool.submit(work, piece, folder) for piece in todo]
        for number, job in enumerate(as_completed(jobs), 1):
            job.result()
            if sys.stderr.isatty():
                print(f"\r  {number}/{len(jobs)}", end="", file=sys.stderr, flush=True)
    return {limit: show(folder, todo, columns, limit, rows) for limit in limits}


def speed() -> dict[str, float]:
    """Print and return questions a second by number, and seconds for the whole space."""
    known = open_table()
    asked = np.random.default_rng(0).choice(known.models, 200_000).tolist()
    begun = time.perf_counter()
    for model in asked:
        known.test_accuracy(model)
    questions = len(asked) / (time.perf_counter() - begun)
    begun = time.perf_counter()
    vectors = [blox_space.vector_of(model) for model in range(blox_space.NUM_MODELS)]
    numbers = [blox_space.id_of(vector) for vector in vectors]
    seconds = time.perf_counter() - begun
    if numbers != list(range(blox_space.NUM_MODELS)):
        sys.exit("the space does not come back as it was")
    told = f"{questions:,.0f} questions a second by number; the whole space to vectors and back in "
    print(f"\n{told}{seconds:.1f} s")
    return {"queries_per_second": questions, "space_seconds": seconds}


def chosen(text: str, known: Sequence[str], option: str) -> list[str]:
    """Return the names in a comma-separated list, all known ones where it is empty."""
    names = text.split(",") if text else list(known)
    for name in names:
        if name not in known:
            sys.exit(f"{option}: found {name}; allowed: {', '.join(known)}")
    return names


def main() -> None:
    """Run the benchmark and print its tables, or with ``--json`` also one object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="10 searches of each row")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--data", help="NAS-Bench-Macro's JSON file")
    parser.add_argument("--searchers", default="", help="some rows of the table")
    parser.add_argument("--limits", default="", help="some of none, multiply_adds, parameters")
    parser.add_argument("--tables", default="", help="small (Hansa's own), data, or both")
    parser.add_argument("--processes", type=int, default=2, help="pieces done at the same time")
    parser.add_argument("--output", default="runs/search", help="folder of the results")
    options = parser.parse_args()
    rows = chosen(options.searchers, tuple(ROWS), "--searchers")
    limits = chosen(options.limits, LIMITS, "--limits")
    folder = Path(options.output + ("-quick" if options.quick else ""))
    result: dict[str, Any] = {"incumbent": {}, **speed()}
    tables = {"small": SMALL, "data": options.data}
    wanted = [tables[name] for name in chosen(options.tables, tuple(tables), "--tables")]
    for data in filter(None, wanted):  # the last one's incumbents are told
        found = on_table(data, rows, limits, options.quick, options.processes, folder)
        result["incumbent"] = found.get("none", {})
        result["incumbent_under_limits"] = {k: v for k, v in found.items() if k != "none"}
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

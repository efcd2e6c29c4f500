"""Runs of several methods over the same seeds: spread, paired tests, and one page."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from hansa.report.page import SCORED, lead, masks_of, matrices_of, plot, write_page
from hansa.report.plots import lines, size, strips
from hansa.runs import Run


@dataclass(frozen=True)
class Pair:
    """How two methods differ on the same clients of the same seeds, those that both scored.

    Attributes:
        first: label of one method.
        second: label of the other.
        difference: mean accuracy of the first less that of the second.
        wins: clients on which the first is better.
        losses: clients on which it is worse.
        p: p-value of Wilcoxon's signed-rank test over all clients of all seeds, two-sided, after
            Holm's correction for the number of pairs of methods.
    """

    first: str
    second: str
    difference: float
    wins: int
    losses: int
    p: float


@dataclass(frozen=True)
class Comparison:
    """Finished runs of a grid of methods and seeds.

    Attributes:
        path: the folder of the grid.
        runs: label -> seed -> run; every label has the same seeds.
    """

    path: Path
    runs: Mapping[str, Mapping[int, Run]]

    @cached_property
    def accuracies(self) -> dict[str, dict[int, dict[str, float]]]:
        """Label -> seed -> client -> test accuracy after the last round."""
        return {
            label: {seed: _last(run, "test") for seed, run in runs.items()}
            for label, runs in self.runs.items()
        }

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Label -> figures; means and standard deviations (sample) are over seeds.

        ``accuracy``, ``validation`` and ``worst_tenth`` hold ``mean`` and ``std`` of what a run
        gives over its clients; ``bytes`` is the mean sum of all messages of a run.
        """
        rows: dict[str, dict[str, Any]] = {}
        for label, runs in self.runs.items():
            summaries = [run.history.summary() for run in runs.values()]
            tested = [summary["metrics"]["accuracy"] for summary in summaries]
            validated = [_last(run, "validation") for run in runs.values()]
            rows[label] = {
                "method": _first(runs).config.method.name,
                "accuracy": _spread([row["mean"] for row in tested]),
                "worst_tenth": _spread([row["worst_tenth"] for row in tested]),
                "validation": _spread([mean(v.values()) for v in validated if v]),
                "bytes": mean(s["bytes"]["up"] + s["bytes"]["down"] for s in summaries),
                "seconds": mean(s["seconds"] for s in summaries),
            }
        return rows

    @cached_property
    def pairs(self) -> list[Pair]:
        """The paired tests of every two methods, in the order of the labels."""
        pairs = []
        for first, second in combinations(self.runs, 2):
            a, b = (self.accuracies[label] for label in (first, second))
            differences = np.array(
                [a[s][c] - b[s][c] for s in a for c in sorted(a[s].keys() & b[s].keys())]
            )
            # Equal differences tie, whatever the last bit of a share of test samples.
            differences = differences.round(9)
            p = float(wilcoxon(differences).pvalue) if differences.any() else 1.0
            wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
            difference = float(differences.mean()) if len(differences) else 0.0
            pairs.append(Pair(first, second, difference, wins, losses, p))
        return _holm(pairs)

    def report(self, out: Path | None = None) -> Path:
        """Write one page about all of them and return its path.

        Raises:
            InputError: a page that cannot be written.
        """
        firsts = {label: _first(runs) for label, runs in self.runs.items()}
        seeds = ", ".join(str(seed) for seed in next(iter(self.runs.values())))
        return write_page(
            out or self.path / "report.html",
            title=self.path.resolve().name,
            lead=lead(next(iter(firsts.values())), f"seeds {seeds}"),
            tables=[self._results(), *self._tests()],
            scored=[(label, SCORED[run.config.method.scored]) for label, run in firsts.items()],
            plots=self._plots(),
            configurations=[(label, run.config.as_toml()) for label, run in firsts.items()],
        )

    def _results(self) -> dict[str, Any]:
        rows = [
            [
                label,
                percent(row["accuracy"]),
                percent(row["worst_tenth"]),
                percent(row["validation"]),
                size(row["bytes"]),
                f"{row['seconds']:.1f}",
            ]
            for label, row in self.rows.items()
        ]
        return {
            "title": "Results",
            "columns": ["method", "accuracy", "worst tenth", "validation", "bytes", "seconds"],
            "rows": rows,
            "folded": False,
            "note": "Test accuracy over clients after the last round, mean and standard deviation "
            "over seeds; the worst tenth of the clients likewise. Validation accuracy is what "
            "settings should be chosen by. Bytes of all messages of a run as encoded.",
        }

    def _tests(self) -> list[dict[str, Any]]:
        columns = ["pair", "difference", "better on", "worse on", "p"]
        rows = [
            [
                f"{pair.first} - {pair.second}",
                f"{100 * pair.difference:+.1f} points",
                pair.wins,
                pair.losses,
                f"{pair.p:.3f}" if pair.p >= 0.001 else "< 0.001",
            ]
            for pair in self.pairs
        ]
        reference = next(iter(self.runs))
        first, others = rows[: len(self.runs) - 1], rows[len(self.runs) - 1 :]
        note = (
            "Clients of all seeds, paired. p is of Wilcoxon's signed-rank test, two-sided, after "
            "Holm's correction over all pairs of methods. Clients of one seed share a federation, "
            "so they are not independent and p is optimistic: believe a difference that exceeds "
            "the spread over seeds as well."
        )
        tables = [
            (f"Paired tests against {reference}", first, note, False),
            ("Paired tests of all others", others, "", True),
        ]
        return [
            {"title": title, "columns": columns, "rows": kept, "note": text, "folded": folded}
            for title, kept, text, folded in tables
            if kept
        ]

    def _plots(self) -> list[dict[str, Any]]:
        clients = {
            label: [value for values in seeds.values() for value in values.values()]
            for label, seeds in self.accuracies.items()
        }
        title = "Test accuracy of every client"
        caption = "After the last round, every client of every seed."
        plots = [plot(title, caption, strips(clients, title=title, x="accuracy"))]
        curves = {label: _curve(runs) for label, runs in self.runs.items()}
        if any(len(points) > 1 for points in curves.values()):
            title = "Test accuracy over rounds"
            svg = lines(curves, title=title, x="round", y="accuracy", percent=True)
            plots.append(plot(title, "Mean over clients and seeds.", svg))
        for label, runs in self.runs.items():
            named = f"{label}, seed {next(iter(runs))}"
            plots += [{**made, "folded": True} for made in masks_of(named, _first(runs))]
            plots += matrices_of(named, _first(runs), folded=True)
        return plots


def percent(values: Mapping[str, float] | None) -> str:
    """Return mean and standard deviation of shares as a text in percent."""
    if values is None:
        return "-"
    return f"{100 * values['mean']:.1f} ± {100 * values['std']:.1f} %"


def _first(runs: Mapping[int, Run]) -> Run:
    return next(iter(runs.values()))


def _last(run: Run, split: str) -> dict[str, float]:
    by_round = run.history.scored(split, "accuracy")
    return by_round[max(by_round)] if by_round else {}


def _curve(runs: Mapping[int, Run]) -> list[tuple[float, float]]:
    by_round: dict[int, list[float]] = {}
    for run in runs.values():
        for number, values in run.history.scored("test", "accuracy").items():
            by_round.setdefault(number, []).append(mean(values.values()))
    return [(number, mean(values)) for number, values in sorted(by_round.items())]


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0}


def _holm(pairs: list[Pair]) -> list[Pair]:
    """Return the pairs with Holm's step-down correction of their p-values."""
    corrected, floor = {}, 0.0
    for rank, k in enumerate(sorted(range(len(pairs)), key=lambda k: pairs[k].p)):
        floor = max(floor, min(1.0, pairs[k].p * (len(pairs) - rank)))
        corrected[k] = floor
    return [replace(pair, p=corrected[k]) for k, pair in enumerate(pairs)]

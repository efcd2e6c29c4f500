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

from hansa.report import language
from hansa.report.measure import ACCURACY, Measure, measure_of, scored_by
from hansa.report.page import SCORED, lead, masks_of, matrices_of, write_page
from hansa.report.parts import Part, plot, table
from hansa.report.plots import lines, strips
from hansa.report.sizes import size
from hansa.runs import Run


@dataclass(frozen=True)
class Pair:
    """How two methods differ on the same clients of the same seeds, those that both scored.

    Attributes:
        first: label of one method.
        second: label of the other.
        difference: mean accuracy, or perplexity, of the first less that of the second.
        wins: clients on which the first is better: more accurate, or less perplexed.
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

    @property
    def measure(self) -> Measure:
        """What the methods are compared by."""
        runs = (run for runs in self.runs.values() for run in runs.values())
        return next((measure_of(run.config) for run in runs), ACCURACY)

    @cached_property
    def scores(self) -> dict[str, dict[int, dict[str, float]]]:
        """Label -> seed -> client (or leaf) -> what it is compared by, after the last round."""
        key = self.measure.key
        return self.accuracies if key == ACCURACY.key else self._scores(key)

    @cached_property
    def accuracies(self) -> dict[str, dict[int, dict[str, float]]]:
        """Label -> seed -> client -> test accuracy after the last round."""
        return self._scores(ACCURACY.key)

    def _scores(self, key: str) -> dict[str, dict[int, dict[str, float]]]:
        return {
            label: {seed: _last(run, "test", key) for seed, run in runs.items()}
            for label, runs in self.runs.items()
        }

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Label -> figures; means and standard deviations (sample) are over seeds.

        ``accuracy``, ``validation`` and ``worst_tenth`` hold ``mean`` and ``std`` of what a run
        gives over its clients; ``bytes`` is the mean sum of all messages of a run. Of language
        models ``perplexity`` stands in the place of ``accuracy``, ``worst_tenth`` and
        ``validation`` are perplexities, all over leaves, and there are ``bits_per_byte`` and
        ``perplexity_after_local_steps``.
        """
        key = self.measure.key
        more = () if self.measure is ACCURACY else ("perplexity_after_local_steps", "bits_per_byte")
        rows: dict[str, dict[str, Any]] = {}
        for label, runs in self.runs.items():
            summaries = [run.history.summary() for run in runs.values()]
            tested = [summary["metrics"][key] for summary in summaries]
            validated = [_last(run, "validation", key) for run in runs.values()]
            rows[label] = {
                "method": _first(runs).config.method.name,
                key: _spread([row["mean"] for row in tested]),
                **{
                    name: _spread(
                        [s["metrics"][name]["mean"] for s in summaries if name in s["metrics"]]
                    )
                    for name in more
                },
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
            a, b = (self.scores[label] for label in (first, second))
            differences = np.array(
                [a[s][c] - b[s][c] for s in a for c in sorted(a[s].keys() & b[s].keys())]
            )
            # Equal differences tie, whatever the last bit of a share of test samples.
            differences = differences.round(9)
            p = float(wilcoxon(differences).pvalue) if differences.any() else 1.0
            better = self.measure.sign * differences
            wins, losses = int((better > 0).sum()), int((better < 0).sum())
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
        one = next(iter(firsts.values()))
        is_language = one.config.text is not None
        scored = [(label, SCORED[run.config.method.scored]) for label, run in firsts.items()]
        return write_page(
            out or self.path / "report.html",
            title=self.path.resolve().name,
            lead=(language.lead if is_language else lead)(one, f"seeds {seeds}"),
            tables=[self._results(), *self._tests()],
            scored=[] if is_language else scored,
            plots=self._plots(),
            configurations=[(label, run.config.as_toml()) for label, run in firsts.items()],
        )

    def _results(self) -> Part:
        measure, columns = self.measure, ["method", self.measure.key]
        note = (
            "Test accuracy over clients after the last round, mean and standard deviation "
            "over seeds; the worst tenth of the clients likewise. Validation accuracy is what "
            "settings should be chosen by. Bytes of all messages of a run as encoded."
        )
        more: list[str] = []
        if measure is not ACCURACY:
            more = ["perplexity_after_local_steps", "bits_per_byte"]
            columns += ["after local steps", "bits per byte"]
            note = (
                "Mean over leaves after the last round, each leaf's own model on its own test "
                "text; then mean and standard deviation over seeds; lower is better. The first "
                "perplexity, bits per byte and the worst tenth of the leaves are after the "
                "aggregation. Validation perplexity, after the aggregation too, is what settings "
                "should be chosen by. Bytes of all messages of a run as encoded."
            )
        rows = [
            [
                label,
                *(measure.spread(row[key]) for key in (measure.key, *more)),
                measure.spread(row["worst_tenth"]),
                measure.spread(row["validation"]),
                size(row["bytes"]),
                f"{row['seconds']:.1f}",
            ]
            for label, row in self.rows.items()
        ]
        return table(
            "Results", [*columns, "worst tenth", "validation", "bytes", "seconds"], rows, note
        )

    def _tests(self) -> list[Part]:
        columns = ["pair", "difference", "better on", "worse on", "p"]
        rows = [
            [
                f"{pair.first} - {pair.second}",
                self.measure.difference(pair.difference) + self.measure.points,
                pair.wins,
                pair.losses,
                f"{pair.p:.3f}" if pair.p >= 0.001 else "< 0.001",
            ]
            for pair in self.pairs
        ]
        reference = next(iter(self.runs))
        first, others = rows[: len(self.runs) - 1], rows[len(self.runs) - 1 :]
        over = self.measure.over
        way = "" if self.measure.sign > 0 else "Below 0 the first is better. "
        note = (
            f"{over.capitalize()} of all seeds, paired. {way}p is of Wilcoxon's signed-rank test, "
            f"two-sided, after Holm's correction over all pairs of methods. {over.capitalize()} of "
            "one seed share a federation, so they are not independent and p is optimistic: "
            "believe a difference that exceeds the spread over seeds as well."
        )
        tables = [
            (f"Paired tests against {reference}", first, note, False),
            ("Paired tests of all others", others, "", True),
        ]
        return [
            table(title, columns, kept, text, folded)
            for title, kept, text, folded in tables
            if kept
        ]

    def _plots(self) -> list[Part]:
        measure = self.measure
        is_classes = measure is ACCURACY
        points = {
            label: [value for values in seeds.values() for value in values.values()]
            for label, seeds in self.scores.items()
        }
        title = f"Test {measure.key} of every {measure.one}"
        caption = f"After the last round, every {measure.one} of every seed."
        one = f"a {measure.one} in one seed"
        svg = strips(points, title=title, x=measure.key, one=one, log=not is_classes)
        plots = [plot(title, caption, svg)]
        curves = {label: _curve(runs, measure) for label, runs in self.runs.items()}
        if any(len(curve) > 1 for curve in curves.values()):
            title = f"Test {measure.key} over rounds"
            svg = lines(
                curves,
                title=title,
                x="round",
                y=measure.key,
                percent=is_classes,
                log=not is_classes,
            )
            when = "" if is_classes else ", after the aggregation"
            plots.append(plot(title, f"Mean over {measure.over} and seeds{when}.", svg))
        for label, runs in self.runs.items():
            named = f"{label}, seed {next(iter(runs))}"
            if is_classes:
                plots += [{**made, "folded": True} for made in masks_of(named, _first(runs))]
                plots += matrices_of(named, _first(runs), folded=True)
            else:
                parts = language.reached(_first(runs), f", {named}")
                plots += [{**part, "folded": True} for part in parts]
        return plots


def percent(values: Mapping[str, float] | None) -> str:
    """Return mean and standard deviation of shares as a text in percent."""
    return ACCURACY.spread(values)


def _first(runs: Mapping[int, Run]) -> Run:
    return next(iter(runs.values()))


def _last(run: Run, split: str, key: str) -> dict[str, float]:
    by_round = scored_by(run, split, key)
    return by_round[max(by_round)] if by_round else {}


def _curve(runs: Mapping[int, Run], measure: Measure) -> list[tuple[float, float]]:
    by_round: dict[int, list[float]] = {}
    for run in runs.values():
        for number, values in scored_by(run, "test", measure.key).items():
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

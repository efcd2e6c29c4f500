"""Write the report page of one run, or of several side by side."""

from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from hansa.errors import InputError
from hansa.federation.tree import ROOT
from hansa.files import write_atomic
from hansa.report import language
from hansa.report.effort import private_nodes
from hansa.report.federation import federation
from hansa.report.kept import kept
from hansa.report.lineage import lineage
from hansa.report.matrices import heatmap
from hansa.report.parts import Part, plot, table
from hansa.report.plots import Series, dots, lines
from hansa.report.privacy import spending
from hansa.report.sizes import size
from hansa.runs import Run

SCORED = {
    "received": "the common model, as it is after the round's aggregation",
    "trained": "the client's own model, after its last local training and before aggregation",
    "tuned": "the common model after the round's aggregation, fine-tuned by the client on a copy",
}
MAX_CLIENTS_DRAWN = 40
MASKED = ("personal", "pruned")
"""What methods call masked entries in their figures."""


def report(runs: Sequence[Run], out: Path | None = None) -> Path:
    """Write one self-contained HTML page and return its path.

    Args:
        runs: runs that have at least one whole round.
        out: the page; by default ``report.html`` in the folder of the first run.

    Raises:
        InputError: a run without a whole round, runs of classifiers beside such of language
            models, or a page that cannot be written.
    """
    is_language = runs[0].config.text is not None
    for run in runs:
        if not run.history.num_rounds:
            raise InputError(str(run.path), "a run without a whole round", "at least one round")
        if (run.config.text is not None) != is_language:
            raise InputError(
                str(run.path), "a run of another kind", "only language models, or only classifiers"
            )
    labelled = dict(zip(_labels(runs), runs, strict=True))
    absent, speed = _absences(labelled, is_language), _speed(labelled, is_language)
    first, seed = runs[0], f"seed {runs[0].config.seed}"
    origin = lineage(first.path / "bundle") if len(runs) == 1 else []
    content: dict[str, Any]
    if is_language:
        content = {
            "lead": language.lead(first, f"{_methods(labelled)}, {seed}"),
            "tables": [
                language.results(labelled),
                *spending(labelled),
                *absent,
                *_kept(labelled),
                speed,
                *origin,
            ],
            "scored": [],
            "plots": language.plots(labelled),
        }
    else:
        content = {
            "lead": lead(first, seed),
            "drawing": [federation(first)] if len(runs) == 1 else [],
            "tables": [_results(labelled), *spending(labelled), *absent, speed, *origin],
            "scored": [(k, SCORED[run.config.method.scored]) for k, run in labelled.items()],
            "plots": _plots(labelled),
        }
    return write_page(
        out or runs[0].path / "report.html",
        title=", ".join(labelled) if len(runs) > 1 else runs[0].path.resolve().name,
        **content,
        configurations=[
            (f"{label}, data fingerprint {run.data_fingerprint[:16]}", run.config.as_toml())
            for label, run in labelled.items()
        ],
    )


def write_page(page: Path, **content: Any) -> Path:
    """Fill the page's template and write it.

    Raises:
        InputError: a page that cannot be written.
    """
    if page.is_dir() or not page.name:
        raise InputError("--out", f"{str(page)!r}, a folder", "a file to write")
    text = filled(**content)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(page, text)
    except OSError as error:
        raise InputError(str(page), f"no place to write ({error.strerror})", "a path") from error
    return page


def filled(**content: Any) -> str:
    """Return a page as text, with the template's gaps filled and every value escaped."""
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        files("hansa.report").joinpath("page.html.j2").read_text("utf-8")
    )
    return template.render(**content)


def _kept(runs: dict[str, Run]) -> list[Part]:
    return [part for label, run in runs.items() for part in kept(label, run, len(runs) > 1)]


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return the methods, told apart by folder or by number where they are not all different."""
    methods = [run.config.method.name for run in runs]
    names = [run.path.resolve().name for run in runs]
    for apart in (names, range(1, len(runs) + 1)):
        if len(set(methods)) == len(runs):
            break
        methods = [
            f"{run.config.method.name} ({tail})" for run, tail in zip(runs, apart, strict=True)
        ]
    return methods


def _methods(labels: Iterable[str]) -> str:
    names = list(labels)
    return f"method{'s' if len(names) > 1 else ''} {', '.join(names)}"


def lead(run: Run, more: str) -> str:
    """Return one line about what runs of a page have in common."""
    config, history = run.config, run.history
    return (
        f"{config.data.source}, {run.checkpoint['clients']} clients, "
        f"partition {config.data.partition.kind}, model {config.model.name}, "
        f"{history.num_rounds} rounds, {more}"
    )


def _results(runs: dict[str, Run]) -> Part:
    rows = []
    summaries = {label: run.history.summary() for label, run in runs.items()}
    # Positions cost more in the papers' count than here: so it is larger where uploads are sparse.
    sparse = any(s["bytes"]["csr"] > s["bytes"]["up"] for s in summaries.values())
    for label, summary in summaries.items():
        accuracy, chosen = (summary["metrics"].get(k) for k in ("accuracy", "accuracy_chosen"))
        rows.append(
            [
                label,
                _percent(accuracy, "mean"),
                _percent(accuracy, "std"),
                _percent(accuracy, "worst_tenth"),
                f"{_percent(chosen, 'mean')} (round {chosen['round']})" if chosen else "-",
                size(summary["bytes"]["up"]),
                *([size(summary["bytes"]["csr"])] if sparse else []),
                size(summary["bytes"]["down"]),
                f"{summary['seconds']:.1f}",
            ]
        )
    return {
        "title": "Results",
        "columns": [
            "method",
            "accuracy",
            "std",
            "worst tenth",
            "at chosen round",
            "up",
            *(["up as CSR"] if sparse else []),
            "down",
            "seconds",
        ],
        "rows": rows,
        "folded": False,
        "note": "Test accuracy over clients after the last round: mean, standard deviation, mean "
        "of the worst tenth. The chosen round is the one of highest validation accuracy. Bytes "
        "are those of all messages as encoded, over all rounds."
        + (" As CSR: as papers on sparse training count uploads." if sparse else ""),
    }


def _speed(runs: dict[str, Run], is_language: bool = False) -> Part:
    what = "tokens" if is_language else "samples"
    whose = "nodes" if is_language else "clients"
    rows = []
    for label, run in runs.items():
        speed = run.history.summary()["speed"]
        rates = (speed["rounds_per_minute"], speed["samples_per_second"])
        rows.append([label, *(f"{rate:,.0f}" for rate in rates), speed["engine"]])
    note = (
        f"Over the wall seconds of all rounds, scoring included; {what} are those that {whose} "
        "trained on."
    )
    if is_language and any(map(private_nodes, runs.values())):
        note += " Those of private training are not counted, since it tells nothing of itself."
    return table("Speed", ["method", "rounds/min", f"{what}/s", "engine"], rows, note)


def _absences(runs: dict[str, Run], is_language: bool = False) -> list[Part]:
    fates = {label: run.history.table("ledger")["fate"].to_pylist() for label, run in runs.items()}
    spent = any("spent" in row for row in fates.values())
    excluded = any("excluded" in row for row in fates.values())
    more = {"excluded": excluded, "spent": spent}
    kinds = ["ok", "late", "failed", *(kind for kind, some in more.items() if some)]
    rows = []
    for label, row in fates.items():
        counts = [row.count(kind) for kind in kinds]
        if any(counts[1:]):
            rows.append([label, len(row), *counts])
    whose = "Nodes" if is_language else "Clients"
    title = f"{whose} that were late or failed"
    title += ", or were excluded" if excluded else ""
    title += ", or had spent their budget" if spent else ""
    notes, columns = [], ["method", "asked", "answered", "late", "failed"]
    if excluded:
        names = sorted({name for run in runs.values() for name in run.history.excluded()})
        columns.append("excluded")
        notes.append(f"Excluded, for replies of no use, which were not merged: {', '.join(names)}.")
    if spent:
        columns.append("budget spent")
        notes.append(
            "Budget spent: private training of one more round would have gone beyond its epsilon."
        )
    return [table(title, columns, rows, " ".join(notes))] if rows else []


def _percent(values: dict[str, float] | None, key: str) -> str:
    return "-" if values is None else f"{100 * values[key]:.1f} %"


def _plots(runs: dict[str, Run]) -> list[Part]:
    accuracy, traffic = {}, {}
    last: dict[str, dict[str, float]] = {}
    for label, run in runs.items():
        scored = run.history.scored("test", "accuracy")
        accuracy[label] = [(n, float(np.mean(list(v.values())))) for n, v in scored.items()]
        last[label] = scored[max(scored)] if scored else {}
        by_round = sorted(run.history.bytes().items())
        totals = np.cumsum([up + down for _, (up, down) in by_round])
        traffic[label] = [(n, float(t)) for (n, _), t in zip(by_round, totals, strict=True)]
    plots = [
        plot(
            "Test accuracy over rounds",
            "Mean over all clients, each on its own test data.",
            lines(
                accuracy, title="Test accuracy over rounds", x="round", y="accuracy", percent=True
            ),
        ),
        plot(
            "Bytes over rounds",
            "Messages up and down together, summed from the first round on.",
            lines(traffic, title="Bytes over rounds", x="round", y="bytes so far", bytes_=True),
        ),
    ]
    plots += densities_of(runs)
    for label, run in runs.items():
        plots += masks_of(label, run)
    if any(last.values()) and max(map(len, last.values())) <= MAX_CLIENTS_DRAWN:
        plots.append(
            plot(
                "Test accuracy of every client",
                "After the last scored round.",
                dots(last, title="Test accuracy of every client", x="accuracy", y=""),
            )
        )
    for label, run in runs.items():
        plots += matrices_of(label, run, folded=len(runs) > 1)
    return plots


def densities_of(runs: dict[str, Run]) -> list[Part]:
    """Return a plot of how dense the common models are that sparse training aggregates."""
    every = {label: _shares(run, "", ROOT).get("nonzero", []) for label, run in runs.items()}
    shares = {label: series for label, series in every.items() if series}
    if not shares:
        return []
    title = "Weights that are not zero"
    caption = "Of the common model's layers that are trained sparsely, after each round's merging."
    return [plot(title, caption, lines(shares, title=title, x="round", y="share", percent=True))]


def masks_of(label: str, run: Run) -> list[Part]:
    """Return plots of the masks of a run over its rounds, where its method has any."""
    plots = []
    for kind in MASKED:
        shares = _shares(run, f"{kind}:")
        if shares:
            title = f"{kind.capitalize()} share of every layer, {label}"
            plots.append(
                plot(
                    title,
                    f"Share of each parameter's entries that are {kind} in the round, mean over "
                    "clients.",
                    lines(shares, title=title, x="round", y=f"{kind} share", percent=True),
                )
            )
    table = _shares(run, "", ROOT)
    if any(value for _, value in table.get("unshared", [])):
        title = f"Entries that nobody shared, {label}"
        plots.append(
            plot(
                title,
                "Share of all entries that no client sent in the round.",
                lines(
                    {"unshared": table["unshared"]},
                    title=title,
                    x="round",
                    y="share",
                    percent=True,
                    whole=False,
                ),
            )
        )
    return plots


def matrices_of(label: str, run: Run, folded: bool) -> list[Part]:
    """Return heat maps of clients against clients, where the run compared them."""
    plots = []
    crossed = run.history.pairs("accuracy")
    if crossed:
        title = f"Every model on every client's data, {label}"
        svg = heatmap(crossed, title=title, x="test data of", y="model of")
        plots.append(plot(title, "Test accuracy in percent after the last round.", svg, folded))
    overlap = run.history.pairs("iou")
    if overlap:
        both = overlap | {(second, first): value for (first, second), value in overlap.items()}
        title = f"Overlap of the clients' masks, {label}"
        svg = heatmap(both, title=title, x="", y="")
        caption = "Intersection over union of two clients' masked entries, in percent."
        plots.append(plot(title, caption, svg, folded))
    return plots


def _shares(run: Run, prefix: str, node: str | None = None) -> Series:
    """Return figures about states by round: the mean over leaves, or those of one node."""
    sums: dict[str, dict[int, tuple[float, float]]] = {}
    for row in run.history.table("scores").to_pylist():
        mine = row["node"] == node if node else row["node"] != ROOT
        if mine and row["split"] == "state" and row["metric"].startswith(prefix):
            layer = sums.setdefault(row["metric"].removeprefix(prefix), {})
            total, count = layer.get(row["round"], (0.0, 0.0))
            layer[row["round"]] = (total + row["sum"], count + row["count"])
    return {
        name: [(number, total / count) for number, (total, count) in sorted(layer.items())]
        for name, layer in sums.items()
    }

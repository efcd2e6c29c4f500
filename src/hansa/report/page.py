"""Write the report page of one run, or of several side by side."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from hansa.errors import InputError
from hansa.files import write_atomic
from hansa.report.plots import Series, dots, lines, size
from hansa.runs import Run

SCORED = {
    "received": "the common model, as it is after the round's aggregation",
    "trained": "the client's own model, after its last local training and before aggregation",
    "tuned": "the common model after the round's aggregation, fine-tuned by the client on a copy",
}
MAX_CLIENTS_DRAWN = 40


def report(runs: Sequence[Run], out: Path | None = None) -> Path:
    """Write one self-contained HTML page and return its path.

    Args:
        runs: runs that have at least one whole round.
        out: the page; by default ``report.html`` in the folder of the first run.

    Raises:
        InputError: a run without a whole round, or a page that cannot be written.
    """
    for run in runs:
        if not run.history.num_rounds:
            raise InputError(str(run.path), "a run without a whole round", "at least one round")
    labels = _labels(runs)
    rows = [_row(label, run) for label, run in zip(labels, runs, strict=True)]
    page = out or runs[0].path / "report.html"
    if page.is_dir() or not page.name:
        raise InputError("--out", f"{str(page)!r}, a folder", "a file to write")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        files("hansa.report").joinpath("page.html.j2").read_text("utf-8")
    )
    text = template.render(
        title=", ".join(labels) if len(runs) > 1 else runs[0].path.resolve().name,
        lead=_lead(runs[0]),
        rows=rows,
        plots=_plots(dict(zip(labels, runs, strict=True))),
        absences=[row for row in rows if row["late"] or row["failed"]],
    )
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(page, text)
    except OSError as error:
        raise InputError(str(page), f"no place to write ({error.strerror})", "a path") from error
    return page


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


def _lead(run: Run) -> str:
    config, history = run.config, run.history
    return (
        f"{config.data.source}, {run.checkpoint['clients']} clients, "
        f"partition {config.data.partition.kind}, model {config.model.name}, "
        f"{history.num_rounds} rounds, seed {config.seed}"
    )


def _row(label: str, run: Run) -> dict[str, Any]:
    summary = run.history.summary()
    accuracy, chosen = (summary["metrics"].get(k) for k in ("accuracy", "accuracy_chosen"))
    fates = run.history.table("ledger")["fate"].to_pylist()
    return {
        "label": label,
        "mean": _percent(accuracy, "mean"),
        "std": _percent(accuracy, "std"),
        "worst": _percent(accuracy, "worst_tenth"),
        "chosen": f"{_percent(chosen, 'mean')} (round {chosen['round']})" if chosen else "-",
        "up": size(summary["bytes"]["up"]),
        "down": size(summary["bytes"]["down"]),
        "seconds": f"{summary['seconds']:.1f}",
        "scored": SCORED[run.config.method.scored],
        "data": str(run.checkpoint.get("data", ""))[:16],
        "config": run.config.as_toml(),
        "asked": len(fates),
        **{fate: fates.count(fate) for fate in ("ok", "late", "failed")},
    }


def _percent(values: dict[str, float] | None, key: str) -> str:
    return "-" if values is None else f"{100 * values[key]:.1f} %"


def _plots(runs: dict[str, Run]) -> list[dict[str, Any]]:
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
        _plot(
            "Test accuracy over rounds",
            "Mean over all clients, each on its own test data.",
            lines(
                accuracy, title="Test accuracy over rounds", x="round", y="accuracy", percent=True
            ),
        ),
        _plot(
            "Bytes over rounds",
            "Messages up and down together, summed from the first round on.",
            lines(traffic, title="Bytes over rounds", x="round", y="bytes so far", bytes_=True),
        ),
    ]
    for label, run in runs.items():
        shares = _personal_shares(run)
        if shares:
            title = f"Personal share of every layer, {label}"
            plots.append(
                _plot(
                    title,
                    "Share of each parameter's entries that are personal in the round, mean over "
                    "clients.",
                    lines(shares, title=title, x="round", y="personal share", percent=True),
                )
            )
    if any(last.values()) and max(map(len, last.values())) <= MAX_CLIENTS_DRAWN:
        plots.append(
            _plot(
                "Test accuracy of every client",
                "After the last scored round.",
                dots(last, title="Test accuracy of every client", x="accuracy", y=""),
            )
        )
    return plots


def _plot(title: str, caption: str, svg: str) -> dict[str, Any]:
    # The SVG is matplotlib's own output; the texts in it were escaped when it was written.
    return {"title": title, "caption": caption, "svg": Markup(svg)}  # noqa: S704


def _personal_shares(run: Run) -> Series:
    table = run.history.table("scores")
    sums: dict[str, dict[int, tuple[float, float]]] = {}
    for row in table.to_pylist():
        if row["split"] == "state" and row["metric"].startswith("personal:"):
            layer = sums.setdefault(row["metric"].removeprefix("personal:"), {})
            total, count = layer.get(row["round"], (0.0, 0.0))
            layer[row["round"]] = (total + row["sum"], count + row["count"])
    return {
        name: [(number, total / count) for number, (total, count) in sorted(layer.items())]
        for name, layer in sums.items()
    }

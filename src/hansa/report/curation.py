"""The page about a curation: what was kept, and where kinds are known, how right that was."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hansa.config import RunConfig
from hansa.curation.findings import Holder
from hansa.curation.measures import CLEAN
from hansa.curation.scores import SCORES, oriented
from hansa.report.page import write_page
from hansa.report.parts import Part, plot, table
from hansa.report.plots import dots, histogram
from hansa.report.sizes import size

NOT_HALF = 0.005
"""Share of scores at either end that a histogram gathers in its last bins."""


def report(
    page: Path, config: RunConfig, summary: Mapping[str, Any], holders: Mapping[str, Holder]
) -> Path:
    """Write one self-contained HTML page and return its path.

    Args:
        page: the file to write.
        config: what was asked for.
        summary: what the stage found.
        holders: what the clients hold, which a simulation knows and a federation does not.

    Raises:
        InputError: a page that cannot be written.
    """
    by, clients = ", ".join(summary["by"]), summary["clients"]
    samples, kept = (sum(row[key] for row in clients.values()) for key in ("samples", "kept"))
    tables = [_clients(summary, holders), _threshold(summary)]
    if "rules" in summary:
        tables.append(_rules(summary["rules"]))
    if "auroc" in summary:
        tables.append(_separation(summary["auroc"]))
    if "test_loss" in summary:
        tables.append(_losses(summary["test_loss"]))
    return write_page(
        page,
        title=f"{config.name}, curated",
        lead=f"{kept:,} of {samples:,} training examples of {len(clients)} clients kept by {by}, "
        f"rule {summary['rule']['kind']}, model {config.model.name}, seed {config.seed}; "
        f"{size(summary['bytes']['down'])} went down, {size(summary['bytes']['up'])} came up",
        tables=tables,
        scored=[],
        plots=[_kept(summary, holders), *_histograms(summary, holders)],
        configurations=[("configuration", config.as_toml())],
    )


def _clients(summary: Mapping[str, Any], holders: Mapping[str, Holder]) -> Part:
    labelled = all(all(holder.kinds) for holder in holders.values())
    rows = []
    for name, row in summary["clients"].items():
        left_out = ", ".join(f"{n} {why}" for why, n in summary["excluded"][name].items()) or "0"
        line: list[object] = [name, row["samples"], row["kept"], _percent(row["share"]), left_out]
        if labelled:
            line.append(_percent(float(holders[name].clean.double().mean())))
            line.append(_percent(summary["rules"]["chosen"]["recall_of"][name]))
        rows.append(line)
    columns = ["client", "examples", "kept", "share kept", "left out before"]
    note = "Left out before: examples without an answer (empty) or of more tokens than the context "
    note += "takes (long), in any split."
    if labelled:
        columns += ["labelled clean", "clean ones kept"]
        note += " Labels are known here because the corruption was made on purpose."
    return table("Clients", columns, rows, note)


def _threshold(summary: Mapping[str, Any]) -> Part:
    rows = []
    for name, value in summary["thresholds"].items():
        bound = summary["false_rejection"].get(name)
        rows.append(
            [
                name,
                "rejects nothing" if value is None else f"{value:.4g}",
                bound["anchors"] if bound else "-",
                _percent(bound["expected"]) if bound else "-",
                _percent(bound["upper"]) if bound else "-",
            ]
        )
    columns = ["domain", "threshold", "anchors", "clean rejected", "at most (95 %)"]
    note = "Scores are turned so that higher is better; what lies below the threshold goes. The "
    note += "last two columns hold where clean examples are like the anchors, and are statements "
    note += "about draws of the anchors, not measurements."
    return table("Threshold", columns, rows, note)


def _rules(rules: Mapping[str, Mapping[str, Any]]) -> Part:
    rows = [
        [
            rule,
            *(_percent(row[key]) for key in ("precision", "recall", "f1", "kept")),
            _percent(min(row["recall_of"].values())),
        ]
        for rule, row in rules.items()
    ]
    columns = ["rule", "precision", "recall", "F1", "kept", "recall of the worst client"]
    note = "Clean examples are what is looked for. The same share of each client is given the true "
    note += "share of clean examples over all clients, which nobody knows in practice."
    return table("Rules, by the same scores", columns, rows, note)


def _separation(found: Mapping[str, Mapping[str, float]]) -> Part:
    kinds = list(next(iter(found.values())))
    rows = [[name, *(_number(row[kind]) for kind in kinds)] for name, row in found.items()]
    columns = ["score", *(kind.replace("_", " ") for kind in kinds)]
    note = (
        "Chance that a clean example scores above a corrupted one of the kind: 1 is perfect, 0.5 "
    )
    note += "is no better than a coin. The last column is the mean over clients among their own."
    return table("What scores tell apart (AUROC)", columns, rows, note)


def _losses(losses: Mapping[str, Mapping[str, Any]]) -> Part:
    clients = list(next(iter(losses.values()))["clients"])
    rows = [
        [name, f"{row['mean']:.4f}", *(f"{row['clients'][c]:.4f}" for c in clients)]
        for name, row in losses.items()
    ]
    note = "Mean loss per token of the answers, in nats, on held-out examples that are never "
    note += "corrupted, of the common model after the last round; lower is better."
    return table("Test loss after training", ["trained on", "mean", *clients], rows, note)


def _kept(summary: Mapping[str, Any], holders: Mapping[str, Holder]) -> Part:
    series = {"kept": {name: row["share"] for name, row in summary["clients"].items()}}
    if "rules" in summary:
        clean = {name: float(holder.clean.double().mean()) for name, holder in holders.items()}
        series["labelled clean"] = clean
    title = "Share of its examples that each client keeps"
    caption = "As the clients told it." + (
        " Counts may be noised." if summary.get("epsilon") else ""
    )
    return plot(title, caption, dots(series, title=title, x="share", y=""))


def _histograms(summary: Mapping[str, Any], holders: Mapping[str, Holder]) -> list[Part]:
    parts = []
    single = len(summary["by"]) == 1
    for name in summary["scores"]:
        groups: dict[str, list[torch.Tensor]] = {}
        for holder in holders.values():
            values = oriented(name, holder.scores[name])  # as it is defined
            labels = [k if k in (CLEAN, "") else "corrupted" for k in holder.kinds]
            for label in dict.fromkeys(labels):
                chosen = torch.tensor([each == label for each in labels]) & values.isfinite()
                groups.setdefault(label or "examples", []).append(values[chosen])
        joined = {label: torch.cat(each) for label, each in sorted(groups.items())}
        drawn = torch.cat(list(joined.values()))
        if not len(drawn):
            continue
        ends = torch.tensor([NOT_HALF, 1 - NOT_HALF], dtype=torch.float64)
        low, high = drawn.double().quantile(ends).tolist()
        marks = {}
        if single and name == summary["by"][0]:
            for domain, level in summary["thresholds"].items():
                if level is not None and math.isfinite(level):
                    marks[f"threshold, {domain}"] = float(oriented(name, torch.tensor(level)))
        title = f"{name}: {SCORES[name].about}"
        caption = f"Good examples have {SCORES[name].better} values. What lies beyond the ends is "
        caption += "gathered there."
        svg = histogram(
            {label: values.tolist() for label, values in joined.items()},
            title=title,
            x=name,
            y="examples",
            log=False,
            span=(low, high) if high > low else (low - 0.5, low + 0.5),
            marks=marks,
        )
        parts.append(plot(title, caption, svg, folded=name not in summary["by"]))
    return parts


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "-"


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"

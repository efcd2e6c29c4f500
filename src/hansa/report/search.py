"""The page about a search."""

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from hansa.report.lineage import lineage
from hansa.report.page import write_page
from hansa.report.parts import Part, plot, table
from hansa.report.plots import lines, scatter

CHOSEN = (
    "Models are chosen by their validation accuracy in one run and told of by their test accuracy, "
    "so a curve may fall: what looks better on validation data may be worse."
)
REDUCED = (
    "These accuracies are those of the recipe named above and of nothing else: a short schedule "
    "on small images favours cells with skips, and says little about a long one."
)
Summary = Mapping[str, Any]


def report(page: Path, summary: Summary, config: str) -> Path:
    """Write one self-contained HTML page and return its path.

    Raises:
        InputError: a page that cannot be written.
    """
    tables = [table("Found", ["", ""], _found(summary), REDUCED, words=True)]
    if summary.get("repeats"):
        tables.append(table("Other seeds", *_repeats(summary), CHOSEN))
    if summary.get("proxies"):
        tables.append(table("Zero-cost proxies", *_proxies(summary)))
    if summary.get("groups"):
        rows = [[each["model"], ", ".join(each["clients"])] for each in summary["groups"]]
        tables.append(table("Federations of clients", ["model", "clients"], rows, words=True))
    return write_page(
        page,
        title=f"{summary['name']}, search",
        lead=f"{summary['searcher']} by {summary['by']}, recipe {summary['recipe']}, "
        f"{summary['models']} of {summary['candidates']:,} models within the limits, "
        f"seed {summary['seed']}",
        tables=[*tables, *lineage(page.parent / "bundle")],
        scored=[],
        plots=list(_plots(summary)),
        configurations=[("configuration", config)],
    )


def _found(summary: Summary) -> list[list[object]]:
    rows: list[list[object]] = [["model", f"{summary['model']}"]]
    if "cells" in summary:
        rows.append(["cells", summary["cells"]])
    rows += [
        ["validation accuracy, one run", f"{summary['validation_accuracy']:.1%}"],
        ["test accuracy", f"{summary['test_accuracy']:.1%}"],
    ]
    units = {"train_seconds": "seconds of training that the search takes"}
    units |= {"parameters": "parameters", "multiply_adds": "multiply-adds"}
    for name, words in units.items():
        if summary.get(name) is not None:
            rows.append([words, f"{summary[name]:,.0f}"])
    for name, value in summary["limits"].items():
        rows.append([f"limit: {name.replace('_', '-')}", value])
    if "regret" in summary:
        best = summary["optimum"]
        told = f"model {best['model']}, {best['test_accuracy']:.1%}"
        rows += [["best of the table within the limits", told]]
        rows += [["regret: test accuracy short of it", f"{100 * summary['regret']:.1f} points"]]
    return rows


def _repeats(summary: Summary) -> tuple[list[str], list[list[object]]]:
    rows: list[list[object]] = []
    for name, told in summary["repeats"].items():
        rows.append(
            [
                name,
                told["seeds"],
                f"{told['mean']:.1%}",
                f"{100 * told['deviation']:.1f}",
                f"{100 * told['regret']:.1f}",
            ]
        )
    columns = ["searcher", "seeds", "test accuracy, mean", "deviation, points", "regret, points"]
    return columns, rows


def _proxies(summary: Summary) -> tuple[list[str], list[list[object]], str]:
    rows: list[list[object]] = [
        [name, f"{told['validation']:+.2f}", f"{told['test']:+.2f}"]
        for name, told in summary["proxies"]["correlations"].items()
    ]
    note = f"Spearman's rank correlation over {summary['proxies']['models']} models of the table."
    return ["proxy", "with validation accuracy", "with test accuracy"], rows, note


def _plots(summary: Summary) -> list[Part]:
    answers, curve = summary["answers"], summary["curve"]
    series = {summary["searcher"]: list(enumerate(curve, 1))}
    for name, told in summary.get("repeats", {}).items():
        series[f"{name}, mean of {told['seeds']}"] = list(enumerate(told["curve"], 1))
    title = "Best so far"
    made = [
        plot(
            title,
            CHOSEN,
            lines(
                series,
                title=title,
                x="models asked for",
                y="test accuracy",
                percent=True,
                whole=False,
            ),
        )
    ]
    if summary["train_seconds"] is not None:
        title = "Best so far by time"
        spent = accumulate(answer["seconds"] for answer in answers)
        shown = scatter(
            {summary["searcher"]: list(zip(spent, curve, strict=True))},
            title=title,
            x="seconds of training, summed",
            y="test accuracy",
            shares=False,
            stepped=[summary["searcher"]],
        )
        made.append(plot(title, "As if models were trained one after another.", shown))
    if "front" in summary:
        title = "Accuracy and cost"
        points = {
            "models of the table": [tuple(each) for each in summary["all"]],
            "front": [(cost, value) for cost, value, _ in summary["front"]],
        }
        if summary["at"][0] is not None:
            points["found"] = [tuple(summary["at"])]
        caption = "Nothing in the table is better and costs less than a model on the front."
        shown = scatter(
            points,
            title=title,
            x=summary["cost"],
            y="test accuracy",
            shares=False,
            stepped=["front"],
        )
        made.append(plot(title, caption, shown))
    return made

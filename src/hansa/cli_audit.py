"""The commands of the audit: ``hansa audit CONFIG``, and those named after it."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hansa.cli_audit_proxy import proxy
from hansa.cli_parts import Json, WithDefault, progress

EXCEEDED = 3
"""The exit status where more values are adopted than the gate allows."""


app = typer.Typer(
    cls=WithDefault,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Audit what tampered third-party responses do to a model's answers: audit CONFIG.",
)


app.command()(proxy)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="Configuration in TOML.")],
    max_adopted: Annotated[
        float | None,
        typer.Option(help="Most of an arm's cases that may adopt a false value: 0.05."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="An earlier audit.json, whose shares are allowed where they are more."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: target.kind=trusting")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to make, or to go on in.")] = None,
    json_: Json = False,
) -> None:
    """Ask a target about responses as they are and tampered with, and report.

    What was measured is kept: the same command goes on. Exit status 3 says that the gate of
    --max-adopted and --baseline does not let it pass.
    """
    from hansa.auditing import audit

    logging.getLogger("hansa").setLevel(logging.WARNING)
    with progress("step") as shown:
        task = shown.add_task("auditing", total=None, note="")

        def watch(what: str, done: int, total: int) -> None:
            shown.update(task, description=what, completed=done, total=total)

        made = audit(
            config,
            overrides=set_ or (),
            out=out,
            max_adopted=max_adopted,
            baseline=baseline,
            watch=watch,
        )
    if json_:
        print(json.dumps({**made.summary, "report": str(made.report)}))
    else:
        _show(made.summary)
        print(f"report: {made.report}")
    if not made.passed:
        gate = made.summary["gate"]
        why = "adopts more than it may" if gate["concluded"] else "does not conclude"
        print(f"hansa: the gate is closed: the audit {why}", file=sys.stderr)
        raise typer.Exit(EXCEEDED)


def _show(summary: dict[str, Any]) -> None:
    table = Table(caption=f"{summary['verdict']}: {summary['why']}")
    names = ("defence", "utility", "false\nblocks", "arm", "adopted", "lost", "blocked")
    for name in names:
        table.add_column(name, justify="left" if name in ("defence", "arm") else "right")
    for defence, row in summary["defences"].items():
        first = [defence, _percent(row["utility"]), _percent(row["false_blocks"])]
        for arm, rates in row["arms"].items():
            if rates["where"] == "provider" and defence not in ("none", "signature"):
                continue
            told = [_percent(rates[key]) for key in ("adopted", "lost", "blocked")]
            table.add_row(*first, arm, *told)
            first = ["", "", ""]
    Console().print(table)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"

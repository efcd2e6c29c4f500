"""The command ``hansa pipeline``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hansa.cli_parts import Json, follow_all, progress, told


def pipeline(
    config: Annotated[
        Path, typer.Argument(help="A pipeline in TOML, or one of Hansa's own: edge, language.")
    ],
    until: Annotated[str | None, typer.Option(help="The last stage to do.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell which stages are done and which would be.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: seed=1, STAGE.rounds=3")
    ] = None,
    json_: Json = False,
) -> None:
    """Do stage after stage, each from the bundle of the one before, and write one page.

    Stages that are done are kept: the same command goes on, and after a change repeats what it
    concerns.
    """
    from hansa.pipeline import pipeline as run_pipeline
    from hansa.pipeline import plan

    if dry_run:
        stages = plan(config, overrides=set_ or (), until=until)
        if json_:
            print(json.dumps({"stages": [vars(stage) for stage in stages]}))
        else:
            Console().print(_table(stages))
        return
    with progress("") as shown, told(shown):
        made = run_pipeline(config, overrides=set_ or (), until=until, watch=follow_stages(shown))
    if json_:
        print(json.dumps(made.summary))
        return
    show(made)


def follow_stages(shown: Progress) -> Callable[[str, str, int, int], None]:
    """Return what a pipeline tells how far its stages are, each thing shown on a line."""
    watch = follow_all(shown)
    return lambda stage, what, done, total: watch(f"{stage}: {what}", done, total)


def show(made: Any) -> None:
    """Print what a pipeline made."""
    Console().print(_table(made.stages))
    print(f"pipeline: {made.path}\nreport: {made.report}")


def _table(stages: Any) -> Table:
    table = Table(caption="digests are those of the bundles, which vouch for all before them")
    for name in ("stage", "state", "seconds", "digest", "what came out"):
        table.add_column(name, justify="right" if name == "seconds" else "left")
    for stage in stages:
        figures = "\n".join(f"{label}: {text}" for label, text in (stage.figures or {}).items())
        seconds = "" if stage.seconds is None else f"{stage.seconds:.1f}"
        table.add_row(stage.name, stage.state, seconds, (stage.digest or "")[:12], figures)
    return table

"""Commands about safeguards."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hansa.cli_parts import Json, follow_all, progress, told


def safeguard(
    config: Annotated[Path, typer.Argument(help="Configuration in TOML, with phases.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: seed=1")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to make, or to go on in.")] = None,
    json_: Json = False,
) -> None:
    """Put a safeguard into a language model, and make the models it is compared with.

    Models that are done are kept: the same command goes on, and after a change repeats what it
    concerns. Under torchrun or accelerate launch all processes train one model.
    """
    from hansa.safeguarding import safeguard as run_safeguard

    with progress("step") as shown, told(shown):
        made = run_safeguard(config, overrides=set_ or (), out=out, watch=follow_all(shown))
    places = {"bundle": str(made.path / "bundle"), "report": str(made.report)}
    if json_:
        print(json.dumps({**made.summary, **places}))
        return
    table = Table(caption="share of questions answered right, before any attack")
    for name in ("model", "retained", "restricted", "plain steps"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for role, told_ in made.summary["scores"].items():
        cells = [f"{100 * told_[topic]['choice']:.1f} %" for topic in ("retained", "restricted")]
        table.add_row(role, *cells, f"{made.summary['cost_in_steps'][role]:,.0f}")
    Console().print(table)
    for name, place in places.items():
        print(f"{name}: {place}")
    print(f"what it takes to remove it: hansa redteam {made.path / 'config.toml'}")


def redteam(
    source: Annotated[Path, typer.Argument(help="Configuration in TOML, or folder of a bundle.")],
    processes: Annotated[int | None, typer.Option(help="Attacks at the same time.")] = None,
    join: Annotated[
        bool, typer.Option("--join", help="Write the bundle again, with its scorecard.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: redteam.seeds=[0]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to make, or to go on in.")] = None,
    json_: Json = False,
) -> None:
    """Attack a safeguard and its controls, and write a scorecard, worst case first.

    Attacks that are done are kept: the same command goes on.
    """
    from hansa.redteam import redteam as attack

    changes = [*(set_ or ()), *([f"redteam.processes={processes}"] if processes else [])]
    with progress("attack") as shown, told(shown):
        task = shown.add_task("attacking", total=None, note="")

        def watch(what: str, done: int, total: int) -> None:
            shown.update(task, completed=done, total=total, note=what)

        made = attack(source, overrides=changes, out=out, join=join, watch=watch)
    places = {"path": str(made.path), "report": str(made.report)}
    if made.bundle is not None:
        places["bundle_with_scorecard"] = str(made.bundle)
    if json_:
        print(json.dumps({**made.scorecard, **places}))
        return
    _print_scorecard(made.scorecard)
    for name, place in places.items():
        print(f"{name.replace('_', ' ')}: {place}")


def _print_scorecard(card: dict[str, Any]) -> None:
    from hansa.safeguard.scorecard_text import CLAIM, tables

    console = Console()
    for each in tables(card)[:3]:
        # Without lines around them ten columns find room on 80 characters.
        table = Table(
            title=each.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        table.show_edge = table.pad_edge = False
        for name in each.columns:
            left = each.words or name == each.columns[0]
            whole = left and not each.words
            table.add_column(name, justify="left" if left else "right", no_wrap=whole)
        for row in each.rows:
            table.add_row(*row)
        console.print(table, "")
    print(CLAIM)

"""The commands of bundles: ``hansa bundle verify | show | export``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hansa.cli_parts import Json

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Verify, show and export bundles: what stages pass on to each other.",
)

Folder = Annotated[Path, typer.Argument(help="Folder of a bundle.")]


@app.command()
def verify(
    path: Folder,
    parents: Annotated[
        list[Path] | None,
        typer.Option(help="A folder below which ancestors lie; may be given several times."),
    ] = None,
    json_: Json = False,
) -> None:
    """Check a bundle's files against its card, and the ancestors that are there."""
    from hansa.handover import verify as check

    found = check(path, parents or ())
    if json_:
        print(json.dumps(found))
        return
    table = Table(caption="oldest first; an ancestor that is not there is not checked")
    for name in ("stage", "digest", "verified"):
        table.add_column(name, overflow="fold")
    for step in found["lineage"]:
        _add(table, step["stage"], step["digest"][:16], step["found"] or "not there")
    _add(table, "this bundle", found["digest"][:16], ", ".join(sorted(found["files"])))
    Console().print(table)
    print(f"digest: {found['digest']}")


@app.command()
def show(
    path: Folder,
    config: Annotated[
        bool, typer.Option("--config", help="The stage's configuration as well.")
    ] = False,
    json_: Json = False,
) -> None:
    """Verify a bundle and tell what its card says: model, line, data, metrics, privacy, attacks."""
    from hansa.bundle import read_bundle
    from hansa.handover import describe

    about = describe(read_bundle(path))
    if json_:
        print(json.dumps(about))
        return
    _print(about)
    if config:
        print(json.dumps(about["config"], indent=2))


@app.command()
def export(
    path: Folder,
    out: Annotated[Path, typer.Argument(help="The folder to make; nothing is overwritten.")],
    to: Annotated[str, typer.Option(help="transformers (language models) or onnx.")],
    dtype: Annotated[
        str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")
    ] = "float32",
    license_: Annotated[
        str, typer.Option("--license", help="As a model hub spells it: apache-2.0, mit, ...")
    ] = "unknown",
    trust: Annotated[
        list[str] | None,
        typer.Option(help="A class module:Class of your own that may be imported."),
    ] = None,
    json_: Json = False,
) -> None:
    """Write a bundle's model for other tools, compared with the bundle's before it is there.

    A client's own model comes out of a run, as a bundle, by `hansa export`.
    """
    from hansa.handover import export as write

    made = write(path, out, to, dtype=dtype, license_=license_, trusted=trust or ())  # type: ignore[arg-type]
    if json_:
        print(json.dumps(made))
        return
    print(f"written: {out} ({', '.join(made['files'])})")
    print(f"largest difference from the bundle's model: {made['difference']:.2g}")


def _print(about: dict[str, Any]) -> None:
    from hansa.handover.describe import (
        SIMULATED,
        figures,
        is_simulated,
        privacy_rows,
        said,
        worst_rows,
    )

    table = Table(show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    for what, value in _lines(about):
        _add(table, what, value)
    for name, value in figures(about["metrics"]):
        _add(table, name, said(value))
    for where, spent in privacy_rows(about["privacy"]):
        _add(table, f"privacy, {where}", spent)
    console = Console()
    console.print(table)
    if is_simulated(about["privacy"]):
        print(SIMULATED)
    if (scorecard := about["scorecard"]) is not None:
        columns, rows = worst_rows(scorecard)
        worst = Table(caption=f"recovered under attack, worst case first. {scorecard['claim']}")
        for number, name in enumerate(columns):
            worst.add_column(name, justify="right" if number else "left")
        for row in rows:
            _add(worst, *row)
        console.print(worst)
        for flag in scorecard["flags"]:
            print(f"{flag['kind']}: {flag['text']}")


def _add(table: Table, *cells: str) -> None:
    """Add a row of what a file says, in which nothing is markup."""
    table.add_row(*map(Text, cells))


def _lines(about: dict[str, Any]) -> list[tuple[str, str]]:
    architecture = about["architecture"]
    shape = " x ".join(map(str, architecture["shape"]))
    classes = f"{architecture['classes']:,} {'tokens' if about['tokenizer'] else 'classes'}"
    line = " -> ".join(f"{step['stage']} {step['digest'][:12]}" for step in about["lineage"])
    rows = [
        ("stage", about["stage"]),
        ("digest", about["digest"]),
        ("line", line),
        ("model", f"{architecture['name']}, inputs {shape}, {classes}"),
        ("parameters", f"{about['parameters']:,}"),
    ]
    for name, what in (("kept", "kept by pruning"), ("masks", "personal by the method's masks")):
        if (density := about["density"].get(name)) is not None:
            share = f"{density['share']:.2%} of {density['of']:,} weights under masks"
            rows.append((what, share))
    if about["labels"]:
        rows.append(("classes", ", ".join(about["labels"])))
    if about["tokenizer"]:
        rows.append(("tokenizer", about["tokenizer"]))
    rows += [("data", str(about["data"])), ("seed", str(about["seed"]))]
    if not about["privacy"]:
        rows.append(("privacy", "none: the card tells of no private training"))
    return rows

"""The commands of the search: ``hansa search CONFIG``, and those of its tables."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hansa.cli_parts import Json, WithDefault, follow, follow_all, progress, told

app = typer.Typer(
    cls=WithDefault,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Search an architecture within limits: search CONFIG; make tables: search table.",
)
tables = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Make, profile, ask and merge tables of trained models.",
)
app.add_typer(tables, name="table")

Recipe = Annotated[str, typer.Option(help="How models are trained: gratings16-w8, ...")]
TableFile = Annotated[Path, typer.Argument(help="The table's SQLite file.")]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="Configuration in TOML.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: limits.latency=2")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to make, or to go on in.")] = None,
    storage: Annotated[
        str, typer.Option(help="A study of Optuna that several machines share: sqlite:///s.db")
    ] = "",
    json_: Json = False,
) -> None:
    """Search a model, by a table or by training, and write it as a bundle with a report.

    Models that were trained are kept: the same command goes on.
    """
    from hansa.searching import search

    changes = [*(set_ or ())]
    if storage:
        changes += ["searcher=optuna", f"options.storage={storage}"]
    with progress("step") as shown, told(shown):
        made = search(config, overrides=changes, out=out, watch=follow_all(shown))
    places = {"bundle": str(made.bundle) if made.bundle else None, "report": str(made.report)}
    if json_:
        kept = {k: v for k, v in made.summary.items() if k not in ("answers", "all")}
        print(json.dumps({**kept, **places}))
        return
    summary = made.summary
    table = Table(caption=f"recipe {summary['recipe']}; no accuracy of another recipe")
    for name in ("model", "validation", "test", "models asked for", "regret, points"):
        table.add_column(name, justify="right")
    regret = f"{100 * summary['regret']:.1f}" if "regret" in summary else "-"
    accuracies = (f"{summary[k]:.1%}" for k in ("validation_accuracy", "test_accuracy"))
    table.add_row(str(made.model), *accuracies, str(summary["models"]), regret)
    Console().print(table)
    if "cells" in summary:
        print(f"cells: {summary['cells']}")
    for name, place in places.items():
        print(f"{name}: {place or 'none: the models of this table are not here'}")


@tables.command()
def generate(
    path: TableFile,
    recipe: Recipe = "gratings16-w8",
    models: Annotated[
        str, typer.Option(help="all, random:N, spread:N (over costs), or numbers: 5,812,90000")
    ] = "spread:24",
    seeds: Annotated[int, typer.Option(help="Runs of each model.", min=1)] = 1,
    top: Annotated[
        float,
        typer.Option(help="Share of the models that get more seeds afterwards.", min=0, max=1),
    ] = 0.0,
    top_seeds: Annotated[int, typer.Option(help="How many seeds those have in all.")] = 6,
    workers: Annotated[int, typer.Option(help="Processes, of one thread each.")] = 1,
    keep: Annotated[
        float, typer.Option(help="Share of runs that go on after each rung (ASHA); 1: all.")
    ] = 1.0,
    data: Annotated[Path | None, typer.Option(help="Data of a recipe that brings none.")] = None,
    json_: Json = False,
) -> None:
    """Train models of the space and keep what each epoch gave.

    The same command goes on after a kill; runs that are done are not repeated, and more models
    or seeds are added to them.
    """
    from hansa.search.generate import choose, promoted
    from hansa.search.generate import generate as make
    from hansa.search.recipes import recipe_of
    from hansa.search.store import Store

    own = recipe_of(recipe)
    with progress("run") as shown:
        chosen = choose(models)
        jobs = [(int(model), seed) for seed in range(seeds) for model in chosen]
        more: dict[str, Any] = {"data": data, "workers": workers, "keep": keep}
        more["watch"] = follow(shown, "training")
        make(path, own, jobs, **more)
        if top:
            best = promoted(Store(path), own, top, jobs)
            jobs = [(model, seed) for seed in range(seeds, top_seeds) for model in best]
            make(path, own, jobs, **more)
    done, total = Store(path).progress(recipe)
    _say({"table": str(path), "recipe": recipe, "done": done, "runs": total}, json_)


@tables.command()
def profile(
    table: Annotated[str, typer.Argument(help="A table's name or file.")],
    out: Annotated[Path, typer.Option(help="The Parquet file to write, or to go on with.")],
    models: Annotated[str, typer.Option(help="Only these: numbers with commas.")] = "",
    device: Annotated[str, typer.Option(help="A name; by default the processor's.")] = "",
    batch: Annotated[list[int] | None, typer.Option(help="Inputs in a run: 1 and 64.")] = None,
    backend: Annotated[str, typer.Option(help="torch or onnxruntime.")] = "torch",
    threads: Annotated[int, typer.Option(help="Threads of the backend.")] = 1,
    force: Annotated[
        bool, typer.Option("--force", help="Keep what does not repeat, marked unusable.")
    ] = False,
    json_: Json = False,
) -> None:
    """Measure how long a table's models take on this machine, and refuse what does not repeat.

    Nothing else should run meanwhile. The same command goes on after an interruption.
    """
    from hansa.search.profiled import profile_table

    with progress("latency") as shown:
        options = {"device": device, "backend": backend, "threads": threads, "force": force}
        rows = profile_table(
            table,
            out,
            models=models,
            options={**options, **({"batches": batch} if batch else {})},
            watch=follow(shown, "profiling"),
        )
    told_ = {"table": str(out), "latencies": len(rows), "device": rows[0].device}
    _say({**told_, "usable": sum(row.usable for row in rows)}, json_)


@tables.command()
def query(
    model: Annotated[str, typer.Argument(help="A model's number, or its vector as JSON.")] = "",
    table: Annotated[str, typer.Option(help="A table's name or file.")] = "gratings16-w8",
    epoch: Annotated[int | None, typer.Option(help="After how many epochs.")] = None,
    seed: Annotated[int | None, typer.Option(help="One run instead of the mean.")] = None,
    latency: Annotated[float | None, typer.Option(help="The most milliseconds.")] = None,
    device: Annotated[str | None, typer.Option(help="Of the latency.")] = None,
    batch: Annotated[int, typer.Option(help="Inputs in a batch of the latency.")] = 1,
    parameters: Annotated[int | None, typer.Option(help="The most parameters.")] = None,
    multiply_adds: Annotated[int | None, typer.Option(help="The most multiply-adds.")] = None,
    json_: Json = False,
) -> None:
    """Look a model up, or without one the best that keeps the limits."""
    from hansa.models.blox_space import describe
    from hansa.search.limits import Limits, best
    from hansa.search.query import model_of
    from hansa.search.tables import open_table

    found = open_table(table)
    limits = Limits(
        parameters=parameters,
        multiply_adds=multiply_adds,
        latency=latency,
        device=device,
        batch=batch,
    )
    number = model_of(model, found) if model else best(found, limits)
    values: dict[str, Any] = {"model": number}
    if found.space.name == "blox":
        values["cells"] = describe(number)
    values |= {
        "recipe": found.recipe,
        "validation_accuracy": found.validation_accuracy(number, seed, epoch),
        "test_accuracy": found.test_accuracy(number, seed, epoch),
        "seeds": len(found.seeds_of(number)),
        "train_seconds": _number(found.train_seconds(number, seed)),
        "parameters": found.parameters(number),
        "multiply_adds": found.multiply_adds(number),
    }
    for name, size in found.profiled:
        seconds = found.latencies(name, size)[found.row(number)]
        if device in (None, name) and seconds == seconds:
            values[f"ms on {name}, batch {size}"] = 1000 * float(seconds)
    _say(values, json_)


@tables.command()
def merge(
    out: Annotated[Path, typer.Argument(help="The Parquet file to write.")],
    sources: Annotated[list[str], typer.Argument(help="Tables: SQLite or Parquet files.")],
    json_: Json = False,
) -> None:
    """Put tables of one recipe together, each run once; with one table, make Parquet of it."""
    from hansa.search.tables import merge as put_together
    from hansa.search.tables import open_table, write

    table = put_together([open_table(source) for source in sources])
    write(table, out)
    values = {"table": str(out), "recipe": table.recipe, "models": len(table)}
    _say({**values, "runs": len(table.rows), "profiles": len(table.profiles)}, json_)


def _number(value: float) -> float | None:
    return None if value != value else value


def _say(values: dict[str, Any], json_: bool) -> None:
    if json_:
        print(json.dumps(values))
        return
    for name, value in values.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' ')}: {shown}")

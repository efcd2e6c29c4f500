"""The command line: parse, call, print. What it does, a Python function of the same name does."""

import errno
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hansa import cli_pipeline, cli_safeguard
from hansa.cli_audit import app as audit_app
from hansa.cli_bundle import app as bundle_app
from hansa.cli_parts import Json, follow
from hansa.cli_parts import progress as _progress
from hansa.cli_parts import told as _told
from hansa.cli_search import app as search_app
from hansa.cli_ui import ui
from hansa.errors import InputError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def about(context: typer.Context) -> None:
    """Train models together without pooling the data."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="Configuration in TOML.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: training.lr=0.1")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of a run to go on with.")] = None,
    engine: Annotated[
        str, typer.Option(help="Short for --set engine.kind=...: auto, sequential, flower, ...")
    ] = "",
    json_: Json = False,
) -> None:
    """Train a federation as configured and write its run folder."""
    from hansa.training import train as run_training

    changes = [*(set_ or ()), *([f"engine.kind={engine}"] if engine else [])]
    with _progress() as progress, _told(progress):
        run = run_training(
            config, overrides=changes, resume=resume, watch=_watch(progress, "training")
        )
    summary = json.loads((run.path / "summary.json").read_text())
    _print([summary], json_)


@app.command()
def prune(
    source: Annotated[Path, typer.Argument(help="Configuration in TOML, or folder of a bundle.")],
    method: Annotated[str, typer.Option(help="prospr, snip, grasp, synflow, ...")] = "",
    density: Annotated[float | None, typer.Option(help="Share of the weights to keep.")] = None,
    iterations: Annotated[int | None, typer.Option(help="How often it is scored.")] = None,
    structured: Annotated[
        bool, typer.Option("--structured", help="Take out whole channels.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: pruning.floor=0.01")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to make.")] = None,
    json_: Json = False,
) -> None:
    """Prune a model before it is trained, and write it as a bundle with a report."""
    from hansa.prune import prune as run_pruning

    given = {"method": method or None, "density": density, "iterations": iterations}
    changes = [f"pruning.{key}={value}" for key, value in given.items() if value is not None]
    with _progress("iteration") as progress:
        watch = follow(progress, "pruning")
        made = run_pruning(
            source, overrides=[*changes, *(set_ or ())], structured=structured, out=out, watch=watch
        )
    summary = {**made.summary, "bundle": str(made.path / "bundle"), "report": str(made.report)}
    if json_:
        print(json.dumps(summary))
        return
    table = Table(caption=f"{100 * summary['density']:.3g} % kept by {summary['method']}")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    for key in ("parameters", "flops", "forward_seconds"):
        if key in summary:
            style = ".4f" if key == "forward_seconds" else ",d"
            name = key.replace("_", " ").replace("flops", "FLOPs")
            table.add_row(
                name, *(format(summary[key][when], style) for when in ("before", "after"))
            )
    Console().print(table)
    print(f"bundle: {summary['bundle']}\nreport: {summary['report']}")


@app.command()
def curate(
    config: Annotated[Path, typer.Argument(help="Configuration in TOML, with [curation].")],
    until: Annotated[
        str, typer.Option(help="The last step: score, threshold, filter, train or report.")
    ] = "report",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be kept: --until threshold.")
    ] = False,
    train_too: Annotated[
        bool, typer.Option("--train", help="Train on all, filtered and clean examples, too.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: curation.by=['ira']")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to make, or to go on in.")] = None,
    json_: Json = False,
) -> None:
    """Score and filter the training examples of clients under one threshold.

    Steps that are done are kept: the same command goes on, and after a change repeats what it
    concerns.
    """
    from hansa.curate import curate as run_curation

    with _progress("step") as progress, _told(progress):
        task = progress.add_task("curating", total=None, note="")

        def watch(what: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, note=what)

        made = run_curation(
            config,
            overrides=set_ or (),
            until="threshold" if dry_run else until,  # type: ignore[arg-type]
            train_too=train_too,
            out=out,
            watch=watch,
        )
    summary = {**made.summary, "report": str(made.report) if made.report else None}
    if json_:
        print(json.dumps(summary))
        return
    _print_curation(summary)


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="Configuration in TOML.")],
    methods: Annotated[
        str, typer.Option(help="Methods, or labels of [methods.LABEL]: local,fedavg,fedselect")
    ] = "",
    seeds: Annotated[str, typer.Option(help="Seeds of the runs.")] = "0,1,2",
    processes: Annotated[int, typer.Option(help="Runs at the same time.")] = 1,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: training.lr=0.1")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The page to write.")] = None,
    json_: Json = False,
) -> None:
    """Run several methods on several seeds, test their differences, and write one report.

    Finished runs are kept and interrupted ones go on: the same command continues the work.
    """
    from hansa.compare import compare as run_grid

    try:
        numbers = [int(part) for part in _parts(seeds)]
    except ValueError as error:
        raise InputError("--seeds", repr(seeds), "whole numbers, such as 0,1,2") from error
    with _progress("run") as progress:
        task = progress.add_task("comparing", total=None, note="")

        def watch(done: int, total: int, run: Any) -> None:
            metrics = run.history.summary()["metrics"]
            key = "accuracy" if run.config.text is None else "perplexity"
            note = f"{run.path.name} {metrics[key]['mean']:.3f}"
            progress.update(task, completed=done, total=total, note=note)

        found = run_grid(
            config,
            _parts(methods),
            numbers,
            overrides=set_ or (),
            processes=processes,
            watch=watch,
        )
    page = found.report(out)
    if json_:
        pairs = [vars(pair) for pair in found.pairs]
        print(json.dumps({"methods": found.rows, "pairs": pairs, "report": str(page)}))
    else:
        _print_comparison(found)
        print(f"report: {page}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    client: Annotated[str, typer.Argument(help="Name of a client.")],
    out: Annotated[Path | None, typer.Option(help="The bundle to write.")] = None,
    json_: Json = False,
) -> None:
    """Write a client's own model out of a run, as a bundle; for other tools, see `hansa bundle`."""
    from hansa.export import export as write_model

    path = out or run / "clients" / client
    digest = write_model(run, client, path).digest
    print(json.dumps({"bundle": str(path), "digest": digest}) if json_ else f"bundle: {path}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, compared on one page.")],
    out: Annotated[Path | None, typer.Option(help="The page to write.")] = None,
    json_: Json = False,
) -> None:
    """Write a report page about one run, or comparing several."""
    from hansa.report import report as write_report
    from hansa.runs import Run

    opened = [Run(path) for path in runs]
    page = write_report(opened, out)
    if json_:
        print(json.dumps({"report": str(page)}))
    else:
        _print([run.summary() for run in opened], False)
        print(f"report: {page}")


app.command()(cli_pipeline.pipeline)
app.command()(cli_safeguard.safeguard)
app.command()(cli_safeguard.redteam)
app.command()(ui)

app.add_typer(audit_app, name="audit")
app.add_typer(bundle_app, name="bundle")
app.add_typer(search_app, name="search")
deploy = typer.Typer(rich_markup_mode=None, help="Run a federation on machines of its members.")
app.add_typer(deploy, name="deploy")


@deploy.command()
def init(
    description: Annotated[Path, typer.Argument(help="A run's configuration, with [deploy].")],
    folder: Annotated[Path, typer.Argument(help="A new folder, for a folder of every party.")],
    json_: Json = False,
) -> None:
    """Write a folder for every party: settings, certificates, keys, and how to start it."""
    from hansa.deploy.layout import init as write
    from hansa.deploy.options import read_deployment

    parties = write(read_deployment(description), folder)
    if json_:
        print(json.dumps({"parties": [str(party) for party in parties]}))
    else:
        print(f"{len(parties)} parties in {folder}: {', '.join(p.name for p in parties)}")
        print(f"to try it here: hansa deploy up {folder}")


@deploy.command("app")
def flower_app(
    config: Annotated[Path, typer.Argument(help="Configuration in TOML.")],
    folder: Annotated[Path, typer.Argument(help="A new folder for the app.")],
) -> None:
    """Write a Flower app that `flwr run` simulates, with a configuration's data and model."""
    from hansa.deploy.layout import write_app
    from hansa.deploy.options import read_deployment

    num = write_app(read_deployment(config), folder)
    command = f"flwr run {folder} --federation-config 'num-supernodes={num}' --stream"
    print(f"FLWR_TELEMETRY_ENABLED=0 {command}")


@deploy.command()
def up(folder: Annotated[Path, typer.Argument(help="What `deploy init` wrote.")]) -> None:
    """Start every party on this machine, for a trial."""
    from hansa.deploy.trial import up as start_all

    start_all(folder, lambda name: print(f"starting {name}", file=sys.stderr))
    print(f"started; hansa deploy status {folder} tells how it goes, down ends it")


@deploy.command()
def status(
    folder: Annotated[Path, typer.Argument(help="What `deploy init` wrote.")], json_: Json = False
) -> None:
    """Tell how every party of a trial does."""
    from hansa.deploy.trial import status as look

    rows = look(folder)
    if json_:
        print(json.dumps(rows))
        return
    table = Table()
    for name in ("party", "part", "state", "what"):
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("party", "part", "state", "what")))
    Console().print(table)


@deploy.command()
def down(folder: Annotated[Path, typer.Argument(help="What `deploy init` wrote.")]) -> None:
    """Stop every party of a trial."""
    from hansa.deploy.trial import down as stop_all

    stop_all(folder)


@deploy.command()
def start(party: Annotated[Path, typer.Argument(help="A party's folder.")]) -> None:
    """Run what one party has to run, until Ctrl-C or SIGTERM."""
    from hansa.deploy.supervisor import Supervisor

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    Supervisor(party).run()


@deploy.command("export")
def export_own(
    party: Annotated[Path, typer.Argument(help="The folder of a client's party.")],
    out: Annotated[Path, typer.Argument(help="The bundle to write.")],
    json_: Json = False,
) -> None:
    """Write the model that a client holds as a bundle, on the client's own machine."""
    from hansa.deploy.export import export as write_model

    digest = write_model(party, out).digest
    print(json.dumps({"bundle": str(out), "digest": digest}) if json_ else f"bundle: {out}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the demo's runs.")] = Path("runs"),
    seed: Annotated[int, typer.Option(help="Seed of all stages.", min=0)] = 0,
    json_: Json = False,
) -> None:
    """Take two small models from first idea to release: the shipped pipelines, made smaller."""
    from hansa.demo import demo as run_demo

    with _progress("") as progress, _told(progress):
        made = run_demo(output, seed, cli_pipeline.follow_stages(progress))
    if json_:
        print(json.dumps({"pipelines": [each.summary for each in made]}))
        return
    for each in made:
        cli_pipeline.show(each)


# Typer's own base of all usage errors; newer releases carry it inside, older ones take click's.
_UsageError: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")


_INTERRUPTED = 130  # what newer releases of Typer return after Ctrl-C


def main() -> None:
    """Run the command line; wrong input ends in status 2 and one line, never in a traceback."""
    try:
        status = app(standalone_mode=False)
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        _fail(f"{named}{error.strerror or error}", 1 if full else 2)
    except _UsageError as error:
        _fail(" ".join(error.format_message().split()))
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    if status == _INTERRUPTED:
        _fail(
            "stopped; the same command again, or train --resume RUN, goes on from here",
            1,
        )
    sys.exit(status or 0)


def _fail(line: str, status: int = 2) -> None:
    print(f"hansa: {line}", file=sys.stderr)
    sys.exit(status)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _watch(progress: Progress, label: str) -> Any:
    """Return a watch that moves one line of progress."""
    tasks: list[Any] = []

    def watch(run: Any, result: Any) -> None:
        if not tasks:
            tasks.append(progress.add_task(label, total=run.config.rounds, note=""))
        score = _perplexity(run, result) if run.config.text else _accuracy(result)
        what = "tokens" if run.config.text else "samples"
        speed = (
            f"{60 / result.seconds:.0f} rounds/min, {result.samples / result.seconds:.0f} {what}/s"
        )
        note = f"{score}{speed}, {result.engine}"
        progress.update(tasks[0], completed=result.number, note=note)

    return watch


def _accuracy(result: Any) -> str:
    tested = [scores["test"]["accuracy"] for scores in result.scores.values() if "test" in scores]
    return f"accuracy {sum(a / n for a, n in tested) / len(tested):.3f}, " if tested else ""


def _perplexity(run: Any, result: Any) -> str:
    """Return the mean over the leaves of one round, after the aggregation and after local steps."""
    from hansa.federation.history import perplexity

    tree, means = run.config.shape(), []
    for split in ("test", "test:trained"):
        losses = [
            scores[split]["loss"]
            for path, scores in result.scores.items()
            if split in scores and tree.is_leaf(path)
        ]
        if losses:
            mean = sum(perplexity(a / n) for a, n in losses) / len(losses)
            means.append(f"{mean:.2f}")
    return f"perplexity {' -> '.join(means)}, " if means else ""


def _print(summaries: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summaries[0]))
        return
    is_language = any("perplexity" in summary["metrics"] for summary in summaries)
    Console().print(_language_table(summaries) if is_language else _table(summaries))
    for summary in summaries:
        print(f"run: {summary['run']}")


def _table(summaries: list[dict[str, Any]]) -> Table:
    from hansa.report.sizes import size

    table = Table(caption="test accuracy over clients, last round; bytes of all encoded messages")
    for name in ("method", "accuracy", "std", "worst tenth", "up", "down", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for summary in summaries:
        accuracy = summary["metrics"].get("accuracy")
        scores = [f"{accuracy[key]:.3f}" if accuracy else "-" for key in _SCORES]
        table.add_row(
            summary["method"],
            *scores,
            size(summary["bytes"]["up"]),
            size(summary["bytes"]["down"]),
            f"{summary['seconds']:.1f}",
        )
    return table


def _language_table(summaries: list[dict[str, Any]]) -> Table:
    from hansa.report.sizes import size

    table = Table(
        caption="over leaves, each its own model on its own test text, last round; perplexity and "
        "bits per byte after the aggregation; bytes of all encoded messages"
    )
    # Broken by hand, so that the table fits 80 columns whole.
    columns = ["method", "perplexity", "std", "worst\ntenth", "after\nlocal\nsteps"]
    for name in (*columns, "bits\nper\nbyte", "bytes", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for summary in summaries:
        metrics = summary["metrics"]
        scores = [(metrics.get("perplexity"), key, 2) for key in _SCORES]
        scores.append((metrics.get("perplexity_after_local_steps"), "mean", 2))
        scores.append((metrics.get("bits_per_byte"), "mean", 3))
        table.add_row(
            summary["method"],
            *(f"{values[key]:.{digits}f}" if values else "-" for values, key, digits in scores),
            size(summary["bytes"]["up"] + summary["bytes"]["down"]),
            f"{summary['seconds']:.1f}",
        )
    return table


def _print_curation(summary: dict[str, Any]) -> None:
    if clients := summary.get("clients"):
        left_out = summary["excluded"]
        table = Table(
            caption=f"training examples kept by {', '.join(summary['by'])}, rule "
            f"{summary['rule']['kind']}; left out before: without an answer, or too long"
        )
        for name in ("client", "examples", "kept", "share", "left out before"):
            table.add_column(name, justify="left" if name == "client" else "right")
        for name, row in clients.items():
            numbers = str(row["samples"]), str(row["kept"]), f"{100 * row['share']:.1f} %"
            table.add_row(name, *numbers, str(sum(left_out[name].values())))
        Console().print(table)
    if rules := summary.get("rules"):
        table = Table(caption="against the labels; clean examples are what is looked for")
        for name in ("rule", "precision", "recall", "F1"):
            table.add_column(name, justify="left" if name == "rule" else "right")
        for rule, row in rules.items():
            table.add_row(rule, *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")))
        Console().print(table)
    for name, row in summary.get("test_loss", {}).items():
        print(f"test loss, trained on {name}: {row['mean']:.4f}")
    print(f"curation: {summary['path']}")
    if summary["report"]:
        print(f"report: {summary['report']}")


def _print_comparison(found: Any) -> None:
    from hansa.report.sizes import size

    measure, reference = found.measure, next(iter(found.rows))
    against = {pair.second: pair for pair in found.pairs if pair.first == reference}
    test = f"with the p-value of a paired test over all {measure.over} (see the report)"
    more: list[str] = []
    if measure.key == "accuracy":
        caption = (
            "test accuracy, mean and standard deviation over seeds; difference to "
            f"{reference} in points, {test}"
        )
    else:
        more = ["perplexity_after_local_steps", "bits_per_byte"]
        caption = (
            "each leaf's own model on its own test text, last round: mean and standard deviation "
            "over seeds, after the aggregation where nothing else is said; lower is better; "
            f"difference to {reference}, {test}"
        )
    table = Table(caption=caption)
    keys = [measure.key, *(more or ["worst_tenth"])]
    for key in ("method", *keys, f"- {reference}", "p", "bytes"):
        # Two columns stay whole where the others break their lines in 80 columns.
        name = key.removeprefix("perplexity_").replace("_", "\n" if more else " ")
        whole = bool(more) and key in ("method", measure.key)
        side: Any = "left" if key == "method" else "right"
        table.add_column(name, justify=side, no_wrap=whole)
    for label, row in found.rows.items():
        pair = against.get(label)
        table.add_row(
            label,
            *(measure.spread(row[key]) for key in keys),
            measure.difference(-pair.difference) if pair else "",
            f"{pair.p:.3f}" if pair else "",
            size(row["bytes"]),
        )
    Console().print(table)


_SCORES = ("mean", "std", "worst_tenth")


if __name__ == "__main__":
    main()

"""The page about a pipeline: its line of stages, drawn, and the page of each stage within it."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from hansa.errors import InputError
from hansa.report.line import Stop, draw
from hansa.report.lineage import lineage
from hansa.report.page import write_page
from hansa.report.parts import Part, plot, table

Stage = Mapping[str, Any]
_REFERENCE = re.compile(r'\b(id|aria-labelledby|aria-describedby)="|\b(href)="#|url\(#')
_HEADING = re.compile(r"(</?h)([1-4])\b")
LEADING = {
    "search": ("Accuracy and cost", "Best so far"),
    "prune": ("Scores of weights", "Share of each"),
    "train": ("Test accuracy over", "Perplexity of every node over"),
    "personalise": ("Test accuracy over", "Test accuracy of every"),
    "curate": ("ifd", "perplexity", "Share of its examples"),
    "safeguard": ("Resistance", "What is kept"),
    "redteam": ("Recovered, worst case",),
    "audit": ("Dose and response",),
}
"""Kind of a stage -> how the titles of plots begin of which the first found says most about it."""
_FIGURE = re.compile(r'<figure role="group" aria-label="([^"]*)">.*?</figure>', re.DOTALL)
_TITLE = re.compile("<h2[^>]*>")
_SHORT = 12
"""Hexadecimal digits of a digest that are shown where it has to be short."""


def report(folder: Path) -> Path:
    """Write one self-contained HTML page about a pipeline, finished or not, and return its path.

    Args:
        folder: the pipeline's, with its ``pipeline.json``.

    Raises:
        InputError: no pipeline there, one of another format, or a page that cannot be written.
    """
    told = read(folder)
    stages: list[Stage] = told["stages"]
    done = sum(stage["state"] == "done" for stage in stages)
    pages = [_page(folder, stage) for stage in stages]
    bundles = [stage["bundle"] for stage in stages if stage["bundle"]]
    config = folder / "config.toml"
    return write_page(
        folder / "report.html",
        title=f"{told['name']}, pipeline",
        lead=f"{done} of {len(stages)} stages done, seed {told['seed']}",
        drawing=[_drawing(stages)],
        tables=[_table(stages), *(lineage(folder / bundles[-1]) if bundles else [])],
        scored=[],
        plots=[],
        glance=_glance(stages, pages),
        stages=[
            _embedded(number, stage, page)
            for number, (stage, page) in enumerate(zip(stages, pages, strict=True))
        ],
        configurations=[("pipeline", config.read_text())] if config.is_file() else [],
    )


def read(folder: Path) -> dict[str, Any]:
    """Return what a pipeline says of itself.

    Raises:
        InputError: no pipeline there, or one of another format.
    """
    path = folder / "pipeline.json"
    try:
        told = json.loads(path.read_text())
        known = told["format"] == 1 and isinstance(told["stages"], list)
        keys = {"name", "kind", "state", "folder", "start", "bundle", "digest", "report", "seconds"}
        known = known and all(keys <= set(stage) for stage in told["stages"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(str(path), f"no pipeline ({error})", "that of a pipeline") from error
    if not known:
        raise InputError(str(path), "another format", "format 1")
    return dict(told)


def _drawing(stages: Sequence[Stage]) -> Part:
    title = "The line of stages"
    stops = []
    for stage in stages:
        lines = [_called(stage), _state(stage)]
        if stage["digest"]:
            lines.append(f"bundle {stage['digest'][:_SHORT]}")
        for label, text in (stage.get("figures") or {}).items():
            lines.append(f"{label}: {text}")
        stops.append(Stop(stage["name"], tuple(lines), stage["start"], stage["state"]))
    caption = (
        "From top to bottom in the order in which stages are done. An arrow leads from the stage "
        "whose bundle one starts from. A bold frame: under way; a dashed one: still waiting."
    )
    return plot(title, caption, draw(stops, title))


def _table(stages: Sequence[Stage]) -> Part:
    rows = [
        [
            stage["name"],
            stage["kind"],
            stage["state"],
            "-" if stage["seconds"] is None else f"{stage['seconds']:.1f}",
            stage["start"] or "-",
            (stage["digest"] or "-")[:_SHORT],
            "; ".join(f"{k}: {v}" for k, v in (stage.get("figures") or {}).items()) or "-",
        ]
        for stage in stages
    ]
    columns = ["stage", "kind", "state", "seconds", "starts from", "bundle", "figures"]
    note = "Seconds are those of the attempt that came to the stage's end. A bundle is named by "
    note += f"the first {_SHORT} digits of its digest."
    return table("Stages", columns, rows, note, words=True)


def _page(folder: Path, stage: Stage) -> str:
    """Return what stands on a stage's own page, as far as there is one."""
    try:
        text = (folder / stage["report"]).read_text() if stage["report"] else ""
    except OSError:
        text = ""
    return text.partition("<body>")[2].rpartition("</body>")[0]


def _glance(stages: Sequence[Stage], pages: Sequence[str]) -> list[Markup]:
    """Return the leading plot of every stage that has one."""
    leading = []
    for number, (stage, page) in enumerate(zip(stages, pages, strict=True)):
        figures = [(found[1], found[0]) for found in _FIGURE.finditer(page)]
        for start in LEADING.get(stage["kind"], ()):
            drawn = next((text for title, text in figures if title.startswith(start)), None)
            if drawn:
                (tag, *_) = _TITLE.findall(drawn)
                drawn = drawn.replace(tag, f"{tag}{escape(stage['name'])}: ", 1)
                leading.append(_ours(_within(drawn, f"glance-{number}-", 1)))
                break
    return leading


def _embedded(number: int, stage: Stage, page: str) -> Part:
    """Return a stage's title and its own page, as far as there is one, as a part of this one."""
    title = f"{_called(stage)}: {_state(stage)}"
    content = Markup("<p>It has no page of its own{}.</p>").format(
        "" if stage["state"] == "done" else " yet"
    )
    if stage["report"]:
        link = Markup('<p><a href="{}">The page of this stage alone</a></p>').format(
            stage["report"]
        )
        content = link + _ours(_within(page, f"stage-{number}-"))
    return {"title": title, "content": content}


def _ours(page: str) -> Markup:
    # What a stage wrote is a page by the same template, its values escaped when it was filled.
    return Markup(page)  # noqa: S704 # nosec B704 # as the line above says


def _within(body: str, prefix: str, lower: int = 2) -> str:
    """Return a page's content with names of its own and with headings of a lower level."""
    body = re.sub("</?main>", "", body)
    body = _REFERENCE.sub(lambda found: found.group() + prefix, body)
    return _HEADING.sub(lambda found: f"{found[1]}{int(found[2]) + lower}", body)


def _called(stage: Stage) -> str:
    named = stage["name"]
    return named if named == stage["kind"] else f"{named} ({stage['kind']})"


def _state(stage: Stage) -> str:
    seconds = stage["seconds"]
    return stage["state"] if seconds is None else f"{stage['state']}, {seconds:.1f} s"

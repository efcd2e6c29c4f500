"""What commands of the command line share."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def progress(unit: str = "round") -> Progress:
    """Return lines of progress, which a terminal shows and nothing else."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(24),
        TextColumn(unit + " {task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@contextmanager
def told(shown: Progress) -> Iterator[None]:
    """Show what Hansa logs above the progress."""
    level = logging.INFO if shown.console.is_terminal else logging.WARNING
    handler = RichHandler(level, shown.console, show_time=False, show_path=False)
    logger = logging.getLogger("hansa")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)

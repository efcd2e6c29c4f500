"""What commands of the command line share."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from typer.core import TyperGroup


class WithDefault(TyperGroup):
    """A group whose first argument may be a configuration in the place of a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put ``run`` before arguments that begin with no command of the group."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


class _Count(ProgressColumn):
    """How much is done, and of how much where that is known already."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """Return one task's count."""
        total = "?" if task.total is None else f"{task.total:.0f}"
        return Text(f"{self._unit} {task.completed:.0f}/{total}")


def progress(unit: str = "round") -> Progress:
    """Return lines of progress, which a terminal shows and nothing else."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(24),
        _Count(unit),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def follow(shown: Progress, what: str) -> Callable[[int, int], None]:
    """Return what a function tells how much is done, and of how much, shown on one line."""
    task = shown.add_task(what, total=None, note="")
    return lambda done, total: shown.update(task, completed=done, total=total)


def follow_all(shown: Progress) -> Callable[[str, int, int], None]:
    """Return the same for a function that does several things, each shown on a line of its own."""
    tasks: dict[str, Callable[[int, int], None]] = {}

    def watch(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = follow(shown, what)
        tasks[what](done, total)

    return watch


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

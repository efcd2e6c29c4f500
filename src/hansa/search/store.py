"""A table while it is made: an SQLite file that is queue and store at once.

One row per (recipe, model, seed). A worker claims a row by one conditional update and holds it by
a lease that it renews; what a killed worker held is claimed again once its lease is over, or at
once where its process is known to be gone. A finished row is written in one transaction.
"""

import json
import math
import os
import platform
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from time import time
from typing import Any

from hansa.alive import is_alive
from hansa.errors import InputError, first_line
from hansa.search.recipes import Recipe
from hansa.search.training import Curves
from hansa.untrusted import json_of

Job = tuple[int, int]
"""A model's number and a seed."""
LEASE = 600.0
"""Seconds that a claim holds without being renewed."""

_LONGEST = 1 << 26
"""Bytes of one value in a file that is only read."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS recipes (name TEXT PRIMARY KEY, digest TEXT, description TEXT);
CREATE TABLE IF NOT EXISTS runs (
    recipe TEXT, model INTEGER, seed INTEGER, position INTEGER,
    status TEXT, worker TEXT, lease REAL, curves TEXT,
    PRIMARY KEY (recipe, model, seed)
);
CREATE INDEX IF NOT EXISTS waiting ON runs (status, recipe, position);
"""


class Store:
    """The runs and profiles of a table that is being made.

    Args:
        path: the file, made where it is not there.
        read_only: whether nothing in the file is to change; then it must be there.

    Raises:
        InputError: a file that is no such table.
    """

    def __init__(self, path: str | Path, read_only: bool = False) -> None:
        self.path = Path(path)
        self._read_only = read_only
        self.worker = f"{platform.node()}:{os.getpid()}"
        if not self.path.parent.is_dir():
            raise InputError("TABLE", f"no folder {self.path.parent}", "a folder that is there")
        if self.path.exists() and not self.path.is_file():  # a pipe would be waited for
            raise InputError("TABLE", f"{path}, which is no ordinary file", "a table's SQLite file")
        try:
            with self._open() as file:
                if read_only:
                    _check_tables(file)
                    file.execute("SELECT name, digest, description FROM recipes LIMIT 1")
                else:
                    file.execute("PRAGMA journal_mode=WAL")
                    file.executescript(_SCHEMA)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise InputError("TABLE", f"{path} ({error})", "a table's SQLite file") from error

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection whose changes are one transaction: never kept over a fork."""
        mode = "ro" if self._read_only else "rwc"
        address = f"{self.path.absolute().as_uri()}?mode={mode}"
        with closing(sqlite3.connect(address, timeout=60, uri=True)) as file, file:
            if self._read_only:  # it may come from elsewhere
                file.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
                file.execute("PRAGMA trusted_schema=OFF")
                file.execute("PRAGMA cell_size_check=ON")
            yield file

    def add_recipe(self, recipe: Recipe) -> None:
        """Note by which recipe rows are made.

        Raises:
            InputError: rows of this name were made by other values.
        """
        with self._open() as file:
            row = (recipe.name, recipe.digest, recipe.model_dump_json())
            file.execute("INSERT OR IGNORE INTO recipes VALUES (?, ?, ?)", row)
            found = file.execute("SELECT digest FROM recipes WHERE name = ?", row[:1]).fetchone()[0]
        if found != recipe.digest:
            key, allowed = f"recipe {recipe.name}", "the recipe it was begun with, or a new file"
            raise InputError(key, f"a table made by other values ({found})", allowed)

    def recipe(self, name: str | None = None) -> Recipe:
        """Return the recipe of this name, by default the only one.

        Raises:
            InputError: there is none, or more than one and no name.
        """
        with self._told(), self._open() as file:
            rows = file.execute("SELECT name, description FROM recipes").fetchall()
            found = {str(known): description for known, description in rows}
            if name is None and len(found) == 1:
                name = next(iter(found))
            if name is None or name not in found:
                raise InputError("recipe", name or "no name", ", ".join(found) or "an empty table")
            return Recipe.model_validate(json_of(found[name]))

    def add(self, recipe: Recipe, jobs: Iterable[Job]) -> int:
        """Put runs into the queue, in this order, and return how many were new."""
        self.add_recipe(recipe)
        with self._open() as file:
            before, first = file.execute("SELECT COUNT(*), MAX(position) FROM runs").fetchone()
            rows = (
                (recipe.name, int(model), int(seed), position, "waiting")
                for position, (model, seed) in enumerate(jobs, (first or 0) + 1)
            )
            statement = "INSERT OR IGNORE INTO runs (recipe, model, seed, position, status)"
            file.executemany(f"{statement} VALUES (?, ?, ?, ?, ?)", rows)
            after: int = file.execute("SELECT COUNT(*) FROM runs").fetchone()[0]
        return after - int(before)

    def release(self) -> int:
        """Give back what processes of this machine claimed that are gone; return how many."""
        given = 0
        with self._open() as file:
            claimed = "SELECT DISTINCT worker FROM runs WHERE status = 'claimed'"
            for (worker,) in file.execute(claimed).fetchall():
                host, _, process = worker.rpartition(":")
                if host == platform.node() and not is_alive(int(process)):
                    free = "UPDATE runs SET status = 'waiting' WHERE status = 'claimed'"
                    given += file.execute(f"{free} AND worker = ?", (worker,)).rowcount
        return given

    def claim(self, recipe: str) -> Job | None:
        """Return a run that is this process's to do, or None where all are done or claimed."""
        values = {"now": time(), "until": time() + LEASE, "worker": self.worker, "recipe": recipe}
        statement = """
            UPDATE runs SET status = 'claimed', worker = :worker, lease = :until
            WHERE rowid = (
                SELECT rowid FROM runs WHERE recipe = :recipe
                AND (status = 'waiting' OR (status = 'claimed' AND lease < :now))
                ORDER BY position LIMIT 1
            )
            RETURNING model, seed
        """
        with self._open() as file:
            found = file.execute(statement, values).fetchall()
        return (found[0][0], found[0][1]) if found else None

    @contextmanager
    def held(self, recipe: str, job: Job) -> Iterator[None]:
        """Renew a claim again and again until the block ends."""
        over = threading.Event()

        def renew() -> None:
            statement = "UPDATE runs SET lease = ? WHERE recipe = ? AND model = ? AND seed = ?"
            while not over.wait(LEASE / 4):
                with self._open() as file:
                    values = (time() + LEASE, recipe, *job, self.worker)
                    file.execute(f"{statement} AND worker = ?", values)

        beat = threading.Thread(target=renew, daemon=True)
        beat.start()
        try:
            yield
        finally:
            over.set()
            beat.join()

    def give_back(self, recipe: str, job: Job) -> None:
        """Let others, or this process again, claim a run that was not finished."""
        with self._open() as file:
            statement = "UPDATE runs SET status = 'waiting' WHERE recipe = ? AND model = ?"
            where = "AND seed = ? AND worker = ? AND status = 'claimed'"
            file.execute(f"{statement} {where}", (recipe, *job, self.worker))

    def finish(self, recipe: str, job: Job, curves: Curves) -> None:
        """Keep what a run gave. Who comes second, after a lease that was over, changes nothing."""
        with self._open() as file:
            statement = "UPDATE runs SET status = 'done', lease = NULL, curves = ?"
            where = "WHERE recipe = ? AND model = ? AND seed = ? AND status != 'done'"
            file.execute(f"{statement} {where}", (_text(curves), recipe, *job))

    def progress(self, recipe: str) -> tuple[int, int]:
        """Return how many runs are done, and how many there are."""
        with self._open() as file:
            statement = "SELECT SUM(status = 'done'), COUNT(*) FROM runs WHERE recipe = ?"
            done, total = file.execute(statement, (recipe,)).fetchone()
        return done or 0, total

    def runs(self, recipe: str) -> Iterator[tuple[int, int, Curves]]:
        """Yield model, seed and curves of what is done, in the order of models and seeds."""
        with self._told(), self._open() as file:
            statement = "SELECT model, seed, curves FROM runs WHERE recipe = ? AND status = 'done'"
            for model, seed, text in file.execute(f"{statement} ORDER BY model, seed", (recipe,)):
                yield model, seed, _curves(text)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Put into words what is wrong with a file that is no table after all.

        Raises:
            InputError: naming the file.
        """
        try:
            yield
        except InputError:
            raise
        except (sqlite3.Error, ValueError, TypeError, AttributeError) as error:
            found = f"{self.path} ({first_line(error)})"
            raise InputError("TABLE", found, "a table's SQLite file") from error

    def at_epoch(self, recipe: str, epoch: int) -> list[int]:
        """Return the validation samples right after an epoch in all finished runs so far."""
        path = f"$.validation_correct[{epoch - 1}]"
        with self._open() as file:
            statement = "SELECT json_extract(curves, ?) FROM runs WHERE recipe = ?"
            found = file.execute(f"{statement} AND status = 'done'", (path, recipe)).fetchall()
        return [value for (value,) in found if value is not None]


def _check_tables(file: sqlite3.Connection) -> None:
    """Refuse a file whose tables are views: what is asked of these may never come to an end.

    Raises:
        DatabaseError: naming one.
    """
    found = dict(file.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'"))
    for name in ("recipes", "runs"):
        told = str(found.get(name, "")).upper()
        if not told.startswith("CREATE TABLE") or " AS " in told:
            raise sqlite3.DatabaseError(f"no table {name}")


def _text(curves: Curves) -> str:
    """Return curves as JSON, which has no nan: a loss of a run that diverged is null."""
    values = {
        name: [None if each != each else each for each in value] if type(value) is list else value
        for name, value in asdict(curves).items()
    }
    return json.dumps(values)


def _curves(text: str) -> Curves:
    values: dict[str, Any] = {
        name: [math.nan if each is None else each for each in value]
        if type(value) is list
        else value
        for name, value in json_of(text).items()
    }
    return Curves(**values)

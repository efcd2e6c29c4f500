"""What lies in a folder of runs: training runs, pipelines, and what other stages made.

Everything here only reads. What it reads may be half written, since others are at work on it, or
come from a stranger: whatever cannot be read is listed as such, and nothing is trusted.
"""

import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hansa.errors import InputError
from hansa.report import figures
from hansa.runs import is_locked

MAX_DEPTH = 5
MAX_ENTRIES = 2000
_INNER = {"states", "parts", "bundle", "clients", "cells", "models", "curation", "blocks"}
"""Folders of a stage that hold no stage."""
_SHOWN_ELSEWHERE = {"method", "messages", "model"}


@dataclass(frozen=True)
class Entry:
    """One run, pipeline, or other stage.

    Attributes:
        path: relative to the shelf's folder, with ``/``; it is what requests name it by.
        name: the last part of it.
        kind: ``train``, ``pipeline``, ``search``, ``prune``, ``curate``, ``safeguard``,
            ``redteam``, ``audit``, or ``page`` (a report with nothing beside it that is known).
        method: what it did it by, where there are several ways.
        state: ``done``, ``running``, ``stopped`` or ``unreadable``.
        done: rounds, or stages of a pipeline, that are done; None where they are not counted.
        total: of how many.
        result: headline figures, in words.
        bytes: of all messages.
        changed: when it was last written, in seconds since 1970.
        report: path of its page, relative to the shelf's folder.
        within: path of the pipeline that it is a stage of.
    """

    path: str
    name: str
    kind: str
    method: str = ""
    state: str = "done"
    done: int | None = None
    total: int | None = None
    result: str = ""
    bytes: int | None = None
    changed: float = 0.0
    report: str | None = None
    within: str | None = None


class Shelf:
    """A folder of runs.

    Attributes:
        folder: the folder, without symbolic links in its path.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a folder.

        Raises:
            InputError: no folder there.
        """
        try:
            self.folder = Path(folder).resolve(strict=True)
        except OSError as error:
            raise InputError(str(folder), f"no folder ({error.strerror})", "a folder") from error
        if not self.folder.is_dir():
            raise InputError(str(folder), "a file", "a folder of runs")
        self._kept: dict[str, tuple[object, Entry]] = {}

    def find(self, path: str) -> Path:
        """Return what a request names.

        Raises:
            InputError: anything that is not below the folder, symbolic links followed, or is not
                there; and names that begin with a dot.
        """
        parts = path.split("/")
        wrong = InputError(path, "nothing there", "the path of a run")
        if any(part == "" or part.startswith(".") for part in parts):
            raise wrong
        if any(ch in path for ch in ("\\", "\0")):
            raise wrong
        try:
            found = self.folder.joinpath(*parts).resolve(strict=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise wrong from error
        if not found.is_relative_to(self.folder):
            raise wrong
        return found

    def entry(self, path: str) -> Entry:
        """Return one entry by its path.

        Raises:
            InputError: no entry there.
        """
        folder = self.find(path)
        kind = _kind(folder) if folder.is_dir() else None
        if kind is None:
            raise InputError(path, "nothing there", "the path of a run")
        return self._read(folder, kind, self._pipeline_above(folder))

    def entries(self) -> list[Entry]:
        """Return all entries, those that changed last first."""
        found = []
        for folder, kind, within in self._walk(self.folder, 0, None):
            found.append(self._read(folder, kind, within))
            if len(found) == MAX_ENTRIES:
                break
        return sorted(found, key=lambda entry: (-entry.changed, entry.path))

    def _walk(
        self, folder: Path, depth: int, within: str | None
    ) -> Iterator[tuple[Path, str, str | None]]:
        kind = _kind(folder)
        if kind is not None and folder != self.folder:
            yield folder, kind, within
            if kind == "train":
                return
            if kind == "pipeline":
                within = self._relative(folder)
        if depth == MAX_DEPTH:
            return
        try:
            below = sorted(
                entry.name
                for entry in os.scandir(folder)
                if entry.is_dir(follow_symlinks=False)
                and not entry.name.startswith(".")
                and entry.name not in _INNER
            )
        except OSError:
            return
        for name in below:
            yield from self._walk(folder / name, depth + 1, within)

    def _read(self, folder: Path, kind: str, within: str | None) -> Entry:
        """Return what is known of an entry, read again only where it has changed."""
        path, locked = self._relative(folder), is_locked(folder)
        files = [folder / name for name in _STATED]
        stamps = [_stamp(file) for file in files]
        key = (kind, within, locked, *stamps)
        held = self._kept.get(path)
        if held is not None and held[0] == key:
            return held[1]
        page = folder / "report.html"
        values: dict[str, Any] = {}
        try:
            values = _READERS[kind](folder)
            state = "done" if values.pop("finished") else "running" if locked else "stopped"
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            state = "running" if locked else "unreadable"
            values = {}
        entry = Entry(
            path=path,
            name=folder.name,
            kind=kind,
            state="running" if locked else state,
            changed=(max(stamps) or _stamp(folder)) / 1e9,
            report=self._relative(page) if page.is_file() and not page.is_symlink() else None,
            within=within,
            **values,
        )
        self._kept[path] = (key, entry)
        return entry

    def _pipeline_above(self, folder: Path) -> str | None:
        for above in folder.parents:
            if not above.is_relative_to(self.folder) or above == self.folder:
                return None
            if (above / "pipeline.json").is_file():
                return self._relative(above)
        return None

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


_MARKS = {
    "pipeline.json": "pipeline",
    "checkpoint.json": "train",
    "steps.json": "curate",
    "scorecard.json": "redteam",
    "cells": "redteam",
    "models.json": "safeguard",
    "audit.json": "audit",
    "results.jsonl": "audit",
    "search.json": "search",
    "table.sqlite": "search",
}
"""File of a folder -> what made it."""
_STATED = (
    *("pipeline.json", "checkpoint.json", "summary.json", "steps.json", "scorecard.json"),
    *("models.json", "audit.json", "results.jsonl", "search.json", "table.sqlite"),
    *("config.toml", "report.html"),
)
"""Files whose change is a change of the entry."""


def _kind(folder: Path) -> str | None:
    try:
        held = {entry.name for entry in os.scandir(folder)}
    except OSError:
        return None
    for mark, kind in _MARKS.items():
        if mark in held:
            return kind
    if {"summary.json", "bundle"} <= held:
        return "prune"
    return "page" if "report.html" in held else None


def _stamp(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _train(folder: Path) -> dict[str, Any]:
    config, checkpoint = _config(folder), _json(folder / "checkpoint.json")
    rounds = int(config.get("rounds", 0))
    values: dict[str, Any] = {
        "method": str(config.get("method", {}).get("name", "")),
        "done": int(checkpoint["round"]),
        "total": rounds,
        "finished": False,
    }
    if (folder / "summary.json").is_file():
        summary = _json(folder / "summary.json")
        values |= {"finished": True, "result": _words(figures.of_run(summary))}
        values["bytes"] = int(summary["bytes"]["up"]) + int(summary["bytes"]["down"])
    return values


def _pipeline(folder: Path) -> dict[str, Any]:
    told = _json(folder / "pipeline.json")
    stages = told["stages"]
    done = [stage for stage in stages if stage["state"] == "done"]
    last = done[-1] if done else {}
    words = _words(last.get("figures") or {})
    return {
        "finished": bool(told["finished"]),
        "done": len(done),
        "total": len(stages),
        "result": f"{last['name']}: {words}" if words else "",
    }


def _stage(
    file: str, of: Callable[[Mapping[str, Any]], dict[str, str]], method: str = ""
) -> Callable[[Path], dict[str, Any]]:
    """Return a reader of a stage that writes one file of results when it ends."""

    def read(folder: Path) -> dict[str, Any]:
        if not (folder / file).is_file():
            return {"finished": False}
        told = _json(folder / file)
        by = str(told.get(method, "")) if method else ""
        return {"finished": True, "method": by, "result": _words(of(told))}

    return read


_READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "train": _train,
    "pipeline": _pipeline,
    "search": _stage("search.json", figures.of_search, "searcher"),
    "prune": _stage("summary.json", figures.of_prune, "method"),
    "curate": _stage("summary.json", figures.of_curation),
    "safeguard": _stage("summary.json", figures.of_safeguard),
    "redteam": _stage("scorecard.json", figures.of_redteam),
    "audit": _stage("audit.json", figures.of_audit),
    "page": lambda folder: {"finished": True},
}


def _words(told: Mapping[str, Any]) -> str:
    """Return the first two figures that have no column of their own, in words."""
    kept = [f"{key} {value}" for key, value in told.items() if key not in _SHOWN_ELSEWHERE]
    return "; ".join(kept[:2])


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _config(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "config.toml").read_text())

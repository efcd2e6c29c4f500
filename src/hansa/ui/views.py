"""What requests are answered with: JSON values about the entries of a shelf."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hansa.errors import InputError
from hansa.report.pipeline import read
from hansa.runs import Run
from hansa.ui.shelf import Entry, Shelf
from hansa.ui.watched import (
    MAX_COMPARED,
    MAX_KEPT,
    Watched,
    differences,
    labels,
    plots,
    summaries,
)

_LARGEST = 200_000
"""Bytes of a configuration that are shown."""


class Views:
    """Answers about one shelf."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf, self._watched = shelf, Watched()
        self._made: dict[tuple[str, ...], tuple[list[Run], dict[str, Any]]] = {}

    def runs(self) -> dict[str, Any]:
        """Return all entries."""
        entries = [asdict(entry) for entry in self.shelf.entries()]
        return {"folder": self.shelf.folder.name, "runs": entries}

    def run(self, path: str) -> dict[str, Any]:
        """Return one entry with what it has measured so far.

        Raises:
            InputError: nothing there, or a run that cannot be read.
        """
        entry = self.shelf.entry(path)
        folder = self.shelf.find(path)
        told: dict[str, Any] = {"run": asdict(entry), "plots": [], "tables": [], "problem": ""}
        config = folder / "config.toml"
        if config.is_file() and not config.is_symlink():
            told["config"] = config.read_bytes()[:_LARGEST].decode(errors="replace")
        try:
            if entry.kind == "train":
                told |= self._measured({entry.name: self._watched.open(folder)}, [path])
            elif entry.kind == "pipeline":
                told["tables"] = [self._stages(entry)]
        except InputError as error:
            told["problem"] = str(error)
        return told

    def compare(self, paths: Sequence[str]) -> dict[str, Any]:
        """Return training runs side by side.

        Raises:
            InputError: fewer than two runs, too many, or one that is none of training.
        """
        chosen = list(dict.fromkeys(paths))
        if not 2 <= len(chosen) <= MAX_COMPARED:
            raise InputError("run", f"{len(chosen)} runs", f"2 to {MAX_COMPARED} of them")
        runs = {}
        for label, path in zip(labels(chosen), chosen, strict=True):
            if self.shelf.entry(path).kind != "train":
                raise InputError(path, "no training run", "training runs")
            runs[label] = self._watched.open(self.shelf.find(path))
        told = self._measured(runs, chosen)
        different = differences({label: run.config for label, run in runs.items()})
        entries = [asdict(self.shelf.entry(path)) for path in chosen]
        return {**told, "runs": entries, "tables": [*told["tables"], different]}

    def _measured(self, runs: Mapping[str, Run], paths: Sequence[str]) -> dict[str, Any]:
        """Return plots and a table of what runs have measured; made again where that changed."""
        key, opened = tuple(paths), list(runs.values())
        held = self._made.get(key)
        if held is not None and all(a is b for a, b in zip(held[0], opened, strict=True)):
            return held[1]
        measured = {label: run for label, run in runs.items() if run.history.num_rounds}
        made = {"plots": plots(measured), "tables": [summaries(measured)] if measured else []}
        if len(self._made) >= MAX_KEPT:
            self._made.clear()
        self._made[key] = opened, made
        return made

    def _stages(self, entry: Entry) -> dict[str, Any]:
        """Return a table of a pipeline's stages, whose first cells name their entries."""
        rows, places = [], []
        for stage in read(self.shelf.find(entry.path))["stages"]:
            path = f"{entry.path}/{stage['folder']}" if stage["folder"] else ""
            progress = ""
            try:
                inner = self.shelf.entry(path) if path else None
            except InputError:
                inner = None
            if inner is not None and inner.done is not None:
                progress = f"{inner.done} of {inner.total}"
            seconds = "" if stage["seconds"] is None else f"{stage['seconds']:.1f}"
            told = stage.get("figures") or {}
            words = "; ".join(f"{label} {text}" for label, text in told.items())
            digest = (stage["digest"] or "")[:12]
            row = [stage["name"], stage["kind"], stage["state"], progress, seconds, digest, words]
            rows.append(row)
            places.append(inner.path if inner is not None else "")
        columns = ["stage", "kind", "state", "rounds", "seconds", "bundle", "figures"]
        return {"title": "Stages", "columns": columns, "rows": rows, "paths": places}

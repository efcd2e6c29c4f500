"""Training runs as they go: tables that another process is adding to, and plots of them."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from hansa.config import RunConfig
from hansa.errors import InputError
from hansa.report.measure import measure_of, scored_by
from hansa.report.plots import lines
from hansa.report.sizes import size
from hansa.runs import Run

_DRAWING = threading.Lock()
"""Matplotlib is no place for two threads."""
MAX_COMPARED = 12
MAX_KEPT = 32
"""Runs that are kept in memory."""
Plot = dict[str, str]
Table = dict[str, Any]


class Watched:
    """Runs that were opened, each read again where its checkpoint has changed."""

    def __init__(self) -> None:
        self._runs: dict[Path, tuple[object, Run]] = {}
        self._lock = threading.Lock()

    def open(self, folder: Path) -> Run:
        """Return a run as of its last whole round.

        Raises:
            InputError: no run there, or none that can be read. One that is just gathering its
                tables is given as it was before, where it was read before.
        """
        with self._lock:
            held = self._runs.get(folder)
            stamp = tuple(
                (folder / name).stat().st_mtime_ns if (folder / name).is_file() else 0
                for name in ("checkpoint.json", "summary.json", "config.toml")
            )
            if held is not None and held[0] == stamp:
                return held[1]
            try:
                run = Run(folder)
            except InputError:
                if held is None:
                    raise
                return held[1]
            self._runs.pop(folder, None)
            self._runs[folder] = (stamp, run)
            if len(self._runs) > MAX_KEPT:
                self._runs.pop(next(iter(self._runs)))
            return run


def plots(runs: Mapping[str, Run]) -> list[Plot]:
    """Return learning curves and bytes of runs over their rounds, label -> run, as SVG."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    traffic: dict[str, list[tuple[float, float]]] = {}
    for label, run in runs.items():
        key = measure_of(run.config).key
        scored = scored_by(run, "test", key)
        if points := [(float(n), mean(row.values())) for n, row in sorted(scored.items()) if row]:
            curves.setdefault(key, {})[label] = points
        total = 0
        for number, (up, down) in sorted(run.history.bytes().items()):
            total += up + down
            traffic.setdefault(label, []).append((number, float(total)))
    made = []
    with _DRAWING:
        for key, series in curves.items():
            title = f"Test {key} over rounds"
            share = key == "accuracy"
            svg = lines(series, title=title, x="round", y=key, percent=share, log=not share)
            over = "clients" if share else "leaves, on a logarithmic axis"
            made.append({"title": title, "caption": f"Mean over {over}.", "svg": svg})
        if traffic:
            title = "Bytes over rounds"
            svg = lines(traffic, title=title, x="round", y="bytes so far", bytes_=True)
            caption = "Messages up and down together, summed from the first round on."
            made.append({"title": title, "caption": caption, "svg": svg})
    return made


def summaries(runs: Mapping[str, Run]) -> Table:
    """Return a table of what runs have measured so far, label -> run."""
    rows = []
    for label, run in runs.items():
        summary = run.history.summary()
        measure = measure_of(run.config)
        values = summary["metrics"].get(measure.key)
        row = [label, run.config.method.name, f"{run.round} of {run.config.rounds}"]
        row += [f"{measure.key} {measure.spread(values)}" if values else "-"]
        worst = values and f"{measure.scale * values['worst_tenth']:.{measure.digits}f}"
        row.append(f"{worst}{measure.unit}" if worst else "-")
        row += [size(summary["bytes"]["up"]), size(summary["bytes"]["down"])]
        rows.append([*row, f"{summary['seconds']:.1f}"])
    columns = ["run", "method", "rounds", "test, mean ± std over clients or leaves"]
    columns += ["worst tenth", "up", "down", "seconds"]
    return {"title": "Summaries", "columns": columns, "rows": rows}


def differences(configs: Mapping[str, RunConfig]) -> Table:
    """Return a table of the configuration keys in which runs differ, label -> configuration."""
    flat = {label: _flat(config.as_dict()) for label, config in configs.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    rows = []
    for key in keys:
        row = [flat[label].get(key, "-") for label in flat]
        if len(set(row)) > 1:
            rows.append([key, *row])
    return {"title": "Configuration differences", "columns": ["key", *flat], "rows": rows}


def labels(paths: Sequence[str]) -> list[str]:
    """Return the last parts of paths, or the paths where those are not all different."""
    names = [path.rpartition("/")[2] for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found

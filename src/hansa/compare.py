"""A grid of methods and seeds: run what is missing, in parallel, and compare."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hansa.config import RunConfig, load, override, read
from hansa.data.federate import FederatedData
from hansa.errors import InputError
from hansa.federation.methods import METHODS
from hansa.processes import pool
from hansa.report.comparison import Comparison
from hansa.runs import Run
from hansa.training import completed, is_completed, prepare

Watch = Callable[[int, int, Run], None]
"""Called with the number of finished runs, the number of all runs, and the newest."""


def compare(
    config: str | Path | Mapping[str, Any],
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    overrides: Iterable[str] = (),
    processes: int = 1,
    watch: Watch | None = None,
) -> Comparison:
    """Train every method on every seed, as far as that was not done before, and compare them.

    The runs stand in ``OUTPUT/NAME/LABEL-seedN``. Called again, a finished run is kept and an
    interrupted one goes on.

    Args:
        config: a TOML file or the values themselves. Beside what a run's configuration holds, it
            may have tables ``[methods.LABEL]``, each with options and a ``name``, by default
            LABEL: the methods to compare.
        methods: labels of those tables, or names of methods, which then have the options of
            ``[method]`` where they are that method or a variant of it (as the controls are of
            FedSelect), or else their defaults; by default all tables.
        seeds: seeds of the runs.
        overrides: ``key=value`` with dotted keys, applied to the configuration.
        processes: runs at the same time.
        watch: called whenever a run is finished.

    Raises:
        InputError: input that cannot be used, an earlier run of another configuration included.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError("--seeds", ", ".join(map(str, seeds)) or "nothing", "different seeds")
    if processes < 1:
        raise InputError("--processes", processes, "1 or more")
    grid, folder = _grid(config, methods, seeds, tuple(overrides))
    # One run of each method is prepared before any work, so that wrong input shows at once.
    todo: dict[str, RunConfig] = {}
    for (label, _), cell in grid.items():
        if not is_completed(cell):
            todo.setdefault(label, cell)
    data: dict[int, FederatedData] = {}
    for cell in todo.values():
        data[cell.seed] = prepare(cell, data.get(cell.seed)).data
    runs: dict[str, dict[int, Run]] = {}
    cells = [cell.as_dict() for cell in grid.values()]
    for done, ((label, seed), path) in enumerate(
        zip(grid, _paths(cells, processes), strict=True), 1
    ):
        run = runs.setdefault(label, {})[seed] = Run(path)
        if watch is not None:
            watch(done, len(grid), run)
    return Comparison(folder, runs)


def _paths(cells: Sequence[dict[str, Any]], processes: int) -> Iterator[Path]:
    """Yield the folders of the runs, each when it is finished, in their order."""
    if processes == 1:
        yield from map(_run, cells)
        return
    with pool(min(processes, len(cells))) as executor:
        yield from executor.map(_run, cells)


def _grid(
    config: str | Path | Mapping[str, Any],
    methods: Sequence[str],
    seeds: Sequence[int],
    overrides: tuple[str, ...],
) -> tuple[dict[tuple[str, int], RunConfig], Path]:
    values = dict(config) if isinstance(config, Mapping) else read(Path(config))
    for text in overrides:
        values = override(values, text)
        if text.partition("=")[0].strip() == "seed":
            raise InputError("--set", "seed", "--seeds")
    tables = values.pop("methods", {})
    if not isinstance(tables, Mapping) or not all(isinstance(t, Mapping) for t in tables.values()):
        raise InputError("methods", repr(tables), "tables [methods.LABEL]")
    labels = list(methods or tables)
    allowed = ", ".join([*tables, *METHODS])
    if not labels or len(set(labels)) < len(labels):
        raise InputError(
            "--methods", ", ".join(labels) or "nothing", f"different ones of {allowed}"
        )
    base = load(values)
    key, share = ("data", base.data.test) if base.text is None else ("text", base.text.test)
    if not share:
        raise InputError(f"{key}.test", share, "more than 0, to compare by")
    folder = Path(base.output) / base.name
    options = {key: value for key, value in values.get("method", {}).items() if key != "name"}
    grid = {}
    for label in labels:
        if label in tables:
            method = {"name": label, **tables[label]}
        elif label in METHODS:
            variant = issubclass(METHODS[label], type(base.method))
            method = {"name": label, **(options if variant else {})}
        else:
            raise InputError("--methods", repr(label), allowed)
        for seed in seeds:
            places = {"name": label, "output": str(folder), "seed": seed}
            grid[label, seed] = load({**base.as_dict(), **places, "method": method})
    return grid, folder


def _run(values: dict[str, Any]) -> Path:
    """Bring one run to its end, in a process of its own, and return its folder."""
    return completed(load(values))

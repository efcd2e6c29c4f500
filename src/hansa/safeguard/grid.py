"""A red team's grid: every attack at every rate and seed on every model, each done once.

A cell is one attack at one learning rate with one seed on one model, and one file. What it is
called and what stands in it tell all that its result depends on, so that a grid that was stopped
goes on, one that has grown repeats nothing, and no result takes the place of another.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hansa.errors import InputError
from hansa.files import write_atomic
from hansa.processes import one_thread, pool
from hansa.safeguard.attacks import Curve, Probe, attack, edited
from hansa.safeguard.models import load_model
from hansa.safeguard.redteam_options import UNTOUCHED, Attack, Edit, repeated
from hansa.safeguard.rows import Data, Part, Pool, Rows, check_disjoint
from hansa.safeguard.world import World

FORMAT = 1
"""Of cells; it changes where the same key would give other numbers."""
Watch = Callable[[str, int, int], None]
_MODELS = 2
"""Models that a process holds at once."""


@dataclass(frozen=True)
class Cell:
    """One attack on one model.

    Attributes:
        bundle: digest of the model's bundle.
        how: the attack or edit, None for the model as it is.
        lr: learning rate, None where nothing is trained.
        seed: of the attack.
    """

    bundle: str
    how: Attack | Edit | None = None
    lr: float | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """What the attack is called."""
        return UNTOUCHED if self.how is None else self.how.name

    @property
    def cost(self) -> int:
        """Rows that it trains on."""
        return self.how.steps * self.how.batch if isinstance(self.how, Attack) else 0


@dataclass(frozen=True)
class Found:
    """What an attack did.

    Attributes:
        cell: which it was.
        curve: what was measured on the way.
        diverged: whether a loss that was no number ended it.
    """

    cell: Cell
    curve: Curve
    diverged: bool = False


@dataclass(frozen=True)
class Bench:
    """All that cells have in common.

    Attributes:
        data: what is attacked with, and asked.
        paths: folder of each bundle, by digest.
        probes: steps after which a model under attack is asked.
        templates: prompts of the restricted questions; by default all there are.
        device: where models are attacked.
        unprotected: digest of the model without a safeguard, where there is one.
    """

    data: Data
    paths: Mapping[str, str]
    probes: Sequence[int]
    templates: Sequence[str] = ()
    device: str = "cpu"
    unprotected: str | None = None

    def key(self, cell: Cell) -> dict[str, Any]:
        """Return what a cell goes by, as JSON values: all that its result depends on."""
        about: list[object] = [FORMAT, self._fingerprint, list(self.templates)]
        if cell.how is not None:
            about.append(cell.how.model_dump(mode="json", exclude={"name", "roles", "lrs"}))
        if isinstance(cell.how, Attack):
            last = cell.how.steps
            about.append(sorted({step for step in self.probes if step < last} | {last}))
        elif cell.how is not None and cell.how.kind == "merge":
            about.append(self.unprotected)
        return {
            "bundle": cell.bundle,
            "attack": cell.name,
            "configuration": _digest(about),
            "lr": cell.lr,
            "seed": cell.seed,
        }

    @cached_property
    def _fingerprint(self) -> str:
        return self.data.fingerprint()


def cells_of(
    roles: Mapping[str, str],
    attacks: Sequence[Attack],
    edits: Sequence[Edit],
    seeds: Sequence[int],
) -> dict[str, list[Cell]]:
    """Return the cells of each role, that of the untouched model first.

    Args:
        roles: role -> digest of its bundle. Roles that share a bundle share its cells.
        attacks: those that train.
        edits: those that do not. Only noise is drawn by seed, and only where ``unprotected`` is
            among the roles is anything merged with it.
        seeds: of each attack.

    Raises:
        InputError: two attacks of one name, of which one would take the other's place, or a role
            that no model has.
    """
    if same := repeated(how.name for how in (*attacks, *edits)):
        twice = f"{same!r} as the name of two attacks"
        raise InputError("redteam.attacks", twice, "a name of its own for each")
    found: dict[str, list[Cell]] = {}
    for role, digest in roles.items():
        mine = found[role] = [Cell(digest)]
        for spec in attacks:
            if spec.is_for(role):
                mine += [Cell(digest, spec, lr, seed) for lr in spec.lrs for seed in seeds]
        for how in edits:
            apart = how.kind == "merge" and "unprotected" not in roles
            if how.is_for(role) and not apart:
                drawn = seeds if how.kind == "noise" else seeds[:1]
                mine += [Cell(digest, how, None, seed) for seed in drawn]
    return found


def check_parts(data: Data) -> None:
    """Refuse data of which defender, attacker and evaluation share any.

    Raises:
        InputError: naming two parts.
    """
    if isinstance(data, World):
        seen: dict[int, str] = {}
        for name, entities in data.parts.items():
            for entity in entities.tolist():
                if (other := seen.setdefault(entity, name)) != name:
                    found = f"an entity that {other} and {name} share"
                    raise InputError("data", found, "parts that share none")
        return
    parts: dict[str, Rows] = {"what is asked": data.questions()["restricted"].rows}
    shared: tuple[Part, ...] = ("forget", "attacker")
    for part in shared:
        source = data.source(part)
        if isinstance(source, Pool):
            parts[part] = source.rows
    check_disjoint(parts)


def run(
    cells: Iterable[Cell],
    bench: Bench,
    folder: Path,
    processes: int = 1,
    watch: Watch | None = None,
) -> dict[Cell, Found]:
    """Do all cells that are not there yet, and return what all of them found.

    Results depend neither on the number of processes nor on interruptions.

    Args:
        cells: what is to be done.
        bench: what they have in common.
        folder: the folder that holds a file for each; it is made.
        processes: cells at the same time, of one thread each.
        watch: called with what was done, how many are done, and of how many.

    Raises:
        InputError: a file that is no result of its cell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = list(dict.fromkeys(cells))
    found = {cell: done for cell in wanted if (done := _read(cell, bench, folder)) is not None}
    todo = sorted((c for c in wanted if c not in found), key=lambda cell: -cell.cost)
    for done in _worked(todo, bench, folder, processes):
        found[done.cell] = done
        if watch is not None:
            cell = done.cell
            rate = "" if cell.lr is None else f", rate {cell.lr:g}"
            watch(f"{cell.name}{rate}, seed {cell.seed}", len(found), len(wanted))
    return {cell: found[cell] for cell in wanted}


def _worked(todo: Sequence[Cell], bench: Bench, folder: Path, processes: int) -> Iterator[Found]:
    """Yield what cells found, as they are done."""
    if min(processes, len(todo)) <= 1:
        with one_thread():
            worker = _Worker(bench, folder)
            yield from map(worker.work, todo)
        return
    with pool(min(processes, len(todo)), _start, bench, folder) as executor:
        for future in as_completed([executor.submit(_work, cell) for cell in todo]):
            yield future.result()


@dataclass
class _Worker:
    """One process's models."""

    bench: Bench
    folder: Path
    _models: dict[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._probe = Probe(self.bench.data, self.bench.templates)

    def work(self, cell: Cell) -> Found:
        """Do a cell and write what it found."""
        model, bench, diverged = self._model(cell.bundle), self.bench, False
        if cell.how is None:
            curve = [self._probe(model, 0)]
        elif isinstance(cell.how, Edit):
            start = None
            if cell.how.kind == "merge" and bench.unprotected is not None:
                start = dict(self._model(bench.unprotected).named_parameters())
            curve = edited(model, cell.how, cell.seed, self._probe, start)
        else:
            if cell.lr is None:
                raise ValueError("an attack that trains has a rate")
            curve = attack(
                model, bench.data, cell.how, cell.lr, cell.seed, bench.probes, self._probe
            )
            diverged = not curve or curve[-1]["step"] < cell.how.steps
        about = {"key": bench.key(cell), "curve": curve, "diverged": diverged}
        write_atomic(_path(cell, bench, self.folder), json.dumps(about) + "\n")
        return Found(cell, curve, diverged)

    def _model(self, digest: str) -> nn.Module:
        if digest not in self._models:
            while len(self._models) >= _MODELS:
                del self._models[next(iter(self._models))]
            loaded = load_model(self.bench.paths[digest], self.bench.data.context)
            self._models[digest] = loaded.model.to(torch.device(self.bench.device))
        return self._models[digest]


_WORKERS: list[_Worker] = []


def _start(bench: Bench, folder: Path) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _WORKERS.append(_Worker(bench, folder))


def _work(cell: Cell) -> Found:
    return _WORKERS[0].work(cell)


def _path(cell: Cell, bench: Bench, folder: Path) -> Path:
    return folder / f"{cell.name}-{_digest(bench.key(cell))[:16]}.json"


def _read(cell: Cell, bench: Bench, folder: Path) -> Found | None:
    """Return what a cell found, None where it has not been done."""
    path = _path(cell, bench, folder)
    if not path.exists():
        return None
    try:
        about = json.loads(path.read_text())
        if about["key"] != bench.key(cell):
            raise ValueError("another cell's key")
        return Found(cell, about["curve"], about["diverged"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(str(path), f"no result of its cell ({error})", "nothing") from error


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

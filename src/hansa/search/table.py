"""A table of trained models: what each gave by seed and epoch, what it costs, how long it takes.

A table is arrays in memory, so that a question takes about a microsecond; ``tables.py`` reads
and writes its files.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hansa.errors import InputError
from hansa.models.blox_space import multiply_adds as multiply_adds_of
from hansa.models.blox_space import parameters as parameters_of
from hansa.search.columns import Columns
from hansa.search.recipes import Recipe
from hansa.search.select import pareto
from hansa.search.spaces import BLOX, Bools, Floats, Ints, Space
from hansa.search.training import Curves

BY_SEED = ("validation_accuracy", "test_accuracy", "train_seconds")
COSTS = ("parameters", "multiply_adds")
MOST_VALUES = 1 << 28
"""Most values by model, seed and epoch; twice that of all models of the original's three tables."""


@dataclass(frozen=True)
class Row:
    """One run of one model."""

    model: int
    seed: int
    curves: Curves


class Table:
    """Models and all that is known of them.

    Args:
        space: what the numbers of models mean.
        recipe: name of the recipe that models were trained by.
        models: numbers, each once, int64 [n].
        seeds: which seeds there are, in the order of the axis below.
        validation: accuracy after every epoch, [n, seeds, epochs], nan where a seed is missing or
            was stopped before; [n, seeds] where only the end is known.
        test: the same of the test samples.
        train_seconds: of all epochs, processor time, [n, seeds].
        parameters: [n].
        multiply_adds: [n].
        latencies: (device, batch) -> seconds, [n], nan where a model was not profiled.
        chosen: the epoch, from 0, that a run is reported by, int64 [n, seeds]; by default the first
            of the best validation accuracy.
        description: the recipe's values, where they are known.
        rows: the runs as they came; none of a table of others.
        profiles: the profiler's rows as they came.

    Attributes:
        space: as given, and so are ``recipe``, ``description``, ``rows`` and ``profiles``.
        models: ascending; every array of a column is in this order.
        seeds: as given.
        profiled: the devices and batches that latencies are known of.
        devices: the names among these.
    """

    def __init__(
        self,
        space: Space,
        recipe: str,
        models: Ints,
        seeds: Sequence[int],
        validation: Floats,
        test: Floats,
        train_seconds: Floats,
        parameters: Ints | Floats,
        multiply_adds: Ints | Floats,
        latencies: Mapping[tuple[str, int], Floats] | None = None,
        *,
        chosen: Ints | None = None,
        description: Recipe | None = None,
        rows: Sequence[Row] = (),
        profiles: Sequence[dict[str, Any]] = (),
    ) -> None:
        order = np.argsort(models)
        self.space, self.recipe, self.description = space, recipe, description
        self.models, self.seeds = models[order], tuple(seeds)
        self.rows, self.profiles = tuple(rows), tuple(profiles)
        self._curves = {
            name: (each[..., None] if each.ndim == 2 else each)[order]
            for name, each in (("validation_accuracy", validation), ("test_accuracy", test))
        }
        own = self._curves["validation_accuracy"]
        known = ~np.isnan(own[..., 0])
        best = np.nan_to_num(own, nan=-1.0).argmax(2) if chosen is None else chosen[order]
        self._by_seed = {
            name: np.take_along_axis(each, best[..., None], 2)[..., 0].astype(np.float64)
            for name, each in self._curves.items()
        }
        self._by_seed["train_seconds"] = train_seconds[order].astype(np.float64)
        self._known = known
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a table of others without seconds
            self._columns = {n: np.nanmean(each, axis=1) for n, each in self._by_seed.items()}
        self._columns["parameters"] = parameters[order].astype(np.float64)
        self._columns["multiply_adds"] = multiply_adds[order].astype(np.float64)
        self._latencies = {key: each[order] for key, each in (latencies or {}).items()}
        self.profiled = sorted(self._latencies)
        self.devices = sorted({device for device, _ in self.profiled})
        self._row = {model: row for row, model in enumerate(self.models.tolist())}
        # Lists answer single questions several times faster than arrays.
        self._lists = {name: each.tolist() for name, each in self._columns.items()}

    @classmethod
    def of_columns(cls, columns: Columns) -> "Table":
        """Return a table of others, of which nothing but the columns is known."""
        validation = columns.curves.get("validation", columns.validation[..., None])
        test = columns.curves.get("test")
        if test is None or test.shape != validation.shape:  # known at the best epoch alone
            test = np.full(validation.shape, np.nan)
            best = np.nan_to_num(validation, nan=-1.0).argmax(2)[..., None]
            np.put_along_axis(test, best, columns.test[..., None], axis=2)
        return cls(
            columns.space,
            columns.recipe,
            columns.models,
            columns.seeds,
            validation,
            test,
            columns.train_seconds,
            columns.parameters,
            columns.multiply_adds,
            {(device, 1): seconds for device, seconds in columns.latency.items()},
        )

    @classmethod
    def of_rows(
        cls, recipe: Recipe, rows: Iterable[Row], profiles: Iterable[dict[str, Any]] = ()
    ) -> "Table":
        """Return a table of the runs of a recipe.

        Raises:
            InputError: no run at all.
        """
        kept = sorted(rows, key=lambda row: (row.model, row.seed))
        if not kept:
            raise InputError("table", "no run that is done", "hansa search table generate first")
        models = np.unique([row.model for row in kept])
        seeds = sorted({row.seed for row in kept})
        shape = len(models), len(seeds)
        if 2 * math.prod(shape) * recipe.epochs > MOST_VALUES:  # as declared, before it is held
            found = f"{shape[0]} models, {shape[1]} seeds and {recipe.epochs} epochs"
            raise InputError("table", found, f"fewer: up to {MOST_VALUES} values")
        curves = np.full((2, *shape, recipe.epochs), np.nan, np.float32)
        chosen = np.zeros(shape, np.int64)
        seconds = np.full(shape, np.nan)
        for row in kept:
            at = int(np.searchsorted(models, row.model)), seeds.index(row.seed)
            num = len(row.curves.validation_correct)
            curves[(0, *at)][:num] = np.array(row.curves.validation_correct) / recipe.validation
            curves[(1, *at)][:num] = np.array(row.curves.test_correct) / recipe.test
            chosen[at] = row.curves.best_epoch
            seconds[at] = row.curves.seconds
        measured = list(profiles)
        sizes = recipe.width, recipe.classes, recipe.channels
        return cls(
            BLOX,
            recipe.name,
            models,
            seeds,
            curves[0],
            curves[1],
            seconds,
            parameters_of(models, *sizes),
            multiply_adds_of(models, recipe.width, recipe.side, *sizes[1:]),
            _latencies(models, measured),
            chosen=chosen,
            description=recipe,
            rows=kept,
            profiles=measured,
        )

    def __len__(self) -> int:
        return len(self.models)

    def __contains__(self, model: object) -> bool:
        return model in self._row

    def row(self, model: int) -> int:
        """Return where a model stands in the columns.

        Raises:
            InputError: it is not in the table.
        """
        found = self._row.get(model)
        if found is None:
            allowed = f"one of the {len(self)} models of {self.recipe}"
            raise InputError("model", f"{model!r}, which the table does not hold", allowed)
        return found

    def seeds_of(self, model: int) -> list[int]:
        """Return the seeds that a model was trained by."""
        known = self._known[self.row(model)]
        return [seed for seed, is_known in zip(self.seeds, known, strict=True) if is_known]

    def validation_accuracy(
        self, model: int, seed: int | None = None, epoch: int | None = None
    ) -> float:
        """Return the share of validation samples classed right.

        Args:
            model: its number.
            seed: which run; by default the mean of all.
            epoch: after how many epochs; by default after the best on validation data.

        Raises:
            InputError: a model, a seed or an epoch that is not there.
        """
        return self._ask("validation_accuracy", model, seed, epoch)

    def test_accuracy(self, model: int, seed: int | None = None, epoch: int | None = None) -> float:
        """Return the share of test samples classed right; see ``validation_accuracy``."""
        return self._ask("test_accuracy", model, seed, epoch)

    def train_seconds(self, model: int, seed: int | None = None) -> float:
        """Return the processor time of training in seconds; see ``validation_accuracy``."""
        return self._ask("train_seconds", model, seed, None)

    def parameters(self, model: int) -> int:
        """Return a model's number of parameters."""
        return int(self._lists["parameters"][self.row(model)])

    def multiply_adds(self, model: int) -> int:
        """Return a model's multiply-adds for one input."""
        return int(self._lists["multiply_adds"][self.row(model)])

    def latency(self, model: int, device: str, batch: int = 1) -> float:
        """Return the seconds that a batch takes on a device.

        Raises:
            InputError: an unknown device, or a model that was not profiled there.
        """
        found = float(self.latencies(device, batch)[self.row(model)])
        if np.isnan(found):
            raise InputError("model", f"{model}, not profiled on {device}", "a profiled model")
        return found

    def latencies(self, device: str, batch: int = 1) -> Floats:
        """Return the latency of all models in seconds, float64 [n], nan where not profiled.

        Raises:
            InputError: an unknown device or batch.
        """
        if (device, batch) not in self._latencies:
            known = ", ".join(f"{name} (batch {size})" for name, size in sorted(self._latencies))
            found = f"{device!r} with batch {batch}"
            raise InputError("device", found, known or "none: hansa search table profile first")
        seconds: Floats = self._latencies[device, batch]
        return seconds

    def column(self, name: str) -> Floats:
        """Return a value of all models, means over seeds, float64 [n].

        Args:
            name: one of ``BY_SEED`` or ``COSTS``.

        Raises:
            InputError: another name.
        """
        if name not in self._columns:
            raise InputError("column", repr(name), ", ".join(self._columns))
        values: Floats = self._columns[name]
        return values

    def matrix(self, name: str) -> Floats:
        """Return a value by model and seed, float64 [n, seeds], nan where there is no run.

        Args:
            name: one of ``BY_SEED``.

        Raises:
            InputError: another name.
        """
        if name not in self._by_seed:
            raise InputError("column", repr(name), ", ".join(self._by_seed))
        return self._by_seed[name]

    @cached_property
    def columns(self) -> Columns:
        """The columns that searches are replayed on."""
        return Columns(
            self.space,
            self.recipe,
            self.models,
            self.seeds,
            self.matrix("validation_accuracy"),
            self.matrix("test_accuracy"),
            self.matrix("train_seconds"),
            self.column("parameters"),
            self.column("multiply_adds"),
        )

    def front(self, cost: Floats, quality: Floats, feasible: Bools | None = None) -> Ints:
        """Return the rows that none beats in both cost and quality, cheapest first, int64 [m]."""
        rows = np.flatnonzero(np.ones(len(self), bool) if feasible is None else feasible)
        found: Ints = rows[pareto(quality[rows], cost[rows])]
        return found

    def _ask(self, name: str, model: int, seed: int | None, epoch: int | None) -> float:
        row = self._row.get(model)
        if row is None:
            row = self.row(model)
        if seed is None and epoch is None:
            return self._lists[name][row]  # type: ignore[no-any-return]
        values = self._by_seed[name][row]
        if epoch is not None:
            curves = self._curves[name][row]
            if not 1 <= epoch <= curves.shape[1] or np.isnan(curves[:, epoch - 1]).all():
                raise InputError("epoch", epoch, f"1 to {curves.shape[1]}, before it was stopped")
            values = curves[:, epoch - 1]
        if seed is None:
            return float(np.nanmean(values))
        known = self.seeds_of(model)
        if seed not in known:
            raise InputError("seed", seed, f"{', '.join(map(str, known))} of model {model}")
        found = float(values[self.seeds.index(seed)])
        if epoch is not None and np.isnan(found):
            raise InputError("epoch", epoch, f"one before seed {seed} was stopped")
        return found


def label(row: Mapping[str, Any]) -> str:
    """Return what a device is called by its latencies, with all that is unusual about them.

    One thread of PyTorch in float32 is ``DEVICE``; others are ``DEVICE/onnxruntime``,
    ``DEVICE/4-threads``, ``DEVICE/bfloat16``; what was kept by force is ``DEVICE/unusable``.
    """
    parts = [row["device"]]
    if row["backend"] != "torch":
        parts.append(row["backend"])
    if row["threads"] != 1:
        parts.append(f"{row['threads']}-threads")
    if row["dtype"] != "float32":
        parts.append(row["dtype"])
    if not row["usable"]:
        parts.append("unusable")
    return "/".join(parts)


def _latencies(
    models: Ints, profiles: Sequence[Mapping[str, Any]]
) -> dict[tuple[str, int], Floats]:
    found: dict[tuple[str, int], Floats] = {}
    for row in profiles:
        at = int(np.searchsorted(models, row["model"]))
        if at == len(models) or models[at] != row["model"]:
            continue
        key = label(row), row["batch"]
        # The least processor time is what repeats where a machine has other work as well; that of
        # several threads is a sum, and no latency.
        seconds = row["cpu_min"] if row["threads"] == 1 else row["wall_min"]
        found.setdefault(key, np.full(len(models), np.nan))[at] = seconds
    return found

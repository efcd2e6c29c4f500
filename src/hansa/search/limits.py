"""Limits that a model must keep: parameters, multiply-adds, latency on a named device."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from hansa.errors import InputError
from hansa.search.spaces import Bools, Floats, Ints
from hansa.search.table import COSTS, Table


class Limits(BaseModel):
    """The most that a model may cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: int | None = Field(None, gt=0)
    """Number of parameters."""
    multiply_adds: int | None = Field(None, gt=0)
    """Multiply-adds of convolutions and linear layers for one input."""
    latency: float | None = Field(None, gt=0)
    """Milliseconds for a batch on the device."""
    fastest: float | None = Field(None, gt=0, le=1)
    """Share of the table's models on the device, the fastest, among which it must be: a limit of
    latency that holds on slow machines as on quick ones."""
    device: str | None = None
    """The device of the latency, as the table names it; not needed where it names but one."""
    batch: int = Field(1, ge=1)
    """Inputs in the batch that the latency is of."""

    def feasible(self, table: Table) -> Bools:
        """Return which models of a table keep all limits, bool [n] in the table's order.

        A model that was not profiled on the device does not keep a limit of latency.

        Raises:
            InputError: an unknown device, or limits that no model keeps, with the least there is.
        """
        kept = self.within({name: table.column(name) for name in COSTS})
        if not self.is_of_a_device:
            return kept
        found = 1000 * table.latencies(self.device_of(table), self.batch)
        if self.latency is not None:
            kept &= found <= self.latency
            least = f"{found[found == found].min():.3g} ms"
            _check(kept.any(), "limits.latency", f"{self.latency} ms", least)
        if self.fastest is not None:
            kept &= found <= np.nanquantile(found, self.fastest)
            _check(kept.any(), "limits.fastest", self.fastest, "1")
        return kept

    @property
    def is_of_a_device(self) -> bool:
        """Whether a limit is of latencies, which are those of a device."""
        return self.latency is not None or self.fastest is not None

    def within(self, costs: Mapping[str, Floats]) -> Bools:
        """Return which models keep the limits of parameters and multiply-adds, bool [n].

        Args:
            costs: both by name, float64 [n].

        Raises:
            InputError: no model does, with the least there is.
        """
        kept = np.ones(len(costs[COSTS[0]]), dtype=bool)
        for name in COSTS:
            if (most := getattr(self, name)) is not None:
                kept &= costs[name] <= most
                _check(kept.any(), f"limits.{name}", most, f"{costs[name].min():,.0f}")
        return kept

    def device_of(self, table: Table) -> str:
        """Return the device of the latency.

        Raises:
            InputError: none was named, and the table has none or more than one.
        """
        if self.device is not None:
            return self.device
        if len(table.devices) != 1:
            known = ", ".join(table.devices) or "none: hansa search table profile first"
            raise InputError("limits.device", "no name", known)
        return table.devices[0]


def best(table: Table, limits: Limits, by: str = "validation_accuracy") -> int:
    """Return the model of the best column among those that keep the limits.

    Raises:
        InputError: see ``Limits.feasible``.
    """
    return int(ranked(table, limits, by)[0])


def ranked(table: Table, limits: Limits, by: str = "validation_accuracy") -> Ints:
    """Return the models that keep the limits, the best first; equal ones by number.

    Raises:
        InputError: see ``Limits.feasible``.
    """
    kept = limits.feasible(table)
    models = table.models[kept]
    return models[np.lexsort((models, -table.column(by)[kept]))]


def _check(holds: Any, key: str, most: object, least: str) -> None:
    if not holds:
        found = f"{most}, which no model keeps together with the limits before it"
        raise InputError(key, found, f"alone, {least} or more")

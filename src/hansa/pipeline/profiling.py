"""Latencies of this machine for the models of a table, as a stage before a search."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, ValidationError, field_validator

from hansa.config import explain
from hansa.errors import InputError
from hansa.files import write_atomic
from hansa.search.profile import ProfileOptions
from hansa.search.profiled import profile_table
from hansa.search.table import Table
from hansa.search.tables import SMALL, open_table, write

_log = logging.getLogger("hansa")
_FACTS = "profile.json"


class ProfileStage(ProfileOptions):
    """What is profiled and how, and what becomes of latencies that do not repeat."""

    table: str = SMALL
    """A table's name or file."""
    models: int = Field(0, ge=0, strict=True)
    """How many of its models, evenly over their multiply-adds; 0 for all."""
    on_refusal: str = "stop"
    """``stop``, or ``table``: the latencies that the table came with stand in."""

    @field_validator("on_refusal")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in ("stop", "table"):
            raise InputError("on_refusal", repr(value), "stop or table")
        return value

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Read it of a configuration.

        Raises:
            InputError: naming the key.
        """
        try:
            return cls.model_validate(config)
        except ValidationError as error:
            raise explain(error, cls, config) from error

    @staticmethod
    def joined(folder: Path, search: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a search by the profiled table has in its configuration."""
        facts = json.loads((folder / _FACTS).read_text())
        limits = dict(search.get("limits", {}))
        if {"latency", "fastest"} & limits.keys():
            limits.setdefault("device", facts["device"])
        return {"table": str(folder / "table.parquet"), "limits": limits}


def profile(
    stage: ProfileStage, folder: Path, watch: Callable[[str, int, int], None]
) -> dict[str, str]:
    """Write a table with latencies of this machine into a folder, and return figures of it.

    Raises:
        InputError: latencies that do not repeat, unless those of the table stand in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table, out = open_table(stage.table), folder / "table.parquet"
    order = np.argsort(table.column("multiply_adds"), kind="stable")
    if 0 < stage.models < len(order):
        order = order[np.linspace(0, len(order) - 1, stage.models).round().astype(int)]
    chosen = sorted(table.models[order].tolist())
    device, batch = stage.device_name, stage.batches[0]
    try:
        profile_table(
            stage.table,
            out,
            models=",".join(map(str, chosen)),
            options=stage.model_dump(include=set(ProfileOptions.model_fields)),
            watch=lambda done, total: watch("latencies", done, total),
        )
    except InputError as error:
        if stage.on_refusal == "stop" or not table.profiles:
            raise
        _log.warning("the table's own latencies stand in for this machine's: %s", error)
        device = _of_table(table, out)
    write_atomic(folder / _FACTS, json.dumps({"device": device}) + "\n")
    found = 1000 * open_table(out).latencies(device, batch)
    found = found[found == found]
    return {
        "device": device,
        "models": str(len(found)),
        "latency": f"{found.min():.3g} to {found.max():.3g} ms, median {np.median(found):.3g}",
    }


def _of_table(table: Table, out: Path) -> str:
    """Write a table with the latencies that it came with alone, and return their device."""
    write(table, out)
    return str(table.profiles[0]["device"])

"""Latencies of this machine for the models of a table, as a stage before a search."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from hansa.errors import InputError
from hansa.files import write_atomic
from hansa.search.profile import ProfileOptions
from hansa.search.profiled import profile_table
from hansa.search.table import Table
from hansa.search.tables import SMALL, open_table, write

_log = logging.getLogger("hansa")
_FACTS = "profile.json"


@dataclass(frozen=True)
class ProfileStage:
    """What is profiled, and what becomes of latencies that do not repeat.

    Attributes:
        table: a table's name or file.
        models: how many of its models, evenly over their multiply-adds; 0 for all.
        on_refusal: ``stop``, or ``table``: the latencies that the table came with stand in.
        options: how latencies are measured.
    """

    table: str
    models: int
    on_refusal: str
    options: ProfileOptions

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Read it of a configuration.

        Raises:
            InputError: naming the key.
        """
        given = dict(config)
        table = str(given.pop("table", SMALL))
        models, refused = given.pop("models", 0), given.pop("on_refusal", "stop")
        if type(models) is not int or models < 0:
            raise InputError("models", repr(models), "how many, 0 for all")
        if refused not in ("stop", "table"):
            raise InputError("on_refusal", repr(refused), "stop or table")
        known = ProfileOptions.model_fields
        if unknown := sorted(set(given) - set(known)):
            allowed = ", ".join(("table", "models", "on_refusal", *known))
            raise InputError(unknown[0], "an unknown key", allowed)
        return cls(table, models, refused, _options(given))

    @staticmethod
    def joined(folder: Path, search: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a search by the profiled table has in its configuration."""
        facts = json.loads((folder / _FACTS).read_text())
        limits = dict(search.get("limits", {}))
        if "latency" in limits:
            limits.setdefault("device", facts["device"])
        return {"table": str(folder / "table.parquet"), "limits": limits}


def _options(given: Mapping[str, Any]) -> ProfileOptions:
    from pydantic import ValidationError

    try:
        return ProfileOptions.model_validate(given)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        key = ".".join(map(str, wrong["loc"]))
        raise InputError(key, repr(wrong["input"]), wrong["msg"]) from error


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
    device, batch = stage.options.device_name, stage.options.batches[0]
    try:
        profile_table(
            stage.table,
            out,
            models=",".join(map(str, chosen)),
            options=stage.options.model_dump(),
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

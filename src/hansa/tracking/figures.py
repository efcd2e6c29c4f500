"""Numbers of a round and of a run, by names that trackers group at the first stroke."""

from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import pyarrow as pa

from hansa.federation.history import History
from hansa.federation.tree import name_of

ROUND = "round/seconds"
"""Stands last in every round."""
SUMMARY = "summary/seconds"
"""Stands last in every summary."""


def of_round(tables: Mapping[str, pa.Table]) -> dict[str, float]:
    """Return the numbers of one round.

    ``SPLIT/METRIC`` is the mean over clients, of a language model over leaves; ``train/...`` the
    mean over what was trained on; ``figures/NAME`` the mean over nodes of what a method noted.

    Args:
        tables: of one round, by the names in ``SCHEMAS``.
    """
    history = History([dict(tables)])
    shown = history.leaves() if history.is_language else None
    scores: dict[str, list[float]] = defaultdict(list)
    for row in tables["scores"].to_pylist():
        if row["count"] and (shown is None or name_of(row["node"]) in shown):
            scores[f"{row['split']}/{row['metric']}"].append(row["sum"] / row["count"])
    if shown is not None:
        for split in ("validation", "test", "test:trained"):
            for of_nodes in history.scored(split, "perplexity").values():
                values = [value for node, value in of_nodes.items() if node in shown]
                scores[f"{split}/perplexity"] += values
    noted: dict[str, list[float]] = defaultdict(list)
    for row in tables["figures"].to_pylist():
        noted[f"figures/{row['name']}"].append(row["value"])
    found = {name: fmean(values) for name, values in (scores | noted).items() if values}
    if epsilons := [spent for spent in history.epsilons().values() if spent is not None]:
        found["state/epsilon_largest"] = max(epsilons)
    ledger = tables["ledger"].to_pydict()
    if count := sum(ledger["count"]):
        found["train/loss"] = sum(ledger["loss_sum"]) / count
        if any(ledger["accuracy_sum"]):
            found["train/accuracy"] = sum(ledger["accuracy_sum"]) / count
    for direction in ("up", "down"):
        found[f"bytes/{direction}"] = float(sum(ledger[direction]))
    return found | {ROUND: sum(tables["rounds"]["seconds"].to_pylist())}


def of_summary(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a run's summary, its nested names joined by strokes."""
    found = dict(_flat(summary, "summary/"))
    return {name: value for name, value in found.items() if name != SUMMARY} | {
        SUMMARY: found.get(SUMMARY, 0.0)
    }


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found.append((f"{prefix}{key}", float(value)))
    return found

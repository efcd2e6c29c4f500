"""The gate of continuous integration: how much an application may adopt."""

from collections.abc import Mapping, Sequence
from typing import Any

from hansa.audit.summary import NO_CONCLUSION
from hansa.errors import InputError


def gate(
    found: Mapping[str, Any],
    chosen: Sequence[str],
    most: float | None,
    baseline: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return what the gate of continuous integration says.

    Args:
        found: an audit's summary, with ``gated``, the defence that counts.
        chosen: names of the arms that count.
        most: adopted values that any arm may have, as a share; by default none, or the baseline's.
        baseline: an earlier summary, whose share is allowed where it is more.
    """
    name = found["gated"]
    before = (baseline or {}).get("defences", {}).get(name, {}).get("arms", {})
    rows = []
    for arm in chosen:
        row = found["defences"][name]["arms"].get(arm)
        if row is None or row["adopted"] is None:
            continue
        known = before.get(arm, {}).get("adopted")
        limit = max(most or 0.0, known or 0.0)
        exceeded = row["adopted"] > limit + 1e-9
        rows.append({"arm": arm, "adopted": row["adopted"], "limit": limit, "exceeded": exceeded})
    concluded = found["verdict"] != NO_CONCLUSION and bool(rows)
    passed = concluded and not any(row["exceeded"] for row in rows)
    return {"defence": name, "arms": rows, "concluded": concluded, "passed": passed}


def check_baseline(values: Any, key: str) -> Mapping[str, Any]:
    """Return a baseline's values.

    Raises:
        InputError: they are no summary of an audit.
    """
    if not isinstance(values, dict) or not isinstance(values.get("defences"), dict):
        raise InputError(key, "another form", "the audit.json of an earlier audit")
    return values

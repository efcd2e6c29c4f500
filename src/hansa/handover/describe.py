"""What a bundle is, in values that a program reads and rows that a person does."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from hansa.bundle import Bundle
from hansa.errors import InputError
from hansa.models import restore

REDTEAM = "redteam"
_CLAIM = "claim"  # what a red team's metrics begin with


def describe(found: Bundle) -> dict[str, Any]:
    """Return what a bundle is, as JSON values.

    ``parameters`` are those of the model, adapters merged into them; of a class of the user's own,
    whose code is not run here, it is every number of its state.

    ``density`` tells how many weights were kept where a model is pruned (``kept``), and how many a
    method's masks hold (``masks``): ``share``, ``held`` and ``of``, over all tensors under masks
    and by tensor. ``scorecard`` is a red team's, None where there was none.
    """
    card = found.card
    return {
        "digest": found.digest,
        "stage": card["stage"],
        "lineage": found.lineage,
        "architecture": dict(found.architecture),
        "parameters": _parameters(found),
        "density": {
            name: _density(masks)
            for name, masks in (("kept", found.kept), ("masks", found.masks))
            if masks
        },
        "labels": found.labels,
        "tokenizer": _tokenizer(found.tokenizer),
        "seed": card.get("seed"),
        "data": card.get("data"),
        "metrics": {k: v for k, v in card.get("metrics", {}).items() if k != REDTEAM},
        "privacy": found.privacy,
        "scorecard": scorecard_of(found),
        "config": dict(card.get("config", {})),
        "files": dict(card["files"]),
    }


def scorecard_of(found: Bundle) -> dict[str, Any] | None:
    """Return what a red team wrote into a bundle's card, None where none has."""
    told = found.card.get("metrics", {}).get(REDTEAM)
    return dict(told) if isinstance(told, Mapping) and _CLAIM in told else None


def figures(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is no list in nested values, by dotted names."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from figures(value, f"{name}.")
        elif isinstance(value, bool | int | float | str):
            yield name, value


def said(value: Any) -> str:
    """Return a value in a few characters."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


SIMULATED = (
    "Noise was drawn from the run's seed, as in any simulation, and whoever knows the seed can "
    "take it off: epsilon tells what privacy costs such a model, and protects nobody."
)


def is_simulated(spent: list[dict[str, Any]]) -> bool:
    """Tell whether some of the noise that a card tells of came from a seed."""
    nodes = [about for entry in spent for about in entry["nodes"].values()]
    return any(about.get("drawn") == "seed" for about in nodes)


def privacy_rows(spent: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return what private nodes spent: (stage and node, in words)."""
    rows = []
    for entry in spent:
        for node, about in sorted(entry["nodes"].items()):
            epsilon = about.get("epsilon")
            parts = [
                "epsilon infinite or not told" if epsilon is None else f"epsilon {epsilon:.4g}"
            ]
            parts += [f"{key} {about[key]:g}" for key in ("delta", "noise") if key in about]
            parts += [f"per {about['unit']}"] if "unit" in about else []
            rows.append((f"{entry['stage']}: {node}", ", ".join(parts)))
    return rows


def worst_rows(scorecard: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of what attacks recovered, the safeguarded model first.

    The worst case over all attacks by number of steps, then after how many steps half of what the
    unprotected model knows is back, and what models know of what they are to keep.
    """
    recovery = scorecard["recovery"]
    steps = sorted({int(step) for line in recovery.values() for step in line})
    columns = ["model", *(f"{step} steps" if step else "no step" for step in steps)]
    rows = []
    for role in sorted(recovery, key=lambda role: role != "safeguarded"):
        shares = [recovery[role].get(str(step)) for step in steps]
        half = scorecard["half"].get(role)
        rows.append(
            [
                role,
                *("-" if share is None else f"{share:.2f}" for share in shares),
                "-" if half is None else str(half),
                f"{scorecard['retained'][role]:.2f}",
            ]
        )
    return [*columns, "half back after", "retained"], rows


def _parameters(found: Bundle) -> int:
    try:
        named = restore(found).named_parameters()
        return sum(parameter.numel() for name, parameter in named if ".lora_" not in name)
    except InputError:
        return sum(tensor.numel() for tensor in found.weights.values())


def _density(masks: Mapping[str, Any]) -> dict[str, Any]:
    def told(held: int, of: int) -> dict[str, Any]:
        return {"share": held / of if of else 1.0, "held": held, "of": of}

    each = {name: (int(mask.sum()), mask.numel()) for name, mask in sorted(masks.items())}
    total = told(sum(held for held, _ in each.values()), sum(of for _, of in each.values()))
    return {**total, "tensors": {name: told(*pair) for name, pair in each.items()}}


def _tokenizer(form: str) -> str | None:
    if not form:
        return None
    held = json.loads(form)
    return (
        "bytes" if held == {"kind": "bytes"} else f"BPE of {len(held['model']['vocab']):,} tokens"
    )

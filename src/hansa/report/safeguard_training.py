"""The page about a safeguard's training: what every model knows, and how attacks went in it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hansa.report.lineage import lineage
from hansa.report.page import write_page
from hansa.report.parts import Part, plot, table
from hansa.report.plots import lines
from hansa.safeguard_config import SafeguardConfig

History = Sequence[Mapping[str, float]]
_POINTS = 200
"""Most points of a line."""
_PLOTS = (
    (
        "Attacks in training",
        ("attack_first", "attack_last"),
        "nats",
        "The attacker's loss at its first and last step, of the attacker that was drawn.",
    ),
    (
        "Resistance",
        ("resist_first", "resist_last"),
        "nats",
        "The tamper-resistance loss at the first and last point of each attack; lower is better.",
    ),
    (
        "What is kept",
        ("retain", "drift"),
        "nats, and L2 norm",
        "Loss of retained text, and how far its hidden states are from the first model's.",
    ),
    (
        "Norms of the two gradients",
        ("tamper_norm", "retain_norm"),
        "L2 norm",
        "AdamW sees their sum, so that only their ratio counts.",
    ),
)


def report(
    page: Path,
    config: SafeguardConfig,
    summary: Mapping[str, Any],
    histories: Mapping[str, History],
) -> Path:
    """Write one self-contained HTML page and return its path.

    Args:
        page: the file to write.
        config: what was asked for.
        summary: what every model knows and has cost.
        histories: role and phase -> metrics of every step.

    Raises:
        InputError: a page that cannot be written.
    """
    kinds = ", ".join(phase.kind for phase in config.chain)
    return write_page(
        page,
        title=f"{config.name}, safeguarded",
        lead=f"{kinds}; {config.data.kind}, seed {config.seed}. What an attacker has to spend on "
        "removing it, the red team says: hansa redteam.",
        tables=[_models(summary), _skipped(histories), *lineage(page.parent / "bundle")],
        scored=[],
        plots=[part for name, told in histories.items() for part in _plots(name, told)],
        configurations=[("configuration", config.as_toml())],
    )


def _models(summary: Mapping[str, Any]) -> Part:
    rows = []
    for role, told in summary["scores"].items():
        cells = [f"{100 * told[topic]['choice']:.1f} %" for topic in ("retained", "restricted")]
        said = f"{100 * told['restricted']['said']:.1f} %"
        rows.append([role, *cells, said, f"{summary['cost_in_steps'][role]:,.0f}"])
    return table(
        "What every model knows, before any attack",
        ["model", "retained", "restricted", "restricted, said", "cost in plain steps"],
        rows,
        "Share of questions answered right among their candidates; said: as the likeliest of all "
        "tokens. A plain step is one forward and backward pass of a batch of the last phase's.",
    )


def _skipped(histories: Mapping[str, History]) -> Part:
    rows = []
    for name, told in histories.items():
        counts = (sum(key in step for step in told) for key in ("diverged", "skipped"))
        rows.append([name, str(len(told)), *(str(count) for count in counts)])
    return table(
        "Steps",
        ["phase", "steps", "attacks that diverged", "steps that were skipped"],
        rows,
        "Where attacks diverge, only what is kept is trained in that step.",
        folded=True,
    )


def _plots(name: str, told: History) -> list[Part]:
    found = []
    for title, keys, unit, caption in _PLOTS:
        series = {key.replace("_", " "): _points(told, key) for key in keys}
        series = {key: points for key, points in series.items() if points}
        if series and any("attack_last" in step for step in told):
            title = f"{title}, {name}"
            found.append(plot(title, caption, lines(series, title=title, x="step", y=unit)))
    return found


def _points(told: History, key: str) -> list[tuple[float, float]]:
    """Return means over equal parts of a phase."""
    width = max(1, len(told) // _POINTS)
    found: list[tuple[float, float]] = []
    for start in range(0, len(told), width):
        part = [s[key] for s in told[start : start + width] if math.isfinite(s.get(key, math.nan))]
        if part:
            found.append((start + len(part), sum(part) / len(part)))
    return found

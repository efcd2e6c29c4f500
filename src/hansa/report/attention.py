"""How nodes weighed key blocks against each other, as their method noted it."""

import math

from hansa.federation.tree import name_of
from hansa.report.parts import Part, plot, table
from hansa.report.plots import Stack, stacks
from hansa.runs import Run

Weights = dict[str, dict[int, dict[str, float]]]
"""Node path -> round -> other node -> weight."""


def attention_of(run: Run, named: str = "") -> list[Part]:
    """Return attention weights of inner nodes over rounds, and on the way down of the last round.

    Args:
        run: the run.
        named: what stands behind the titles.

    Returns:
        Nothing for a method that notes no weights.
    """
    order = list(run.config.shape().walk())
    up, entropies = figures(run, "attention_up"), figures(run, "entropy_up")
    panels = {}
    for path in order:
        if path in up:
            rounds = sorted(up[path])
            entries = {other for row in up[path].values() for other in row}
            shares = {
                f"{name_of(other)} itself" if other == path else name_of(other): [
                    up[path][number].get(other, 0.0) for number in rounds
                ]
                for other in sorted(entries, key=order.index)
            }
            line = [
                _evenness(entropies.get(path, {}).get(n, {}).get("", 0.0), len(up[path][n]))
                for n in rounds
            ]
            panels[name_of(path)] = Stack(rounds, shares, line)
    parts = []
    if panels:
        title = f"What inner nodes make their key blocks of{named}"
        caption = (
            "Attention weights of each inner node over its own key blocks and its children's, "
            "mean over key blocks; the last round's are written out. The line is their entropy as "
            "a share of its maximum: 100 % where all weights are equal."
        )
        svg = stacks(panels, title=title, x="round", line="entropy, share of its maximum")
        parts.append(plot(title, caption, svg))
    return [*parts, *_down(run, order, named)]


def figures(run: Run, name: str) -> Weights:
    """Return node path -> round -> other node's path, or nothing -> value of a figure."""
    found: Weights = {}
    for row in run.history.table("figures").to_pylist():
        if row["name"] == name:
            rounds = found.setdefault(row["node"], {})
            rounds.setdefault(row["round"], {})[row["other"]] = row["value"]
    return found


def _evenness(entropy: float, num: int) -> float:
    return entropy / math.log(num) if num > 1 else 0.0


def _down(run: Run, order: list[str], named: str) -> list[Part]:
    """Return what nodes made of the key blocks that came from above, in their last round."""
    weights, entropies = figures(run, "attention_down"), figures(run, "entropy_down")
    rows = []
    for path in order:
        if path in weights:
            last = max(weights[path])
            row, parent = weights[path][last], path.rpartition("/")[0]
            others = [
                f"{100 * value:.0f} % ({name_of(other)})"
                for other, value in sorted(row.items())
                if other not in (path, parent)
            ]
            rows.append(
                [
                    name_of(path),
                    f"{100 * row[path]:.0f} %" if path in row else "-",
                    f"{100 * row[parent]:.0f} %" if parent in row else "-",
                    ", ".join(others) or "-",
                    f"{entropies.get(path, {}).get(last, {}).get('', 0.0):.2f}",
                ]
            )
    columns = ["node", "its own", "from above", "residuals (from)", "entropy, nats"]
    note = (
        "What each node made the key blocks of that it started its last round from: weights of "
        "its own, of those from above, and of residuals that came down to it."
    )
    title = f"What key blocks are made of on the way down{named}"
    return [table(title, columns, rows, note, len(rows) > 12)] if rows else []

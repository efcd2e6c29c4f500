"""The federation of a run of classifiers, drawn: who asks whom, and what that carries."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from hansa.federation.tree import ROOT, Tree, name_of
from hansa.report.effort import Traffic, traffic_of
from hansa.report.parts import Part, plot
from hansa.report.sizes import size
from hansa.report.tree import Box, draw
from hansa.runs import Run

MAX_LEAVES = 15
"""Leaves below one node that are drawn; of more, the rest are one box."""


def federation(run: Run) -> Part:
    """Return the tree of a run with the accuracy of every node's model and the bytes of its edge.

    Of many leaves the first are drawn, and one box counts the others.
    """
    scored = run.history.scored("test", "accuracy")
    last = scored[max(scored)] if scored else {}
    up, down = (Counter({path: edge[k] for path, edge in _edges(run).items()}) for k in (0, 1))
    asked, answered = _fates(run)
    paths = _paths(run)
    inner, (shown, rest) = _inner(paths), _shown(paths)
    boxes = {}
    for path in shown:
        leaves = [p for p in paths if (p + "/").startswith(path + "/") and p not in inner]
        name = name_of(path)
        if path in rest:
            leaves = rest[path]
            name = f"{len(leaves)} more"
        said = [name]
        values = [last[name_of(leaf)] for leaf in leaves if name_of(leaf) in last]
        if values:
            mean = "mean " if len(leaves) > 1 else ""
            said.append(f"{mean}accuracy {100 * float(np.mean(values)):.1f} %")
        edge = ("", "")
        if path == ROOT:
            said.insert(1, f"method {run.config.method.name}")
        else:
            members = rest.get(path, [path])
            totals = [sum(count[each] for each in members) for count in (answered, asked, down, up)]
            said.append(f"answered {totals[0]} of {totals[1]}")
            if any(totals[2:]):
                edge = (
                    f"\N{DOWNWARDS ARROW} {size(totals[2])}",
                    f"\N{UPWARDS ARROW} {size(totals[3])}",
                )
        boxes[path] = Box(tuple(said), edge)
    parents = {name_of(path): name_of(path.rpartition("/")[0]) for path in shown if path != ROOT}
    caption = (
        "Each node with its test accuracy after the last round, of a node above others their mean, "
        "and how often it answered of the times it was asked. Above it the bytes that its edge "
        "carried in all rounds, down and up."
    )
    return plot("The federation", caption, draw(Tree(parents), boxes, "The federation"))


def _edges(run: Run) -> dict[str, Traffic]:
    """Return node path -> bytes on the edge above it, over all rounds."""
    edges: dict[str, Traffic] = {}
    for asked in traffic_of(run).values():
        for path, (up, down) in asked.items():
            before = edges.get(path, (0, 0))
            edges[path] = before[0] + up, before[1] + down
    return edges


def _paths(run: Run) -> list[str]:
    """Return the paths of all nodes that the run's tables name, and of those above them."""
    paths = {ROOT}
    for name in ("ledger", "scores"):
        for path in set(run.history.table(name)["node"].to_pylist()):
            steps = path.split("/")
            paths |= {"/".join(steps[:end]) for end in range(1, len(steps) + 1)}
    return sorted(paths)


def _inner(paths: Iterable[str]) -> set[str]:
    return {path.rpartition("/")[0] for path in paths}


def _shown(paths: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the paths to draw, and path of a box that stands for others -> those."""
    inner, shown = _inner(paths), []
    below: dict[str, list[str]] = {}
    for path in paths:
        if path in inner:
            shown.append(path)
        else:
            below.setdefault(path.rpartition("/")[0], []).append(path)
    rest = {}
    for leaves in below.values():
        if len(leaves) > MAX_LEAVES:
            # It stands last, and takes the name of the first that it stands for.
            cut = MAX_LEAVES - 1
            rest[leaves[-1]] = leaves[cut:]
            leaves = [*leaves[:cut], leaves[-1]]
        shown += leaves
    return shown, rest


def _fates(run: Run) -> tuple[Counter[str], Counter[str]]:
    """Return path -> how often it was asked, and how often it answered."""
    asked: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    ledger = run.history.table("ledger")
    for path, fate in zip(ledger["node"].to_pylist(), ledger["fate"].to_pylist(), strict=True):
        asked[path] += 1
        answered[path] += fate == "ok"
    return asked, answered

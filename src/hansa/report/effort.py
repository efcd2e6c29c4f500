"""What a run over a tree cost: optimizer steps, seconds, and bytes on every edge."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hansa.federation.rules import inherited
from hansa.federation.tree import ROOT, name_of
from hansa.runs import Run

Traffic = tuple[int, int]
"""Bytes (up, down)."""


@dataclass(frozen=True)
class Pass:
    """What one round cost.

    Attributes:
        number: the round.
        steps: node path -> optimizer steps on its own data; those of a node that took no part are
            left out, and so are those that a private node does not tell.
        sequential: steps that cannot be made at the same time, None where some are not told.
        seconds: wall seconds.
        federations: bytes on the edges above inner nodes.
        leaves: bytes on the edges above leaves.
    """

    number: int
    steps: Mapping[str, int]
    sequential: int | None
    seconds: float
    federations: Traffic
    leaves: Traffic


def passes_of(run: Run) -> list[Pass]:
    """Return what every round of a language run cost, in order.

    Steps are counted from the tokens that a node trained on; those of private training, which
    tells nothing of that, and of questions with answers, which differ in length, are as configured.
    """
    tree, steps, traffic = run.config.shape(), _steps(run), traffic_of(run)
    timed = run.history.table("rounds").to_pydict()
    found = []
    for number, seconds in zip(timed["round"], timed["seconds"], strict=True):
        made, edges = steps.get(number, {}), traffic.get(number, {})
        told = {path: count for path, count in made.items() if count is not None}
        levels = run.config.method.inner_training() == "before"
        longest = sequential(told, levels) if len(told) == len(made) else None
        above = [edge for path, edge in edges.items() if path != ROOT and not tree.is_leaf(path)]
        below = [edge for path, edge in edges.items() if path != ROOT and tree.is_leaf(path)]
        found.append(Pass(number, told, longest, seconds, _sum(above), _sum(below)))
    return sorted(found, key=lambda one: one.number)


def sequential(steps: Mapping[str, int], levels: bool) -> int:
    """Return the optimizer steps of a round that cannot be made at the same time.

    Args:
        steps: node path -> its steps.
        levels: whether a node trains before its children, who start from what it has made: then
            the largest number of every level counts. Else all nodes train side by side, and the
            largest number of all does.
    """
    if not levels:
        return max(steps.values(), default=0)
    largest: dict[int, int] = {}
    for path, count in steps.items():
        depth = path.count("/")
        largest[depth] = max(largest.get(depth, 0), count)
    return sum(largest.values())


def traffic_of(run: Run) -> dict[int, dict[str, Traffic]]:
    """Return round -> node path -> bytes on the edge above it; of the nodes that were asked.

    A node that is asked several times in a round has all its bytes here.
    """
    found: dict[int, dict[str, Traffic]] = {}
    for row in run.history.table("ledger").to_pylist():
        edges = found.setdefault(row["round"], {})
        up, down = edges.get(row["node"], (0, 0))
        edges[row["node"]] = (up + row["up"], down + row["down"])
    return found


def private_nodes(run: Run) -> set[str]:
    """Return the paths of the nodes whose training is private."""
    tree, rules = run.config.shape(), run.config.rules
    return {path for path, held in inherited(tree, rules).items() if held.privacy is not None}


def holders(run: Run) -> list[str]:
    """Return the paths of the nodes that hold text, parents first."""
    texts = {name for name, node in run.config.nodes.items() if node.text is not None}
    return [path for path in run.config.shape().walk() if name_of(path) in texts]


def _steps(run: Run) -> dict[int, dict[str, int | None]]:
    """Return round -> node path -> its steps, None where they are not told."""
    config, tree = run.config, run.config.shape()
    rules = inherited(tree, config.rules)
    hold, private = set(holders(run)), private_nodes(run)
    context = config.text.context if config.text else 1
    found: dict[int, dict[str, int | None]] = {}
    for row in run.history.table("ledger").to_pylist():
        path, counts = row["node"], found.setdefault(row["round"], {})
        own = rules[path].applied(config.training) if path in rules else config.training
        if row["count"] and config.text is not None and config.text.answers is not None:
            counts[path] = None if own.steps is None else own.steps * own.epochs
        elif row["count"]:
            # A pass over all data may end in a smaller batch, so epochs are counted one by one.
            turns = own.epochs if own.steps is None else 1
            batches = -(-row["count"] // (context * own.batch_size * turns)) * turns
            counts[path] = (counts.get(path) or 0) + int(batches)
        elif path in hold & private and row["fate"] == "ok" and not row["error"]:
            before, steps = counts.get(path, 0), own.steps
            if before is not None and steps is not None:
                counts[path] = before + steps * own.epochs
            else:
                counts[path] = None
    return found


def _sum(edges: Iterable[Traffic]) -> Traffic:
    pairs = list(edges)
    return sum(up for up, _ in pairs), sum(down for _, down in pairs)

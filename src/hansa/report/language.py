"""What a page says of runs that train a language model over a tree of nodes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hansa.federation.history import perplexity
from hansa.federation.tree import ROOT, name_of
from hansa.report.attention import attention_of
from hansa.report.effort import Pass, holders, passes_of, private_nodes, traffic_of
from hansa.report.matrices import matrix
from hansa.report.measure import scored_by
from hansa.report.parts import Part, plot, table
from hansa.report.plots import Points, lines, moments
from hansa.report.residuals import residuals_of
from hansa.report.sizes import size
from hansa.report.tree import Box, draw
from hansa.runs import Run

AFTER, TRAINED = "test", "test:trained"
MOMENTS = ("after the aggregation", "after local steps")
MAX_TOGETHER = 8
"""Nodes up to which their curves stand in one panel."""
MAX_SHOWN = 12
"""Rows up to which a table of rounds is open."""


def lead(run: Run, more: str) -> str:
    """Return one line about what runs of a page have in common."""
    config, tree, hold = run.config, run.config.shape(), holders(run)
    text = config.text
    leaves = sum(tree.is_leaf(path) for path in hold)
    about = ""
    if text is not None:
        kind = "bytes" if text.tokenizer == "bytes" else f"at most {text.vocabulary} byte pairs"
        about = f"tokens {kind}, context {text.context}, "
    return (
        f"A tree of {sum(1 for _ in tree.walk())} nodes, {len(hold)} of them with text "
        f"({leaves} leaves), {about}model {config.model.name}, "
        f"{run.history.num_rounds} rounds, {more}"
    )


def results(runs: Mapping[str, Run]) -> Part:
    """Return what every run reached, over its leaves."""
    rows = []
    for label, run in runs.items():
        summary = run.history.summary()
        metrics = summary["metrics"]
        chosen = metrics.get("perplexity_chosen")
        after = metrics.get("perplexity")
        trained = metrics.get("perplexity_after_local_steps")
        rows.append(
            [
                label,
                *(_of(after, key) for key in ("mean", "std", "worst_tenth")),
                f"{_of(chosen, 'mean')} (round {chosen['round']})" if chosen else "-",
                _of(trained, "mean"),
                _of(metrics.get("bits_per_byte"), "mean"),
                size(summary["bytes"]["up"]),
                size(summary["bytes"]["down"]),
                f"{summary['seconds']:.1f}",
            ]
        )
    columns = ["method", "perplexity", "std", "worst tenth", "at chosen round"]
    columns += ["after local steps", "bits per byte", "up", "down", "seconds"]
    note = (
        "Over leaves, each with its own model on its own test text, after the last round; lower "
        "is better. Perplexity is the exponential of the mean loss per token: its mean, standard "
        "deviation, and mean over the worst tenth of the leaves, after the aggregation, before "
        "any further training. After local steps: the same models once they have trained in the "
        "last round. Bits per byte, after the aggregation, compare over tokenizers as well. The "
        "chosen round is the one of lowest validation loss. Bytes are those of all messages as "
        "encoded, over all rounds."
    )
    return table("Results", columns, rows, note)


def plots(runs: Mapping[str, Run]) -> list[Part]:
    """Return what is shown of every run, and of several first how they compare."""
    if len(runs) == 1:
        return [part for run in runs.values() for part in (*reached(run), *made_by(run))]
    parts = side_by_side(runs)
    for label, run in runs.items():
        parts += reached(run, f", {label}")
        parts += [{**part, "folded": True} for part in made_by(run, f", {label}")]
    return parts


def reached(run: Run, named: str = "") -> list[Part]:
    """Return how well the nodes of a run do; ``named`` stands behind titles."""
    return [
        tree_of(run, named),
        nodes_of(run, named),
        *curves_of(run, named),
        *matrices_of(run, named),
    ]


def made_by(run: Run, named: str = "") -> list[Part]:
    """Return what passed between the nodes of a run, and what it cost."""
    return [*attention_of(run, named), *residuals_of(run, named), *effort_of(run, named)]


def side_by_side(runs: Mapping[str, Run]) -> list[Part]:
    """Return perplexity and bytes of several runs over rounds."""
    curves = {label: _both(run, None) for label, run in runs.items()}
    title = "Perplexity over rounds"
    caption = "Mean over leaves, each with its own model on its own test text."
    parts = _curves(title, caption, {title: curves})
    traffic = {}
    for label, run in runs.items():
        by_round = sorted(run.history.bytes().items())
        totals = np.cumsum([up + down for _, (up, down) in by_round])
        traffic[label] = [(n, float(t)) for (n, _), t in zip(by_round, totals, strict=True)]
    title = "Bytes over rounds"
    svg = lines(traffic, title=title, x="round", y="bytes so far", bytes_=True)
    caption = "Messages up and down together, summed from the first round on."
    return [*parts, plot(title, caption, svg)]


def tree_of(run: Run, named: str = "") -> Part:
    """Return the tree, drawn, with what every node reached and every edge carried."""
    tree, private = run.config.shape(), private_nodes(run)
    hold, reached = set(holders(run)), _last(run, AFTER, "perplexity")
    spent = run.history.epsilons()
    steps: dict[str, int] = {}
    edges: dict[str, tuple[int, int]] = {}
    for one in passes_of(run):
        steps |= one.steps
    for _, asked in sorted(traffic_of(run).items()):
        edges |= asked
    boxes = {}
    for path in tree.walk():
        name, up, down = name_of(path), *edges.get(path, (0, 0))
        said = [name]
        if path in hold:
            # Options of a source, which stand in the table below, would not fit the box.
            said.append(str(run.config.nodes[name].text).partition("?")[0])
            said += [f"perplexity {number(reached[name])}"] if name in reached else []
            work = [f"{steps[path]} steps"] if path in steps else []
            if path in private:
                work.append(f"\N{GREEK SMALL LETTER EPSILON} = {spent.get(name) or 0.0:.2f}")
            said += [", ".join(work)] if work else []
        else:
            said.append("no text of its own")
        edge = (f"\N{DOWNWARDS ARROW} {size(down)}", f"\N{UPWARDS ARROW} {size(up)}")
        boxes[path] = Box(tuple(said), edge if up or down else ("", ""), path in hold & private)
    title = f"The tree{named}"
    caption = (
        "Each node with its text, the perplexity of its own model on its own test text after the "
        "aggregation of the last round, and its optimizer steps in a round. Above it the bytes "
        "that its edge carries in a round, down and up."
    )
    if hold & private:
        caption += (
            " A dashed frame: training is private, and \N{GREEK SMALL LETTER EPSILON} is what it "
            "has spent."
        )
    return plot(title, caption, draw(tree, boxes, title))


def nodes_of(run: Run, named: str = "") -> Part:
    """Return a table of the nodes with text, and of their leaves' mean."""
    tree, private, spent = run.config.shape(), private_nodes(run), run.history.epsilons()
    hold = holders(run)
    common = {
        text: perplexity(v) for (i, text), v in run.history.pairs("loss").items() if i == ROOT
    }
    scores = [
        _last(run, AFTER, "perplexity"),
        _last(run, TRAINED, "perplexity"),
        common,
        _last(run, AFTER, "bits_per_byte"),
    ]
    edges: dict[str, tuple[int, int]] = {}
    for asked in traffic_of(run).values():
        for path, (up, down) in asked.items():
            before = edges.get(path, (0, 0))
            edges[path] = (before[0] + up, before[1] + down)
    is_private = bool(set(hold) & private)
    rows: list[list[str]] = []
    for path in hold:
        name, (up, down) = name_of(path), edges.get(path, (0, 0))
        row = [name]
        row += [number(values[name]) if name in values else "-" for values in scores]
        row += [size(up), size(down)] if path != ROOT else ["-", "-"]
        if is_private:
            row.append(f"{spent.get(name) or 0.0:.2f}" if path in private else "-")
        rows.append([*row, str(run.config.nodes[name].text)])
    leaves = [name_of(path) for path in hold if tree.is_leaf(path)]
    for what, of in (("mean of leaves", np.mean), ("std of leaves", np.std)):
        found = [[values[name] for name in leaves if name in values] for values in scores]
        row = [what, *(number(float(of(values))) if values else "-" for values in found)]
        rows.append(row + [""] * (4 if is_private else 3))
    columns = [
        "node",
        "own model",
        "after local steps",
        "root's model",
        "bits per byte",
        "up",
        "down",
    ]
    columns += ["\N{GREEK SMALL LETTER EPSILON} spent"] if is_private else []
    note = (
        "Perplexity on the node's own test text after the last round: of its own model after the "
        "aggregation, of the same after the local steps of that round, and of the root's common "
        "model. Bits per byte are the own model's after the aggregation. Bytes of all rounds on "
        "the edge above the node."
    )
    return table(f"Nodes{named}", [*columns, "text"], rows, note)


def curves_of(run: Run, named: str = "") -> list[Part]:
    """Return the perplexity of every node over rounds; of many nodes, a panel per federation."""
    title = f"Perplexity of every node over rounds{named}"
    tree, hold = run.config.shape(), holders(run)
    groups: dict[str, list[str]] = {title: hold}
    if len(hold) > MAX_TOGETHER:
        groups = {}
        for path in tree.walk():
            if path == ROOT:
                title_of, near = "The root and its children", [path, *tree.children(path)]
            else:
                title_of, near = f"Below {name_of(path)}", [*tree.children(path)]
            if members := [one for one in near if one in hold]:
                groups[title_of] = members
    panels = {
        panel: {name_of(path): _both(run, name_of(path)) for path in members}
        for panel, members in groups.items()
    }
    caption = "Each node's own model on its own test text; the axis is logarithmic."
    return _curves(title, caption, panels)


def matrices_of(run: Run, named: str = "") -> list[Part]:
    """Return the matrix of models against texts, where the run compared them."""
    crossed = run.history.pairs("bits_per_byte")
    if not crossed:
        return []
    order = [name_of(path) for path in run.config.shape().walk()]
    rows = sorted({i for i, _ in crossed}, key=lambda name: (name != ROOT, order.index(name)))
    columns = sorted({j for _, j in crossed}, key=order.index)
    title = f"Every model on every node's text{named}"
    svg = matrix(crossed, rows, columns, title=title, x="test text of", y="model of")
    caption = (
        "Bits per byte after the last round, of models after the aggregation; lower, and lighter, "
        "is better. The root's row is that of the common model."
    )
    return [plot(title, caption, svg)]


def effort_of(run: Run, named: str = "") -> list[Part]:
    """Return tables of optimizer steps, seconds, and bytes by kind of edge."""
    passes = passes_of(run)
    rows = [_row(one.number, [one]) for one in passes]
    if len(rows) > 1:
        rows.append(_row("all", passes))
    levels = run.config.method.inner_training() == "before"
    how = (
        "here a node trains before its children, so that is the sum over the levels of the tree "
        "of the largest number of steps there"
        if levels
        else "here all nodes train side by side, so that is the largest number of any node"
    )
    if run.config.method.pools:
        how = "here all text is in one place and trained on there, so those are all of them"
    note = (
        "Optimizer steps of all nodes together, and of those the ones that cannot be made at the "
        f"same time: {how}. Seconds are the round's on this machine, scoring included. Edges are "
        "those above inner nodes (of federations) and above leaves."
    )
    columns = ["round", "steps", "one after another", "seconds"]
    columns += ["federations, up", "down", "leaves, up", "down"]
    counts: dict[str, list[int]] = {}
    for one in passes:
        for path, steps in one.steps.items():
            counts.setdefault(path, []).append(steps)
    order = [path for path in run.config.shape().walk() if path in counts]
    order += sorted(counts.keys() - set(order))
    each = [
        [name_of(path), counts[path][-1], len(counts[path]), f"{sum(counts[path]):,}"]
        for path in order
    ]
    return [
        table(f"Cost of a round{named}", columns, rows, note, len(rows) > MAX_SHOWN),
        table(
            f"Optimizer steps of every node{named}",
            ["node", "in its last round", "rounds", "in all"],
            each,
            "On the node's own text.",
            True,
        ),
    ]


def number(value: float) -> str:
    """Return a perplexity, or bits, as a text of few digits."""
    if value < 1000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 1e7 else f"{value:.3g}"


def _row(name: object, passes: Sequence[Pass]) -> list[object]:
    longest = [one.sequential for one in passes]
    told = [count for count in longest if count is not None]
    row: list[object] = [
        name,
        f"{sum(sum(one.steps.values()) for one in passes):,}",
        f"{sum(told):,}" if len(told) == len(longest) else "not told",
        f"{sum(one.seconds for one in passes):.1f}",
    ]
    for edges in ([one.federations for one in passes], [one.leaves for one in passes]):
        row += [size(sum(up for up, _ in edges)), size(sum(down for _, down in edges))]
    return row


def _both(run: Run, name: str | None) -> tuple[Points, Points]:
    """Return the perplexity over rounds at both moments: of a node, or the mean over leaves."""
    found = []
    for split in (AFTER, TRAINED):
        if name is None:
            by_round = scored_by(run, split, "perplexity")
            points = [(n, float(np.mean(list(row.values())))) for n, row in by_round.items() if row]
        else:
            by_round = run.history.scored(split, "perplexity")
            points = [(n, row[name]) for n, row in by_round.items() if name in row]
        found.append(sorted(points))
    return found[0], found[1]


def _curves(
    title: str, caption: str, panels: Mapping[str, Mapping[str, tuple[Points, Points]]]
) -> list[Part]:
    if not any(points for row in panels.values() for both in row.values() for points in both):
        return []
    svg = moments(panels, title=title, x="round", y="perplexity", names=MOMENTS)
    caption += f" Solid: {MOMENTS[0]}; dashed: {MOMENTS[1]}."
    return [plot(title, caption, svg)]


def _last(run: Run, split: str, metric: str) -> dict[str, float]:
    by_round = run.history.scored(split, metric)
    return by_round[max(by_round)] if by_round else {}


def _of(values: Mapping[str, Any] | None, key: str) -> str:
    return "-" if values is None else number(values[key])

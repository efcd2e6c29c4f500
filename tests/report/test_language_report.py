"""Pages and tables of language runs, on runs whose every number is written down here."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from scipy.stats import wilcoxon

import hansa
from hansa import cli
from hansa.federation.engines.engine import RoundResult, Visit
from hansa.federation.tree import ROOT, Tree
from hansa.report import report
from hansa.report.attention import attention_of
from hansa.report.comparison import Comparison
from hansa.report.effort import passes_of, sequential
from hansa.report.matrices import matrix
from hansa.report.measure import ACCURACY, PERPLEXITY
from hansa.report.plots import Stack, lines, moments, stacks, strips
from hansa.report.residuals import residuals_of
from hansa.report.tree import GAP, MAX_STACKED, WIDTH, Box, draw
from hansa.runs import Run
from support import config

CONTEXT, BATCH = 4, 2
OWN = {"root": 8.0, "root/prose/a": 16.0, "root/prose/b": 4.0, "root/c": 2.0}
"""Node with text -> perplexity of its own model after the aggregation of the last round."""
NODES: dict[str, Any] = {
    "root": {"text": "python:manual"},
    "prose": {},
    "a": {"parent": "prose", "text": "file:/texts/<a>.txt", "steps": 3},
    "b": {"parent": "prose", "text": "python:licences", "privacy": {"noise": 1.0}, "steps": 5},
    "c": {"text": "python:headers"},
}


def values(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "t",
        "output": str(tmp_path),
        "rounds": 2,
        "text": {"context": CONTEXT},
        "nodes": NODES,
        "training": {"batch_size": BATCH, "steps": 2},
        "method": {"name": "worldlm"},
        **changes,
    }


def pair(value: float) -> tuple[float, float]:
    """Return a mean over ten tokens as a sum and a count."""
    return 10 * value, 10.0


def visits(spent: bool = False) -> tuple[Visit, ...]:
    def trained(steps: int) -> dict[str, tuple[float, float]]:
        return {"loss": (1.0, float(steps * BATCH * CONTEXT))}

    return (
        Visit("root", "ok", 0, metrics=trained(2)),
        Visit("root/c", "ok", 100, 200, metrics=trained(2)),
        Visit("root/prose", "ok", 1000, 2000),
        Visit("root/prose/a", "ok", 10, 20, metrics=trained(3)),
        Visit("root/prose/b", "spent" if spent else "ok", 30, 0 if spent else 40),
    )


def result(number: int, scale: float = 1.0, **changes: Any) -> RoundResult:
    """Return a round in which a node's perplexity is ``scale`` times that of the last round."""
    scores = {
        path: {
            "validation": {"loss": pair(math.log(scale * own))},
            "test": {
                "loss": pair(math.log(scale * own)),
                "bits_per_byte": pair(math.log2(scale * own)),
            },
            "test:trained": {"loss": pair(math.log(scale * own / 2))},
            "state": {"epsilon": (0.75 * number, 1.0)} if path.endswith("/b") else {},
        }
        for path, own in OWN.items()
    }
    crossed = tuple(
        (i, j, metric, *pair(value))
        for k, i in enumerate(OWN)
        for j in OWN
        for metric, value in (("loss", math.log(3.0)), ("bits_per_byte", 1.25 + k))
    )
    figures = (
        ("root", "root", "attention_up", 0.5),
        ("root", "root/prose", "attention_up", 0.3),
        ("root", "root/c", "attention_up", 0.2),
        ("root", "", "entropy_up", math.log(3)),
        ("root/c", "root/c", "attention_down", 0.6),
        ("root/c", "root", "attention_down", 0.1),
        ("root/c", "root/prose/a", "attention_down", 0.3),
        ("root/c", "", "entropy_down", 0.9),
    )
    content = {"visits": visits(), "pairs": crossed, "figures": figures, **changes}
    return RoundResult(number=number, scores=scores, seconds=1.5, engine="by hand", **content)


def made(
    tmp_path: Path,
    scale: float = 1.0,
    last: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Run:
    """Return a run of two rounds, the second with everything half as perplexing as the first."""
    run = Run.create(hansa.config.load(values(tmp_path, **changes)))
    run.store()
    run.record(result(1, 2 * scale), None)
    run.record(result(2, scale, **(last or {})), None)
    return run


def cells(text: str, title: str) -> list[list[str]]:
    """Return the rows of one table of a page."""
    body = text[text.index(f"{title}</h2>") :]
    rows = re.findall(r"<tr>(.*?)</tr>", body[: body.index("</table>")], re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def texts(svg: str) -> list[str]:
    return [node.text for node in ElementTree.fromstring(svg).iter() if node.text]  # noqa: S314


def test_a_page_tells_of_text_and_nodes_and_needs_nothing_from_elsewhere(tmp_path) -> None:
    text = report([made(tmp_path)]).read_text()
    lead = "A tree of 5 nodes, 4 of them with text (3 leaves), tokens bytes, context 4, model llama"
    assert f"{lead}, 2 rounds, method worldlm, seed 0" in text
    assert "partition" not in text
    assert re.findall(r'aria-label="([^"]*)">\n', text) == [
        "The tree",
        "Perplexity of every node over rounds",
        "Every model on every node&#39;s text",
        "What inner nodes make their key blocks of",
    ]
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert "<script" not in text


def test_results_are_over_leaves_at_both_moments(tmp_path) -> None:
    text = report([made(tmp_path)]).read_text()
    head, row = cells(text, "Results")
    shown = dict(zip(head, row, strict=True))
    leaves = [16.0, 4.0, 2.0]
    mean = sum(leaves) / 3
    std = (sum((value - mean) ** 2 for value in leaves) / 3) ** 0.5
    assert shown["perplexity"] == f"{mean:.2f}" == "7.33"
    assert shown["std"] == f"{std:.2f}"
    assert shown["worst tenth"] == "16.00"
    assert shown["at chosen round"] == "7.33 (round 2)"
    assert shown["after local steps"] == f"{mean / 2:.2f}"
    assert shown["bits per byte"] == f"{(4 + 2 + 1) / 3:.2f}"
    assert (shown["up"], shown["down"]) == ("4.52 kB", "2.28 kB")


def test_every_node_has_its_row(tmp_path) -> None:
    head, *rows = cells(report([made(tmp_path)]).read_text(), "Nodes")
    shown = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(shown) == ["root", "c", "a", "b", "mean of leaves", "std of leaves"]
    assert shown["a"] == {
        "node": "a",
        "own model": "16.00",
        "after local steps": "8.00",
        "root&#39;s model": "3.00",
        "bits per byte": "4.00",
        "up": "40 B",
        "down": "20 B",
        "ε spent": "-",
        "text": "file:/texts/&lt;a&gt;.txt",
    }
    assert shown["b"]["ε spent"] == "1.50"
    assert shown["mean of leaves"]["own model"] == "7.33"
    assert shown["std of leaves"]["root&#39;s model"] == "0.00"


def test_the_matrix_has_the_root_first_and_every_value(tmp_path) -> None:
    text = report([made(tmp_path)]).read_text()
    svg = text[text.index('aria-label="Every model on') :]
    svg = svg[svg.index("<svg") : svg.index("</svg>") + 6]
    shown = texts(svg)
    names = [word for word in shown if word in ("root", "a", "b", "c")]
    assert names == ["root", "c", "a", "b"] * 2  # of the columns, then of the rows
    numbers = [word for word in shown if re.fullmatch(r"\d\.\d\d", word)][:16]
    assert numbers == [f"{1.25 + k:.2f}" for k in (0, 3, 1, 2) for _ in range(4)]


def test_the_tree_says_what_nodes_reached_and_edges_carried(tmp_path) -> None:
    text = report([made(tmp_path)]).read_text()
    svg = text[text.index("<svg") : text.index("</svg>") + 6]
    shown = texts(svg)
    for word in ("root", "python:manual", "perplexity 8.00", "no text of its own"):
        assert word in shown
    assert "5 steps, ε = 1.50" in shown
    assert "3 steps" in shown
    assert {"↓ 1.00 kB", "↑ 2.00 kB", "↓ 10 B", "↑ 20 B", "↓ 30 B", "↑ 40 B"} <= set(shown)
    assert svg.count("stroke-dasharray") == 1


def test_a_budget_that_is_spent_has_a_column_only_then(tmp_path) -> None:
    whole = report([made(tmp_path)]).read_text()
    assert "budget" not in whole.partition("<h2>Configuration")[0]
    text = report([made(tmp_path, last={"visits": visits(spent=True)})]).read_text()
    title = "Nodes that were late or failed, or had spent their budget"
    head, row = cells(text, title)
    assert head == ["method", "asked", "answered", "late", "failed", "budget spent"]
    assert row == ["worldlm", "10", "9", "0", "0", "1"]


def test_who_was_excluded_is_counted_and_named(tmp_path) -> None:
    odd = tuple(
        replace(visit, fate="excluded") if visit.path == "root/c" else visit for visit in visits()
    )
    text = report([made(tmp_path, last={"visits": odd})]).read_text()
    head, row = cells(text, "Nodes that were late or failed, or were excluded")
    assert head == ["method", "asked", "answered", "late", "failed", "excluded"]
    assert row == ["worldlm", "10", "9", "0", "0", "1"]
    assert "which were not merged: c." in text


def test_several_runs_stand_side_by_side(tmp_path) -> None:
    runs = [made(tmp_path), made(tmp_path, 3.0, method={"name": "hierfavg"})]
    text = report(runs).read_text()
    assert "<title>Hansa: worldlm, hierfavg</title>" in text
    assert "methods worldlm, hierfavg, seed 0" in text
    assert [row[1] for row in cells(text, "Results")[1:]] == ["7.33", "22.00"]
    titles = re.findall(r'aria-label="([^"]*)">\n', text)
    assert titles[:3] == ["Perplexity over rounds", "Bytes over rounds", "The tree, worldlm"]
    assert "Every model on every node&#39;s text, hierfavg" in titles


def test_many_nodes_are_drawn_by_federation(tmp_path) -> None:
    nodes = {f"f{k}": {} for k in range(3)}
    nodes |= {f"w{k}": {"parent": f"f{k % 3}", "text": "python:manual"} for k in range(9)}
    run = Run.create(hansa.config.load(values(tmp_path, nodes=nodes)))
    run.store()
    found = {f"root/f{k % 3}/w{k}": {"test": {"loss": pair(1.0 + k)}} for k in range(9)}
    asked = tuple(Visit(path, "ok", 1, 1) for path in [*found, "root/f0", "root/f1", "root/f2"])
    run.record(RoundResult(1, asked, found, 1.0), None)
    text = report([run]).read_text()
    curves = text[text.index("Perplexity of every node") :]
    assert re.findall(r"Below f\d", curves[: curves.index("<figcaption>")]) == [
        "Below f0",
        "Below f1",
        "Below f2",
    ]


def test_a_run_that_was_never_scored_is_reported(tmp_path) -> None:
    run = Run.create(hansa.config.load(values(tmp_path)))
    run.store()
    run.record(RoundResult(1, visits(), {}, 1.0), None)
    text = report([run]).read_text()
    assert cells(text, "Results")[1][1:7] == ["-"] * 6
    assert cells(text, "Nodes")[1][1:5] == ["-"] * 4


def test_classifiers_and_language_models_stand_on_no_common_page(tmp_path) -> None:
    other = hansa.train(config(tmp_path, rounds=1))
    with pytest.raises(hansa.InputError, match="a run of another kind"):
        report([made(tmp_path / "language"), other])


def test_steps_that_cannot_be_made_at_the_same_time() -> None:
    steps = {"root": 4, "root/a": 3, "root/b": 7, "root/a/c": 2, "root/a/d": 9}
    assert sequential(steps, levels=True) == 4 + 7 + 9
    assert sequential(steps, levels=False) == 9
    assert sequential({}, levels=True) == sequential({}, levels=False) == 0


def test_what_a_round_cost(tmp_path) -> None:
    first, _ = passes_of(made(tmp_path))
    assert first.steps == {"root": 2, "root/c": 2, "root/prose/a": 3, "root/prose/b": 5}
    assert first.sequential == 2 + 2 + 5  # root, then c beside prose, then the leaves
    assert (first.federations, first.leaves) == ((2000, 1000), (260, 140))
    assert first.seconds == 1.5
    beside, _ = passes_of(made(tmp_path, method={"name": "worldlm", "schedule": "parallel"}))
    assert beside.sequential == 5


def test_steps_of_private_epochs_are_not_told(tmp_path) -> None:
    nodes = {**NODES, "b": {key: NODES["b"][key] for key in ("parent", "text", "privacy")}}
    run = made(tmp_path, nodes=nodes, training={"batch_size": BATCH, "epochs": 2})
    first, _ = passes_of(run)
    assert "root/prose/b" not in first.steps
    assert first.sequential is None
    assert cells(report([run]).read_text(), "Cost of a round")[1][2] == "not told"


def test_steps_of_epochs_count_the_smaller_last_batch(tmp_path) -> None:
    # Two epochs over five sequences, in batches of two: three steps each.
    tokens = {"loss": (1.0, 2.0 * 5 * CONTEXT)}
    nodes = {"c": {"text": "python:headers"}}
    run = Run.create(
        hansa.config.load(
            values(tmp_path, nodes=nodes, training={"batch_size": BATCH, "epochs": 2})
        )
    )
    run.store()
    run.record(RoundResult(1, (Visit("root/c", "ok", 1, 1, metrics=tokens),), {}, 1.0), None)
    assert passes_of(run)[0].steps == {"root/c": 6}


def test_several_turns_in_a_round_add_up(tmp_path) -> None:
    run = made(tmp_path, last={"visits": (*visits(), *visits()[3:])})
    first, second = passes_of(run)
    assert second.steps["root/prose/a"] == 2 * first.steps["root/prose/a"]
    assert second.steps["root/prose/b"] == 2 * first.steps["root/prose/b"]
    assert second.leaves == (200 + 2 * 60, 100 + 2 * 40)


def test_attention_is_named_and_shared_out(tmp_path) -> None:
    up, down = attention_of(made(tmp_path))
    shown = texts(str(up["svg"]))
    assert [w for w in shown if w.endswith(" 50%") or w.endswith(" 30%") or w.endswith(" 20%")] == [
        "root itself 50%",
        "c 20%",
        "prose 30%",
    ]
    assert down["rows"] == [["c", "60 %", "10 %", "30 % (a)", "0.90"]]
    other = Run.create(hansa.config.load(values(tmp_path)))
    assert attention_of(other) == []


def test_residuals_are_shown_where_any_was_cut(tmp_path) -> None:
    assert residuals_of(made(tmp_path)) == []
    figures = (
        ("root", "", "residuals_cut", 2.0),
        ("root/prose", "", "residuals_cut", 1.0),
        ("root/prose", "", "residuals_up", 1.0),
        ("root", "", "residuals_held", 3.0),
        ("root/c", "", "residuals_used", 0.0),
    )
    plot, flow = residuals_of(made(tmp_path, last={"figures": figures}))
    assert plot["title"] == "Residuals over rounds"
    assert flow["columns"] == ["round", "cut", "up", "held", "used", "expired", "lost"]
    assert flow["rows"] == [
        [2, "3", "1", "3", "0", "0", "0"],
        ["all", "3", "1", "", "0", "0", "0"],
    ]


def boxes_of(svg: str) -> Iterator[tuple[float, float, float, float]]:
    for node in ElementTree.fromstring(svg).iter():  # noqa: S314
        if node.tag.endswith("rect"):
            x, y, width, height = (float(node.attrib[k]) for k in ("x", "y", "width", "height"))
            yield x, y, x + width, y + height


@pytest.mark.parametrize(
    "parents",
    [
        {f"w{k:02}": ROOT for k in range(30)},
        {"n": ROOT, "m": "n", "a": "m", "b": "m", "c": "n", "d": ROOT},
        {**{f"f{k}": ROOT for k in range(7)}, **{f"w{k:02}": f"f{k % 7}" for k in range(23)}},
    ],
)
def test_no_two_boxes_of_a_tree_overlap(parents: dict[str, str]) -> None:
    tree = Tree(parents)
    boxes = {
        path: Box((path.rpartition("/")[2], "text", "perplexity 1.00"), ("down", "up"))
        for path in tree.walk()
    }
    svg = draw(tree, boxes, "tree")
    width, height = map(float, re.findall(r'viewBox="0 0 (\S+) (\S+)"', svg)[0])
    placed = list(boxes_of(svg))
    assert len(placed) == len(boxes)
    assert placed[0][1] == min(top for _, top, _, _ in placed)  # the root is at the top
    for k, (left, top, right, bottom) in enumerate(placed):
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        for other in placed[k + 1 :]:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert apart
    assert width <= max(5, len(set(parents.values()))) * (WIDTH + GAP) + GAP
    assert MAX_STACKED >= 6  # so that thirty leaves fit five columns


def test_a_tree_escapes_what_a_user_wrote_and_cuts_what_is_long() -> None:
    tree = Tree({"a": ROOT})
    long = "file:/a/long/way/to/<text>.txt"
    svg = draw(tree, {"root": Box(("root",)), "root/a": Box(("a", long))}, "a & b")
    assert "<text>.txt" not in svg
    shown = texts(svg)
    assert "file:/a/l…g/way/to/<text>.txt"[-11:] in "".join(shown)
    assert f"a, {long}" in shown  # the whole of it is a tool tip


def test_a_matrix_writes_its_values_in_the_order_that_was_asked_for() -> None:
    crossed = {("z", "y"): 1.0, ("z", "x"): 2.5, ("w", "y"): 4.0}
    svg = matrix(crossed, ["z", "w"], ["y", "x"], title="m", x="t", y="m")
    assert [word for word in texts(svg) if re.fullmatch(r"\d\.\d\d", word)][:3] == [
        "1.00",
        "2.50",
        "4.00",
    ]
    assert "<image" not in svg
    flat = matrix({("z", "y"): 1.0}, ["z"], ["y"], title="m", x="t", y="m")
    assert "1.00" in texts(flat)


def test_moments_are_solid_and_dashed_on_a_logarithmic_axis() -> None:
    both = ([(1, 100.0), (2, 10.0)], [(1, 50.0), (2, 5.0)])
    names = ("solid", "dashed")
    svg = moments({"one": {"a": both}}, title="t", x="round", y="p", names=names)
    dashes = svg.count("stroke-dasharray")
    plain = moments({"one": {"a": (both[0], [])}}, title="t", x="round", y="p", names=names)
    assert dashes == plain.count("stroke-dasharray") + 1
    ticks = [word for word in texts(svg) if word in ("5", "10", "20", "50", "100")]
    assert ticks == ["5", "10", "20", "50", "100"]
    near = lines({"a": [(1, 20.0), (2, 21.0)]}, title="t", x="x", y="y", log=True)
    assert len([word for word in texts(near) if re.fullmatch(r"2[01](\.\d)?", word)]) >= 3


def test_shares_are_stacked_and_points_stand_on_a_logarithmic_axis() -> None:
    panels = {"n": Stack([1, 2], {"n itself": [0.5, 0.25], "m": [0.5, 0.75]}, [1.0, 0.8])}
    shown = texts(stacks(panels, title="s", x="round", line="entropy"))
    assert {"n itself 25%", "m 75%", "entropy"} <= set(shown)
    row = texts(strips({"a": [1.0, 900.0]}, title="t", x="p", one="a leaf", log=True))
    assert {"a leaf", "1", "10", "100"} <= set(row)


def test_spreads_and_differences_are_written_in_the_measure_s_unit() -> None:
    assert ACCURACY.spread({"mean": 0.971, "std": 0.002}) == "97.1 ± 0.2 %"
    assert PERPLEXITY.spread({"mean": 7.333, "std": 0.1}) == "7.33 ± 0.10"
    assert PERPLEXITY.spread(None) == "-"
    assert (ACCURACY.difference(0.012), PERPLEXITY.difference(-0.5)) == ("+1.2", "-0.50")


@pytest.fixture
def found(tmp_path) -> Comparison:
    """Two methods on two seeds: the second is twice as perplexing on every leaf."""
    scales = {"worldlm": (1.0, 1.5), "fedavg": (2.0, 3.0)}
    runs = {
        label: {
            seed: made(tmp_path / f"{label}{seed}", scale, method={"name": label}, seed=seed)
            for seed, scale in enumerate(row)
        }
        for label, row in scales.items()
    }
    return Comparison(tmp_path, runs)


def test_methods_are_compared_by_perplexity_and_lower_is_better(found: Comparison) -> None:
    assert found.measure is PERPLEXITY
    assert found.scores["worldlm"][0] == pytest.approx({"a": 16.0, "b": 4.0, "c": 2.0})
    row = found.rows["fedavg"]
    mean = 22 / 3
    assert row["perplexity"]["mean"] == pytest.approx(2.5 * mean)
    assert row["perplexity"]["std"] == pytest.approx(mean / 2**0.5)
    assert row["perplexity_after_local_steps"]["mean"] == pytest.approx(1.25 * mean)
    assert row["bits_per_byte"]["mean"] == pytest.approx(7 / 3 + (1 + math.log2(3)) / 2)
    assert row["worst_tenth"]["mean"] == pytest.approx(40.0)
    assert row["validation"]["mean"] == pytest.approx(2.5 * mean)
    assert "accuracy" not in row
    (only,) = found.pairs
    differences = [-scale * own for scale in (1.0, 1.5) for own in (16.0, 4.0, 2.0)]
    assert only.difference == pytest.approx(sum(differences) / 6)
    assert (only.wins, only.losses) == (6, 0)
    assert only.p == pytest.approx(wilcoxon(differences).pvalue)


def test_the_page_of_a_comparison_is_about_perplexity(found: Comparison) -> None:
    text = found.report().read_text()
    assert cells(text, "Results")[2][:2] == ["fedavg", "18.33 ± 5.19"]
    assert cells(text, "Paired tests against worldlm")[1][:4] == [
        "worldlm - fedavg",
        "-9.17",
        "6",
        "0",
    ]
    assert "accuracy" not in text.lower()
    titles = re.findall(r'aria-label="([^"]*)">\n', text)
    assert titles[:2] == ["Test perplexity of every leaf", "Test perplexity over rounds"]
    assert "Every model on every node&#39;s text, fedavg, seed 0" in titles


def test_the_command_line_shows_perplexity(found: Comparison, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    runs = [row[0] for row in found.runs.values()]
    cli._print([run.summary() for run in runs], False)
    shown = capsys.readouterr().out
    assert re.search(r"worldlm +│ +7\.33 +│ +6\.18 +│ +16\.00 +│ +3\.67 +│ +2\.333", shown)
    assert "over leaves, each its own model on its own test text, last round" in shown
    assert "accuracy" not in shown
    cli._print_comparison(found)
    shown = capsys.readouterr().out
    assert re.search(r"fedavg +│ 18\.33 ± 5\.19 │", shown)
    assert re.search(r"\+9\.17 │ +\d\.\d{3} │", shown)
    assert cli._perplexity(runs[0], result(2)) == "perplexity 7.33 -> 3.67, "
    assert cli._perplexity(runs[0], RoundResult(1, (), {}, 1.0)) == ""


def test_methods_are_not_compared_without_test_text(tmp_path) -> None:
    grid = values(tmp_path, text={"context": CONTEXT, "test": 0.0})
    with pytest.raises(hansa.InputError, match=r"text\.test: found 0\.0; allowed: more than 0"):
        hansa.compare(grid, methods=["local"], seeds=(0,))


def test_what_a_training_run_notes_is_what_its_page_shows(tmp_path) -> None:
    nodes = {
        "root": {"text": "python:manual"},
        "prose": {},
        "a": {"parent": "prose", "text": "python:licences"},
        "b": {"parent": "prose", "text": "python:manual"},
        "c": {"text": "python:headers"},
    }
    small: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    model = {"name": "llama", "options": {**small, "num_attention_heads": 1}}
    found = hansa.compare(
        values(
            tmp_path,
            nodes=nodes,
            model=model,
            text={"context": 8, "most_kb": 1},
            rounds=1,
            engine={"kind": "sequential", "workers": 1},
        ),
        methods=["worldlm", "local"],
        seeds=(0,),
    )
    run = found.runs["worldlm"][0]
    assert passes_of(run)[0].steps == dict.fromkeys(
        ("root", "root/c", "root/prose/a", "root/prose/b"), 2
    )
    text = report([run]).read_text()
    for title in ("The tree", "Every model on every node", "What inner nodes make their key"):
        assert title in text
    assert "Paired tests against worldlm" in found.report().read_text()

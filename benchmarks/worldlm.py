"""Perplexity of language models over trees of federations: WorldLM (our reading) and its baselines.

Every node with text makes the same number of optimizer steps in every pass, whatever the method;
the centralised reference makes as many as all of them together. A tree by language and one by
domain with ``--data``, a folder of texts; without, one of what a Python installation holds.

Further tables, on the tree by language (without ``--data`` on that of Python): WorldLM without
attention and without residuals; all text mixed and dealt out evenly (iid); a quarter to all of two
leaves' text exchanged, so that the tree contradicts the data; gradient noise at two leaves. Their
lines beside nothing changed are those of the first table.

    python benchmarks/worldlm.py [--quick] [--json] [--processes 2] [--tables a,b]
        [--data FOLDER] [--output FOLDER]

Runs are kept in FOLDER (by default ``runs/worldlm``): the same command goes on where it was
stopped.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hansa
from hansa.data.bundled_text import bundled
from hansa.data.text_exchange import exchanged
from hansa.report.sizes import size

MOST_KB = 150
THRESHOLD = 0.95
METHODS: dict[str, dict[str, Any]] = {
    "local": {},
    "fedavg": {},
    "fedper": {"personal": ["*.layers.2.*"]},
    "hierfavg": {},
    "diloco": {},
    "worldlm": {"threshold": THRESHOLD},
    "centralised": {},
}
ABLATION: dict[str, dict[str, Any]] = {
    "worldlm-no-residuals": {"name": "worldlm", "residuals": False},
    "worldlm-mean": {"name": "worldlm", "combine": "mean", "threshold": THRESHOLD},
    "worldlm-mean-no-residuals": {"name": "worldlm", "combine": "mean", "residuals": False},
}
THREE = {name: METHODS[name] for name in ("local", "fedavg", "worldlm")}
FOUR = {name: METHODS[name] for name in ("local", "fedavg", "hierfavg", "worldlm")}
TWO = {name: METHODS[name] for name in ("fedavg", "worldlm")}
PRIVATE = {"unit": "gradient", "clip": 1.0, "noise": 0.5}
TREES: dict[str, dict[str, tuple[str, str | None]]] = {
    # Node -> its parent and its text.
    "language": {
        "root": ("root", "manual-en"),
        "romance": ("root", None),
        "germanic": ("root", None),
        "french": ("romance", "manual-fr"),
        "spanish": ("romance", "manual-es"),
        "portuguese": ("romance", "manual-pt"),
        "german": ("germanic", "manual-de"),
        "dutch": ("germanic", "manual-nl"),
    },
    "domain": {
        "root": ("root", "shakespeare"),
        "general": ("root", None),
        "biomedical": ("root", None),
        "encyclopedia": ("general", "wikipedia-valid"),
        "manual": ("general", "manual-en"),
        "articles": ("biomedical", "biomedical-articles"),
        "abstracts": ("biomedical", "biomedical-abstracts"),
    },
    "python": {
        "root": ("root", "manual"),
        "prose": ("root", None),
        "code": ("root", None),
        "docstrings": ("prose", "docstrings"),
        "licences": ("prose", "licences"),
        "net": ("code", "code-net"),
        "headers": ("code", "headers"),
    },
}
PAIRS = {"language": ("french", "german"), "python": ("licences", "headers")}
"""The leaves of different federations that exchange text, and those that add noise."""


def texts_of(tree: str, data: str | None) -> dict[str, str]:
    """Return the text of every node of a tree that has any, in characters."""
    texts = {}
    for node, (_, name) in TREES[tree].items():
        if name is not None:
            path = Path(data or ".") / f"{name}.txt"
            text = bundled(name) if tree == "python" else path.read_text("utf-8")
            texts[node] = text[: 1000 * MOST_KB]
    return texts


def mixed(texts: Mapping[str, str], spans: int = 60) -> dict[str, str]:
    """Return texts that each hold an equal part of all: spans dealt to the nodes in turn."""
    nodes = list(texts)
    dealt: dict[str, list[str]] = {node: [] for node in nodes}
    for first, node in enumerate(nodes):
        text = texts[node]
        cuts = [len(text) * k // spans for k in range(spans + 1)]
        for k in range(spans):
            dealt[nodes[(first + k) % len(nodes)]].append(text[cuts[k] : cuts[k + 1]])
    return {node: "\n\n".join(parts) for node, parts in dealt.items()}


def tables(data: str | None) -> dict[str, tuple[str, dict[str, str], dict[str, dict[str, Any]]]]:
    """Return each table: its tree, the texts of its nodes, and its methods."""
    names = ("language", "domain") if data else ("python",)
    texts = {name: texts_of(name, data) for name in names}
    made = {name: (name, texts[name], METHODS) for name in names}
    first = names[0]
    one, other = PAIRS[first]
    made["ablation"] = (first, texts[first], ABLATION)
    made["iid"] = (first, mixed(texts[first]), FOUR)
    for percent in (25, 50, 75, 100):
        pair = exchanged(texts[first][one], texts[first][other], percent / 100)
        made[f"exchanged-{percent}"] = (first, texts[first] | {one: pair[0], other: pair[1]}, TWO)
    made["noise"] = (first, texts[first], THREE)
    return made


def config_of(table: str, tree: str, texts: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Return the configuration of a table's runs, after writing its texts."""
    nodes: dict[str, dict[str, Any]] = {}
    for node, (parent, _) in TREES[tree].items():
        nodes[node] = {} if node == "root" else {"parent": parent}
        if node in texts:
            path = folder / f"{node}.txt"
            path.write_text(texts[node], "utf-8")
            nodes[node]["text"] = f"file:{path}"
        if table == "noise" and node in PAIRS[tree]:
            nodes[node]["privacy"] = PRIVATE
    return {
        "name": table,
        "rounds": 6,
        "score_every": 3,
        "text": {"context": 64, "most_kb": 2 * MOST_KB, "validation": 0.02, "test": 0.05},
        "nodes": nodes,
        "model": {
            "name": "llama",
            "options": {"hidden_size": 88, "intermediate_size": 232, "num_attention_heads": 4},
        },
        "training": {"optimizer": "adamw", "lr": 0.004, "batch_size": 8, "steps": 20},
        "engine": {"kind": "sequential", "workers": 1},
    }


def figures(runs: Mapping[int, hansa.Run]) -> dict[str, Any]:
    """Return what one method reached on one table, over its seeds."""
    found: dict[str, list[float]] = {}
    for run in runs.values():
        metrics, leaves = run.history.summary()["metrics"], run.history.leaves()
        common = run.history.pairs("loss")
        rooted = [np.exp(v) for (i, j), v in common.items() if i == "root" and j in leaves]
        row = {
            "perplexity": metrics["perplexity"]["mean"],
            "spread": metrics["perplexity"]["std"],
            "bits": metrics["bits_per_byte"]["mean"],
            "after": metrics.get("perplexity_after_local_steps", metrics["perplexity"])["mean"],
            "root": float(np.mean(rooted)) if rooted else float("nan"),
            "bytes": sum(run.history.summary()["bytes"][way] for way in ("up", "down")),
            "seconds": run.history.summary()["seconds"],
        }
        for key, value in row.items():
            found.setdefault(key, []).append(value)
    return {
        key: {"mean": float(np.mean(values)), "std": float(np.std(values))}
        for key, values in found.items()
    }


def sequential_steps(method: str, config: Mapping[str, Any], tree: str) -> int:
    """Return the optimizer steps of a pass that cannot be made at the same time."""
    steps = int(config["training"]["steps"])
    nodes = TREES[tree]
    holders = [node for node, (_, text) in nodes.items() if text is not None]
    if method == "centralised":
        return steps * len(holders)
    if not method.startswith(("worldlm", "hierfavg")):
        return steps
    depth = {"root": 0}
    for node, (parent, _) in nodes.items():
        depth[node] = 0 if node == "root" else depth[parent] + 1
    return steps * len({depth[node] for node in holders})


def _row(label: str, values: Mapping[str, Mapping[str, float]], steps: int) -> str:
    def of(key: str, digits: int = 2) -> str:
        return f"{values[key]['mean']:.{digits}f} ± {values[key]['std']:.{digits}f}"

    rest = f"{size(values['bytes']['mean'])} | {steps} | {values['seconds']['mean']:.0f}"
    scores = f"{of('perplexity')} | {of('after')} | {of('root')} | {of('bits', 3)}"
    return f"| `{label}` | {scores} | {values['spread']['mean']:.2f} | {rest} |"


def _watch(done: int, total: int, run: hansa.Run) -> None:
    if sys.stderr.isatty():
        print(f"\r  {done}/{total} {run.path.name:40}", end="", file=sys.stderr, flush=True)


def measure(
    name: str, table: tuple[str, dict[str, str], dict[str, dict[str, Any]]], options: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run one table; return its configuration and its figures by method."""
    tree, texts, methods = table
    folder = Path(options.output + ("-quick" if options.quick else "")).resolve()
    (folder / "texts" / name).mkdir(parents=True, exist_ok=True)
    config = config_of(name, tree, texts, folder / "texts" / name)
    seeds: Sequence[int] = range(3)
    if options.quick:
        config |= {"rounds": 2, "training": {**config["training"], "steps": 8}}
        seeds = range(1)
    grid = {**config, "output": str(folder), "methods": methods}
    found = hansa.compare(grid, seeds=seeds, processes=options.processes, watch=_watch)
    return config, {label: figures(found.runs[label]) for label in methods}


def main() -> None:
    """Run the tables and print them, or with ``--json`` also one object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: no claim")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time")
    parser.add_argument("--tables", help="names of tables, by default all")
    parser.add_argument("--data", help="folder of texts: manual-en.txt, manual-fr.txt, ...")
    parser.add_argument("--output", default="runs/worldlm", help="folder of the runs")
    options = parser.parse_args()
    known = tables(options.data)
    names = options.tables.split(",") if options.tables else list(known)
    if options.quick and not options.tables:
        names = [name for name in names if not name.startswith("exchanged") or "100" in name]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--tables: found {unknown[0]!r}; allowed: {', '.join(known)}")
    result: dict[str, dict[str, Any]] = {}
    for name in names:
        config, rows = measure(name, known[name], options)
        steps = config["training"]["steps"]
        print(f"\n{name}: {config['rounds']} passes, {steps} steps per node and pass\n")
        print("| method | perplexity | after local steps | root's model | bits per byte |", end="")
        print(" spread over leaves | bytes | sequential steps | seconds |")
        print("|---|---|---|---|---|---|---|---|---|")
        for label, values in rows.items():
            print(_row(label, values, sequential_steps(label, config, known[name][0])), flush=True)
        result[name] = rows
    if options.json:
        first = next(iter(result.values()))
        print(
            json.dumps(
                {"perplexity": {m: v["perplexity"] for m, v in first.items()}, "tables": result}
            )
        )


if __name__ == "__main__":
    main()

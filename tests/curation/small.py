"""A small federation of questions and answers in files: seconds matter."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
WORDS = ("red", "a stone", "the river", "two", "so be it", "x", "far away")
CLIENTS = ("a", "b", "c")
ALL = (
    "conditional_loss",
    "perplexity",
    "perplexity_whole",
    "ifd",
    "ifd_perplexity",
    "ira",
    "length",
    "duplicates",
)
GRADIENTS = ("tracin", "gradient_cosine", "datainf")


def write(path: Path, records: Sequence[Record]) -> str:
    """Write records as JSON lines, and return them as a source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"jsonl:{path}"


def records(num: int, name: str, domains: Sequence[str] = ("x", "y")) -> list[Record]:
    """Questions that name their holder and number, with answers of several lengths."""
    return [
        {
            "id": f"{name}-{k}",
            "question": f"{name}{k}?",
            "answer": f"{WORDS[(k + len(name)) % len(WORDS)]} {k}",
            "domain": domains[k % len(domains)],
        }
        for k in range(num)
    ]


def config(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Three clients of some twelve examples each, and a curation by 12 anchors."""
    nodes = {
        name: {"text": write(tmp_path / "data" / f"{name}.jsonl", records(10 + 2 * k, name))}
        for k, name in enumerate(CLIENTS)
    }
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    values = {
        "name": "t",
        "output": str(tmp_path / "runs"),
        "rounds": 2,
        "text": {"context": 32, "validation": 0.0, "test": 0.1, "answers": {}},
        "nodes": nodes,
        "model": {"options": {**small, "num_attention_heads": 2}},
        "training": {"optimizer": "adamw", "lr": 0.01, "batch_size": 2},
        "engine": {"kind": "sequential", "workers": 1},
        "curation": curation(tmp_path),
    }
    return {**values, **changes}


def curation(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A curation by the conditional loss that takes about a third."""
    return {
        "scores": ["conditional_loss", "length"],
        "anchors": write(tmp_path / "data" / "anchors.jsonl", records(12, "anchor")),
        "threshold": {"rate": 0.4},
        **changes,
    }

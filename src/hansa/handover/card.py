"""The model card of an exported bundle, in Markdown with the head that a model hub reads."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from hansa.bundle import Bundle
from hansa.handover.describe import (
    SIMULATED,
    describe,
    figures,
    is_simulated,
    privacy_rows,
    said,
    worst_rows,
)
from hansa.models.language import LANGUAGE
from hansa.safeguard.scorecard_text import threat

_OPENING = {
    "transformers": """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```""",
    "onnx": """\
```python
import onnxruntime

session = onnxruntime.InferenceSession("{name}/model.onnx")
(logits,) = session.run(None, {{"inputs": inputs}})  # {inputs}
```""",
}


def model_card(found: Bundle, to: str, license_: str, name: str) -> str:
    """Return the card: how to open the model, and everything that its bundle's card vouches for.

    Args:
        found: the bundle.
        to: the form, ``transformers`` or ``onnx``.
        license_: name of a licence as a model hub spells it.
        name: what the model is called.
    """
    about, is_language = describe(found), found.architecture["name"] in LANGUAGE
    parts = [
        _head(about, to, license_, is_language),
        f"# {_cell(name)}",
        _model(about),
        _OPENING[to].format(name=_cell(name), inputs=_inputs(about, is_language)),
        "This card holds what the bundle's own card vouches for, and nothing else. What the model "
        "is for and what it should not be used for is for its owner to add.",
    ]
    if (scorecard := about["scorecard"]) is not None:
        columns, rows = worst_rows(scorecard)
        parts += [
            "## Under attack, worst case first",
            f"{_cell(scorecard['claim'])} {threat(scorecard)}",
            "Share of restricted questions answered right, the worst case over all attacks; a "
            f"guess is right in {scorecard['chance']:.3f}.",
            _table(columns, rows),
            *(f"- {_cell(flag['kind'])}: {_cell(flag['text'])}" for flag in scorecard["flags"]),
        ]
    if rows := [[key, said(value)] for key, value in figures(about["metrics"])]:
        parts += ["## Metrics", _table(["metric", "value"], rows)]
    parts += ["## Privacy spent", _privacy(about["privacy"])]
    parts += [
        "## Training data",
        f"SHA-256 over all samples, labels and splits: `{_cell(about['data'])}`; seed "
        f"{_cell(about['seed'])}.",
        "## Lineage",
        _table(
            ["stage", "digest of the bundle"],
            [[step["stage"], f"`{step['digest']}`"] for step in about["lineage"]],
        ),
        "The last line is the bundle that this was exported from; `hansa bundle verify` checks it "
        "and its ancestors.",
    ]
    return "\n\n".join(parts) + "\n"


def _head(about: dict[str, Any], to: str, license_: str, is_language: bool) -> str:
    stages = [step["stage"] for step in about["lineage"]]
    tags = ["hansa", *(["federated-learning"] if "train" in stages else []), *stages]
    tags += ["differential-privacy"] if about["privacy"] else []
    lines = {
        "license": license_,
        "library_name": to,
        "pipeline_tag": "text-generation" if is_language else "image-classification",
        "tags": list(dict.fromkeys(re.sub(r"[^a-z0-9-]", "-", str(t).lower()) for t in tags)),
    }
    # JSON is YAML.
    return "\n".join(["---", *(f"{k}: {json.dumps(v)}" for k, v in lines.items()), "---"])


def _model(about: dict[str, Any]) -> str:
    architecture = about["architecture"]
    text = f"A `{_cell(architecture['name'])}` of {about['parameters']:,} parameters"
    if "kept" in about["density"]:
        kept = about["density"]["kept"]
        text += f", of whose {kept['of']:,} weights under masks {kept['share']:.2%} are kept"
    text += f", made by the stage `{_cell(about['stage'])}` of Hansa"
    if about["tokenizer"]:
        text += f", over {_cell(about['tokenizer'])}"
    if about["labels"]:
        text += f". Classes in the order of the logits: {', '.join(map(_cell, about['labels']))}"
    return text + "."


def _inputs(about: dict[str, Any], is_language: bool) -> str:
    shape = ", ".join(map(str, about["architecture"]["shape"]))
    if is_language:
        return f"int64 [batch, tokens], at most {shape} tokens"
    return f"[batch, {shape}]"


def _privacy(spent: list[dict[str, Any]]) -> str:
    if not spent:
        return "The card tells of no private training: the model may tell of its data."
    rows = privacy_rows(spent)
    notes = [
        "Nodes that are not listed trained without.",
        *([SIMULATED] if is_simulated(spent) else []),
    ]
    return "\n\n".join([_table(["node", "spent"], rows), *notes])


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    """Return a value as text that stays in its place, whoever wrote it."""
    text = " ".join(str(value).split())
    return text.replace("|", "\\|").replace("<", "&lt;")

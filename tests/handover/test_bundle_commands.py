"""`hansa bundle` by the real command: what it tells, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import hansa
from hansa import bundle
from hansa.bundle import CARD, WEIGHTS
from hansa.cli import main
from hansa.config import load
from hansa.handover import describe, verify
from hansa.models import Architecture, build
from support import config

SMALL = Architecture(name="mlp", shape=(1, 2, 2), classes=3, options={"hidden": [4]})


def stored(path: Path, **changes: Any) -> bundle.Bundle:
    about: dict[str, Any] = {
        "stage": "train",
        "weights": build(SMALL, 1).state_dict(),
        "architecture": SMALL.model_dump(mode="json", exclude_none=True),
        "config": {"rounds": 2},
        "seed": 7,
        "data": "ab12",
        "metrics": {"accuracy": {"mean": 0.5}, "scored": "received", "rows": [1, 2]},
    }
    return bundle.write(path, **{**about, **changes})


def line(tmp_path: Path) -> list[bundle.Bundle]:
    """Write three bundles of one line, the last of them outside of the others' folder."""
    first = stored(tmp_path / "runs" / "one" / "bundle", stage="search")
    second = stored(tmp_path / "runs" / "two" / "bundle", stage="prune", parent=first)
    return [first, second, stored(tmp_path / "last", parent=second)]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["hansa", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_ancestors_are_found_by_their_digests_and_verified(tmp_path, monkeypatch, capsys) -> None:
    first, second, last = line(tmp_path)
    here = tmp_path / "runs" / "one"
    assert run(monkeypatch, "bundle", "verify", tmp_path / "last", "--parents", here, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["digest"] == last.digest
    assert told["files"] == last.card["files"]
    assert told["lineage"] == [
        {"stage": "search", "digest": first.digest, "found": str(here / "bundle")},
        {"stage": "prune", "digest": second.digest, "found": None},
    ]
    assert [step["found"] for step in verify(tmp_path / "last", [tmp_path])["lineage"]] == [
        str(tmp_path / "runs" / name / "bundle") for name in ("one", "two")
    ]
    assert run(monkeypatch, "bundle", "verify", tmp_path / "last") == 0
    text = capsys.readouterr().out
    assert text.count("not there") == 3  # two ancestors, and the line that says what it means
    assert last.digest in text


def test_a_changed_ancestor_is_named(tmp_path, monkeypatch, capsys) -> None:
    line(tmp_path)
    changed = tmp_path / "runs" / "two" / "bundle" / WEIGHTS
    changed.write_bytes(changed.read_bytes()[:-1] + b"\1")
    assert run(monkeypatch, "bundle", "verify", tmp_path / "last", "--parents", tmp_path) == 2
    told = capsys.readouterr().err
    assert f"{changed}: found content that differs from the card" in told


def test_an_ancestor_whose_card_was_changed_is_not_there(tmp_path) -> None:
    _, second, _ = line(tmp_path)
    card = tmp_path / "runs" / "two" / "bundle" / CARD
    card.write_text(card.read_text().replace('"seed": 7', '"seed": 8'))
    found = {
        step["digest"]: step["found"] for step in verify(tmp_path / "last", [tmp_path])["lineage"]
    }
    assert found[second.digest] is None


@pytest.mark.parametrize(
    "command", [("verify",), ("show",), ("export", "OUT", "--to", "onnx")], ids=lambda c: c[0]
)
def test_a_bundle_that_was_tampered_with_is_refused_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, command
) -> None:
    stored(tmp_path / "b")
    other = stored(tmp_path / "other", weights=build(SMALL, 2).state_dict())
    shutil.copy(tmp_path / "other" / WEIGHTS, tmp_path / "b" / WEIGHTS)
    name, *rest = [tmp_path / "out" if part == "OUT" else part for part in command]
    assert run(monkeypatch, "bundle", name, tmp_path / "b", *rest) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"hansa: {tmp_path / 'b' / WEIGHTS}: found content that differs")
    assert len(told.splitlines()) == 1
    assert {each.name for each in tmp_path.iterdir()} == {"b", "other"}
    assert hansa.read_bundle(tmp_path / "other").digest == other.digest


def test_training_from_a_tampered_bundle_is_refused_and_overwrites_nothing(
    tmp_path, monkeypatch, capsys
) -> None:
    start = hansa.train(config(tmp_path, name="start", rounds=1, method={"name": "fedavg"}))
    weights = start.path / "bundle" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    values = config(tmp_path, method={"name": "fedavg"})
    values["model"]["bundle"] = str(start.path / "bundle")
    (tmp_path / "next.toml").write_text(load(values).as_toml())
    assert run(monkeypatch, "train", tmp_path / "next.toml") == 2
    assert str(weights) in capsys.readouterr().err
    (tmp_path / "next.toml").unlink()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


SPENT: dict[str, dict[str, Any]] = {
    "north": {"unit": "gradient", "noise": 1.0, "delta": 1e-5, "epsilon": None, "drawn": "seed"}
}


def test_show_tells_what_the_card_says(tmp_path, monkeypatch, capsys) -> None:
    parent = stored(
        tmp_path / "a",
        privacy=SPENT,
        labels=["[red]cat", "dog", "eel"],
    )
    kept = {"layers.0.weight": torch.tensor([[True, False, False, False]] * 4)}
    names = {name for name, _ in build(SMALL).named_parameters()}
    kept = {next(n for n in sorted(names) if n.endswith("weight")): next(iter(kept.values()))}
    found = stored(tmp_path / "b", kept=kept, parent=parent)
    assert run(monkeypatch, "bundle", "show", tmp_path / "b", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(json.dumps(describe(found)))
    assert told["parameters"] == 4 * 4 + 4 + 4 * 3 + 3
    assert told["density"]["kept"]["share"] == 0.25
    assert told["density"]["kept"]["of"] == 16
    assert list(told["density"]["kept"]["tensors"].values()) == [
        {"share": 0.25, "held": 4, "of": 16}
    ]
    assert told["privacy"] == [{"stage": "train", "nodes": SPENT}]
    assert told["labels"] == ["[red]cat", "dog", "eel"]
    assert told["config"] == {"rounds": 2}
    assert run(monkeypatch, "bundle", "show", tmp_path / "b", "--config") == 0
    text = capsys.readouterr().out
    for part in (
        "25.00% of 16",
        "accuracy.mean",
        "[red]cat",
        "north",
        "infinite",
        "protects nobody",
        '"rounds": 2',
    ):
        assert part in text
    assert "train " + parent.digest[:12] + " -> train" in text


def test_show_counts_of_unknown_code_every_number(tmp_path) -> None:
    architecture = {**SMALL.model_dump(mode="json"), "name": "elsewhere:Model"}
    found = stored(tmp_path / "b", architecture=architecture)
    assert describe(found)["parameters"] == sum(t.numel() for t in found.weights.values())


def test_export_by_the_command(tmp_path, monkeypatch, capsys) -> None:
    found = stored(tmp_path / "b")
    arguments = ("bundle", "export", tmp_path / "b", tmp_path / "o", "--to", "onnx", "--json")
    assert run(monkeypatch, *arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["digest"] == found.digest
    assert told["files"] == ["README.md", "model.onnx"]
    assert told["difference"] <= 1e-4
    assert run(monkeypatch, *arguments) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def test_a_folder_of_parents_that_is_not_there_is_named(tmp_path, monkeypatch, capsys) -> None:
    stored(tmp_path / "b")
    arguments = ("bundle", "verify", tmp_path / "b", "--parents", tmp_path / "none")
    assert run(monkeypatch, *arguments) == 2
    assert "--parents" in capsys.readouterr().err

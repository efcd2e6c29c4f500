"""The stages of language models joined: what a curation has kept, and a control by its stage."""

import json
from pathlib import Path
from typing import Any

import pytest

from hansa.bundle import read_bundle
from hansa.errors import InputError
from hansa.handover import export
from hansa.pipeline import load, pipeline, plan
from hansa.redteam import redteam
from tampering import SMALL, tar

TEXT = {"context": 130, "test": 0.1, "validation": 0.0, "answers": {}}
NODES = {
    "clinic": {"text": "made:drug?num=40&seed=1"},
    "insurer": {"text": "made:policy?num=60&seed=1&style=records"},
}
TRAINING = {"optimizer": "adamw", "lr": 0.003, "batch_size": 8, "steps": 2}
PHASE = {"steps": 2, "warm_up": 1, "batch_size": 4, "lr": 1e-3}
TAR = tar(PHASE)
OWN = {**TEXT, "tokenizer": "bundle"}
CURATION = {
    "anchors": "made:all?num=40&seed=2&style=records",
    "guard": {"action": "warn"},
}


def values(**changed: dict[str, Any]) -> dict[str, Any]:
    """Return the language pipeline as small as it can be, stages changed by name."""
    spoilt = {**OWN, "answers": {"corruption": {"shares": [0.2, 0.4], "kinds": ["cut", "noise"]}}}
    common = {"training": TRAINING, "engine": {"kind": "sequential", "workers": 1}}
    ours = {"text": spoilt, "nodes": NODES, "curation": CURATION}
    attack = {"name": "full", "steps": 2, "lrs": [1e-3], "batch": 2}
    stages = {
        "base": {
            "kind": "train",
            "config": {
                "rounds": 1,
                "text": TEXT,
                "model": {"name": "llama", "options": SMALL},
                "nodes": {"public": {"text": "made:all?num=40&style=public"}},
            },
        },
        "curate": {"kind": "curate", "config": ours},
        "train": {"kind": "train", "config": {**ours, "rounds": 1, "method": {"name": "worldlm"}}},
        "safeguard": {
            "kind": "safeguard",
            "config": {
                "data": {
                    "kind": "texts",
                    "context": 130,
                    "retain": ["kept:clinic"],
                    "restricted": "kept:insurer",
                    "answers": {},
                },
                "phases": [{"kind": "random_mapping", **PHASE}, TAR],
                "controls": {"never": {"path": "bundle:base"}},
            },
        },
        "redteam": {"kind": "redteam", "config": {"attacks": [attack], "edits": [], "seeds": [0]}},
        "audit": {
            "kind": "audit",
            "config": {
                "domains": ["made:lab?num=3"],
                "strengths": [],
                "defences": ["none"],
                "target": {"max_tokens": 1},
            },
        },
    }
    stages = {
        name: {"name": name, **stage, **changed.get(name, {})} for name, stage in stages.items()
    }
    return {"name": "words", "common": common, "stages": list(stages.values())}


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_is_kept_is_trained_on_and_part_of_it_withheld(tmp_path: Path) -> None:
    made = pipeline(values())
    assert [stage.state for stage in made.stages] == ["done"] * 6
    by_name = {stage.name: stage for stage in made.stages}
    curated = made.path / by_name["curate"].folder
    kept = (curated / "clients" / "insurer" / "kept.jsonl").read_text().splitlines()
    assert 0 < len(kept) < 54
    trained = read_bundle(made.path / str(by_name["train"].bundle))
    manifest = json.loads((curated / "manifest.json").read_text())
    assert trained.card["metrics"]["curation"]["digest"] == manifest["digest"]
    guarded = read_bundle(made.path / str(by_name["safeguard"].bundle))
    # Of a fifth, some of whose answers state no fact any more.
    asked = guarded.card["metrics"]["restricted"]["count"]
    assert 0 < asked <= len(kept) - sum(round(share * len(kept)) for share in (0.45, 0.15, 0.2))
    assert [step["digest"] for step in guarded.lineage[:2]] == [
        by_name["base"].digest, by_name["train"].digest,
    ]  # fmt: skip
    models = json.loads((made.path / by_name["safeguard"].folder / "models.json").read_text())
    never = read_bundle(made.path / by_name["safeguard"].folder / models["roles"]["never"])
    base = read_bundle(made.path / str(by_name["base"].bundle))
    assert never.card["files"]["weights.safetensors"] == base.card["files"]["weights.safetensors"]
    last = read_bundle(made.path / str(by_name["audit"].bundle))
    assert [step["stage"] for step in last.lineage][-2:] == ["redteam", "audit"]
    assert last.card["metrics"]["audit"]["verdict"] == "no conclusion"
    for name in ("redteam", "audit"):
        assert name in last.card["config"], "how it was attacked and audited is in the card"
    assert "processes" not in last.card["config"]["redteam"], "which changes no result"
    folder = str(made.path / str(by_name["audit"].bundle))
    again = redteam(folder, overrides=["redteam.attacks=[]"], out=tmp_path / "again")
    assert list(again.scorecard["roles"]) == ["safeguarded"], "an audited one can be attacked"
    told = export(folder, tmp_path / "exported", "transformers")
    assert told["difference"] < 1e-4
    twice = pipeline(values())
    assert [stage.digest for stage in twice.stages] == [stage.digest for stage in made.stages]


def test_a_change_of_what_a_control_is_repeats_the_safeguard() -> None:
    made = {stage.name: stage for stage in pipeline(values(), until="safeguard").stages}
    controls = {"never": {"path": "bundle:train"}}
    config = {**values()["stages"][3]["config"], "controls": controls}
    changed = {s.name: s for s in plan(values(safeguard={"config": config}))}
    assert changed["train"].key == made["train"].key
    assert changed["safeguard"].state == "waiting"
    assert changed["safeguard"].key != made["safeguard"].key


@pytest.mark.parametrize(
    ("safeguard", "message"),
    [
        ({"controls": {"never": {"path": "bundle:bass"}}}, "the bundle of 'bass'; allowed: base"),
        ({"controls": {"never": {"path": "bundle:curate"}}}, "the bundle of 'curate'"),
        ({"controls": {"never": {"path": "bundle:redteam"}}}, "the bundle of 'redteam'"),
    ],
)
def test_a_bundle_that_no_stage_before_makes_is_refused(
    safeguard: dict[str, Any], message: str
) -> None:
    config = {**values()["stages"][3]["config"], **safeguard}
    with pytest.raises(InputError, match=message):
        load(values(safeguard={"config": config}))


def test_what_is_kept_needs_a_curation_before_it() -> None:
    held = values()
    held["stages"] = [stage for stage in held["stages"] if stage["name"] != "curate"]
    with pytest.raises(InputError, match=r"stages\.safeguard: found no curate before it"):
        load(held)


def test_the_shipped_pipeline_is_joined() -> None:
    options = load("language")
    kinds = [stage.kind for stage in options.stages]
    assert kinds == ["train", "curate", "train", "safeguard", "redteam", "audit"]
    curate, train = options.stages[1:3]
    for table in ("text", "nodes", "curation"):  # else the masks would be of other data
        assert curate.config[table] == train.config[table]
    leaves = set(train.config["nodes"]) - {"care", "offices"}
    data = options.stages[3].config["data"]
    assert {*data["retain"], data["restricted"]} == {f"kept:{leaf}" for leaf in leaves}

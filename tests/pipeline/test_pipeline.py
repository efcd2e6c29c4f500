import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from hansa.bundle import read_bundle
from hansa.cli import main
from hansa.errors import InputError
from hansa.handover import export
from hansa.pipeline import pipeline, plan

DATA = {"clients": 3, "partition": {"kind": "shards", "classes": 4}, "train_per_class": 6}
FEDSELECT = {"name": "fedselect", "rate": 0.1, "limit": 0.3}


def values(**changed: Any) -> dict[str, Any]:
    """Return a pipeline of three stages that take a second each."""
    stages = [
        {
            "kind": "prune",
            "config": {
                "model": {"name": "mlp", "options": {"hidden": [16]}},
                "pruning": {"method": "snip", "density": 0.5},
            },
        },
        {"kind": "train", "config": {"rounds": 3}},
        {"kind": "personalise", "config": {"rounds": 3, "method": FEDSELECT}},
    ]
    common = {"data": DATA, "training": {"lr": 0.1}}
    return {"name": "short", "common": common, "stages": stages, **changed}


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def digests(stages: Any) -> dict[str, str | None]:
    return {stage.name: stage.digest for stage in stages}


def files(folder: Path) -> dict[str, int]:
    """Return when each file below a folder was written, but for what is written at every call."""
    always = {"config.toml", "pipeline.json", "report.html", ".lock"}
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and not (path.parent == folder and path.name in always)
    }


def test_each_stage_starts_from_the_bundle_before_it_and_done_ones_are_kept() -> None:
    made = pipeline(values())
    assert [stage.state for stage in made.stages] == ["done"] * 3
    last = read_bundle(made.path / str(made.stages[-1].bundle))
    assert [each["digest"] for each in last.lineage] == [s.digest for s in made.stages]
    assert [each["stage"] for each in last.lineage] == ["prune", "train", "train"]
    assert last.kept, "pruned weights stay pruned"
    clients = made.path / made.stages[-1].folder / "clients"
    assert len([read_bundle(folder) for folder in clients.iterdir()]) == 3
    for number, bundle in enumerate([made.path / str(made.stages[-1].bundle), *clients.iterdir()]):
        assert export(bundle, f"onnx-{number}", "onnx")["difference"] < 1e-4
    told = json.loads((made.path / "pipeline.json").read_text())
    assert told["finished"] is True
    assert [stage["digest"] for stage in told["stages"]] == [s.digest for s in made.stages]
    before = files(made.path)
    again = pipeline(made.path / "config.toml")
    assert digests(again.stages) == digests(made.stages)
    assert files(made.path) == before


def test_a_change_repeats_what_depends_on_it_and_one_taken_back_finds_what_was_there() -> None:
    first = pipeline(values())
    before = files(first.path)
    changed = pipeline(values(), overrides=["train.rounds=2"])
    assert changed.stages[0] == first.stages[0]
    for mine, theirs in zip(first.stages[1:], changed.stages[1:], strict=True):
        assert mine.folder != theirs.folder
        assert mine.digest != theirs.digest
    after = files(first.path)
    assert {name: after[name] for name in before} == before, "nothing is overwritten"
    assert pipeline(values()).stages == first.stages
    assert files(first.path) == after


def test_what_changes_no_result_repeats_nothing() -> None:
    made = pipeline(values())
    before = files(made.path)
    other = ["engine.workers=1", "engine.state_memory_mb=64", 'tracking=["tensorboard"]']
    again = pipeline(values(), overrides=[f"train.{text}" for text in other])
    assert again.stages == made.stages
    assert files(made.path) == before
    keys = [stage.key for stage in plan(values(), overrides=["train.engine.kind=sequential"])]
    assert keys[0] == made.stages[0].key
    assert keys[1] != made.stages[1].key


class Killed(BaseException):
    """What no code of Hansa catches, as it cannot catch a kill."""


@pytest.mark.parametrize("stage", ["prune", "train", "personalise"])
def test_stopped_in_any_stage_it_ends_with_the_same_bundles(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipeline(values())
    (tmp_path / "stopped").mkdir()
    monkeypatch.chdir(tmp_path / "stopped")

    def stop(name: str, what: str, done: int, total: int) -> None:
        if name == stage and (what != "round" or done == 2):
            raise Killed

    with pytest.raises(Killed):
        pipeline(values(), watch=stop)
    states = {each.name: each.state for each in plan(values())}
    assert states[stage] == "waiting"
    seen = []
    made = pipeline(values(), watch=lambda *told: seen.append(told))
    assert digests(made.stages) == digests(whole.stages)
    if stage != "prune":
        assert (stage, "round", 1, 3) not in seen, "it goes on after its last whole round"


def test_killed_by_the_system_it_ends_with_the_same_bundles(tmp_path: Path) -> None:
    whole = pipeline(values())
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "line.json").write_text(json.dumps(values()))
    code = (
        "import json, os, signal; from hansa.pipeline import pipeline\n"
        "def watch(name, what, done, total):\n"
        "    if (name, what, done) == ('train', 'round', 2): os.kill(os.getpid(), signal.SIGKILL)\n"
        "pipeline(json.load(open('line.json')), watch=watch)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "killed", check=False)
    assert run.returncode == -signal.SIGKILL
    os.chdir(tmp_path / "killed")
    assert digests(pipeline(values()).stages) == digests(whole.stages)


def test_until_a_stage_and_what_is_planned() -> None:
    assert [stage.state for stage in plan(values())] == ["waiting"] * 3
    assert not Path("runs").exists()
    made = pipeline(values(), until="prune")
    assert [stage.state for stage in made.stages] == ["done", "waiting", "waiting"]
    known = plan(values())
    assert known[1].key, "what a stage depends on is known once the one before it is done"
    assert not known[2].key
    assert [stage.name for stage in plan(values(), until="train")] == ["prune", "train"]
    with pytest.raises(InputError, match="stage: found 'tune'; allowed: prune, train"):
        pipeline(values(), until="tune")


def test_a_bundle_that_was_touched_or_is_missing_is_refused_and_nothing_written() -> None:
    made = pipeline(values(), until="train")
    weights = made.path / str(made.stages[0].bundle) / "weights.safetensors"
    held = weights.read_bytes()
    before = files(made.path)
    weights.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    touched = files(made.path)
    with pytest.raises(InputError, match=r"weights.safetensors: found content that differs"):
        pipeline(values())
    assert files(made.path) == touched
    weights.write_bytes(held)
    weights.parent.rename(made.path / "elsewhere")
    with pytest.raises(InputError, match=r"card.json: found no such file.*what stage prune wrote"):
        pipeline(values())
    (made.path / "elsewhere").rename(weights.parent)
    card = weights.parent / "card.json"
    other = made.path / str(made.stages[1].bundle)
    (other / "card.json").rename(other / "kept")
    (other / "card.json").write_bytes(card.read_bytes())
    with pytest.raises(InputError, match=r"train-.*what stage train wrote"):
        pipeline(values())
    (other / "kept").rename(other / "card.json")
    assert set(files(made.path)) == set(before)
    assert digests(pipeline(values(), until="train").stages) == digests(made.stages)


def stages(*told: dict[str, Any]) -> dict[str, Any]:
    return values(stages=list(told))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "x"}, r"stages: found nothing; allowed: \[\[stages\]\]"),
        (stages({"kind": "tran"}), r"stages.kind: found 'tran'.*did you mean train\?"),
        (stages({"kind": "train"}, {"kind": "train"}), "stages.train: found a name twice"),
        (stages({"kind": "train", "start": "prune"}), "stages.train.start: found 'prune'"),
        (stages({"kind": "redteam"}), "stages.redteam: found no safeguard before it"),
        (stages({"kind": "profile", "start": None}, {"kind": "search", "start": "profile"}),
         "stages.search.start: found 'profile'.*it reads no bundle"),
        (stages({"kind": "profile"}, {"kind": "train", "start": "profile"}),
         "stages.train.start: found 'profile', without one"),
        (stages({"kind": "prune"}), "stages.prune.pruning: found nothing"),
        (stages({"kind": "train", "config": {"rouns": 2}}), r"stages.train.rouns.*mean rounds\?"),
        (stages({"kind": "train", "config": 3}), "stages.config: found 3; allowed: a table"),
        (stages({"kind": "train", "file": "none.toml"}), "none.toml: found no such file"),
        (stages({"kind": "search", "config": {"searcher": "best"}}), "stages.search.searcher"),
        (stages({"kind": "profile", "config": {"model": 3}}), "stages.profile.model: found an unk"),
        (stages({"kind": "safeguard"}), "stages.safeguard.*phases or a preset"),
        (stages({"kind": "audit", "config": {"domains": []}}), "stages.audit.domains"),
        (values(outptu="x"), r"outptu: found an unknown key.*did you mean output\?"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_before_anything_is_done(
    wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pipeline(wrong)
    assert not Path("runs").exists()


def test_overrides_name_a_stage() -> None:
    for text in ("rounds=2", "tune.rounds=2", "train"):
        with pytest.raises(InputError, match="--set"):
            pipeline(values(), overrides=[text])
    (stage,) = plan(stages({"kind": "train"}), overrides=["train.rounds=1", "seed=3"])
    assert stage.folder.endswith("-seed3")


def test_an_error_within_a_stage_names_it_and_leaves_what_was_done() -> None:
    with pytest.raises(InputError, match=r"stages.train.training.lr"):
        pipeline(values(), overrides=["train.training.lr=1e30"])
    assert [stage.state for stage in plan(values())][:1] == ["done"]
    told = json.loads(Path("runs/short-seed0/pipeline.json").read_text())
    assert [stage["state"] for stage in told["stages"]] == ["done", "waiting", "waiting"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "short-seed0"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"mine\.txt"):
        pipeline(values())
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_files_stand_beside_the_pipeline_and_own_values_over_them(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base.toml").write_text("rounds = 2\n[training]\nlr = 0.2\nepochs = 2\n")
    (tmp_path / "sub" / "line.toml").write_text(
        'name = "filed"\n[common.data]\nclients = 3\n'
        '[[stages]]\nkind = "train"\nfile = "base.toml"\nconfig.training.lr = 0.3\n'
    )
    made = pipeline(tmp_path / "sub" / "line.toml")
    card = read_bundle(made.path / str(made.stages[0].bundle)).card
    assert card["config"]["training"]["lr"] == 0.3
    assert card["config"]["training"]["epochs"] == 2
    assert card["config"]["rounds"] == 2
    assert card["config"]["data"]["clients"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["line.toml", "--until", "tune"], "stage: found 'tune'; allowed: prune, train"),
        (["none.toml"], "none.toml: found no such file"),
        (["edeg"], "edeg: found no such file; allowed: a configuration in TOML, edge or language"),
        (["edge", "--set", "tune.rounds=2"], "--set"),
    ],
)
def test_the_command_ends_in_one_line_that_says_what_is_wrong(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    Path("line.toml").write_text(tomli_w.dumps(values()))
    monkeypatch.setattr(sys, "argv", ["hansa", "pipeline", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not Path("runs").exists()

"""The train stage end to end: run folders, resuming, bundles."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import hansa
from hansa.config import load
from hansa.data.federate import federate
from hansa.federation.message import Message
from hansa.federation.wire import encode
from support import config, same

HANSA = str(Path(sys.executable).with_name("hansa"))


def outcome(run: hansa.Run) -> tuple[Any, ...]:
    """All that a run leaves behind but its folder's name and its seconds."""
    tables = {name: run.history.table(name).to_pylist() for name in ("scores", "ledger")}
    states = {}
    for path in sorted((run.path / "states").rglob("*.msg")):
        states[path.relative_to(run.path)] = path.read_bytes()
    summary = json.loads((run.path / "summary.json").read_text())
    del summary["run"], summary["seconds"], summary["speed"]
    return tables, states, summary


def test_a_run_folder_holds_configuration_tables_states_and_bundle(tmp_path) -> None:
    run = hansa.train(config(tmp_path))
    assert run.path == tmp_path / "t-seed0"
    assert {path.name for path in run.path.iterdir()} == {
        ".lock",
        "config.toml",
        "checkpoint.json",
        "log.txt",
        "states",
        "scores.parquet",
        "ledger.parquet",
        "pairs.parquet",
        "figures.parquet",
        "rounds.parquet",
        "summary.json",
        "bundle",
    }
    again = hansa.Run(run.path)
    assert again.config == run.config
    assert again.round == 4
    for name in ("scores", "ledger", "pairs", "rounds"):
        assert pq.read_table(run.path / f"{name}.parquet").equals(run.history.table(name))
        assert again.history.table(name).equals(run.history.table(name))


def test_only_the_newest_version_of_a_state_is_kept(tmp_path) -> None:
    run = hansa.train(config(tmp_path))
    for folder in (run.path / "states").iterdir():
        assert len(list(folder.iterdir())) == 1


def test_a_second_run_of_one_name_gets_its_own_folder(tmp_path) -> None:
    first, second = hansa.train(config(tmp_path)), hansa.train(config(tmp_path))
    assert second.path.name == "t-seed0-2"
    assert outcome(first) == outcome(second)


def test_the_fingerprint_of_the_data_is_in_the_run(tmp_path) -> None:
    run = hansa.train(config(tmp_path))
    data = federate(run.config.data, run.config.seed)
    assert json.loads((run.path / "checkpoint.json").read_text())["data"] == data.fingerprint
    assert hansa.read_bundle(run.path / "bundle").card["data"] == data.fingerprint


def test_the_bundle_holds_the_common_model_and_starts_another_run(tmp_path) -> None:
    first = hansa.train(config(tmp_path))
    bundle = hansa.read_bundle(first.path / "bundle")
    model = {"options": {"hidden": [8]}, "bundle": str(first.path / "bundle")}
    second = hansa.train(config(tmp_path, model=model, rounds=1, training={"lr": 1e-9}))
    child = hansa.read_bundle(second.path / "bundle")
    assert child.lineage[0] == {"stage": "train", "digest": bundle.digest}
    for name, tensor in bundle.weights.items():
        torch.testing.assert_close(child.weights[name], tensor)


def test_where_and_how_a_run_was_computed_is_not_in_its_bundle_s_digest(tmp_path) -> None:
    digests = {
        hansa.read_bundle(hansa.train(c).path / "bundle").digest
        for c in (
            config(tmp_path),
            config(tmp_path / "b", name="other", engine={"state_memory_mb": 0}),
        )
    }
    assert len(digests) == 1


def test_local_only_ends_without_a_bundle(tmp_path) -> None:
    run = hansa.train(config(tmp_path, method={"name": "local"}))
    assert not (run.path / "bundle").exists()


def test_a_finished_run_goes_on_to_more_rounds(tmp_path) -> None:
    whole = hansa.train(config(tmp_path, rounds=5))
    part = hansa.train(config(tmp_path, rounds=3))
    longer = hansa.train(resume=part.path, overrides=["rounds=5"])
    assert outcome(longer) == outcome(whole)
    assert longer.config.rounds == hansa.Run(part.path).config.rounds == 5


def test_resuming_a_finished_run_changes_nothing(tmp_path) -> None:
    run = hansa.train(config(tmp_path))
    before = outcome(run)
    assert outcome(hansa.train(resume=run.path)) == before


def test_a_run_resumes_with_other_workers_and_not_with_another_rate(tmp_path) -> None:
    run = hansa.train(config(tmp_path, rounds=2))
    with pytest.raises(hansa.InputError, match=r"training\.lr: found another value"):
        hansa.train(resume=run.path, overrides=["training.lr=0.2"])
    with pytest.raises(hansa.InputError, match=r"rounds: found 1; allowed: at least the 2"):
        hansa.train(resume=run.path, overrides=["rounds=1"])
    hansa.train(resume=run.path, overrides=["engine.workers=2", "rounds=3"])


def test_a_run_says_how_its_work_was_done_and_goes_on_alike(tmp_path) -> None:
    stacked = config(tmp_path, rounds=2, engine={"kind": "stacked", "stack": 3})
    run = hansa.train(stacked)
    assert run.history.table("rounds")["engine"].to_pylist() == ["stacked in stacks of 3"] * 2
    assert all(samples > 0 for samples in run.history.table("rounds")["samples"].to_pylist())
    speed = json.loads((run.path / "summary.json").read_text())["speed"]
    assert speed["engine"] == "stacked in stacks of 3"
    assert speed["rounds_per_minute"] > 0
    assert speed["samples_per_second"] > 0
    assert "engine: stacked in stacks of 3 (as configured)" in (run.path / "log.txt").read_text()
    for wrong in ("engine.kind=sequential", "engine.stack=4"):
        with pytest.raises(hansa.InputError, match=r"engine\.(kind|stack): found another value"):
            hansa.train(resume=run.path, overrides=[wrong, "rounds=4"])
    longer = hansa.train(resume=run.path, overrides=["rounds=4"])
    whole = hansa.train({**stacked, "rounds": 4, "output": str(tmp_path / "whole")})
    assert outcome(longer) == outcome(whole)
    assert "(as the run began)" in (run.path / "log.txt").read_text()


def test_a_run_does_not_resume_on_other_data(tmp_path) -> None:
    run = hansa.train(config(tmp_path))
    checkpoint = json.loads((run.path / "checkpoint.json").read_text())
    checkpoint["data"] = "0" * 64
    (run.path / "checkpoint.json").write_text(json.dumps(checkpoint))
    with pytest.raises(hansa.InputError, match="the run's data, 000000000000"):
        hansa.train(resume=run.path)


def test_a_run_does_not_resume_from_another_bundle(tmp_path) -> None:
    parent = hansa.train(config(tmp_path, rounds=1))
    model = {"options": {"hidden": [8]}, "bundle": str(parent.path / "bundle")}
    child = hansa.train(config(tmp_path, model=model, rounds=1))
    hansa.train(resume=parent.path, overrides=["rounds=2"])
    with pytest.raises(hansa.InputError, match="the run's bundle, "):
        hansa.train(resume=child.path, overrides=["rounds=2"])


@pytest.mark.parametrize("lost", ["states/root", "states/root+client-0", "checkpoint.json"])
def test_a_run_that_lost_something_is_refused(tmp_path, lost: str) -> None:
    run = hansa.train(config(tmp_path, participation={}))
    path = run.path / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(hansa.InputError, match=r"states|checkpoint"):
        hansa.train(resume=run.path, overrides=["rounds=5"])


@pytest.mark.parametrize("content", ["[]", "5", "{}", '{"format": 1, "round": null}', "x"])
def test_a_checkpoint_that_is_none_is_refused(tmp_path, content: str) -> None:
    run = hansa.Run.create(load(config(tmp_path)))
    (run.path / "checkpoint.json").write_text(content)
    with pytest.raises(hansa.InputError, match=r"checkpoint\.json"):
        hansa.Run(run.path)


def test_a_table_of_another_kind_is_refused(tmp_path) -> None:
    run = hansa.train(config(tmp_path, rounds=1))
    shutil.copy(run.path / "rounds.parquet", run.path / "scores.parquet")
    with pytest.raises(hansa.InputError, match=r"scores.parquet has other columns"):
        hansa.Run(run.path)


def test_a_state_that_does_not_fit_the_model_is_refused(tmp_path) -> None:
    run = hansa.train(config(tmp_path, rounds=1))
    (path,) = (run.path / "states" / "root").iterdir()
    path.write_bytes(encode(Message({"model": {"w": torch.ones(1)}, "buffers": {}})))
    with pytest.raises(hansa.InputError, match="states that do not fit the model"):
        hansa.train(resume=run.path, overrides=["rounds=2"])


def test_a_run_under_way_is_not_joined(tmp_path) -> None:
    run = hansa.train(config(tmp_path))
    with (
        run.claimed(run.config, run.checkpoint),
        pytest.raises(hansa.InputError, match="a run under way"),
    ):
        hansa.train(resume=run.path)


def test_a_run_that_went_on_after_it_was_opened_is_not_written(tmp_path) -> None:
    run = hansa.train(config(tmp_path, rounds=2))
    opened = hansa.Run(run.path)
    hansa.train(resume=run.path, overrides=["rounds=3"])
    with (
        pytest.raises(hansa.InputError, match="went on meanwhile"),
        opened.claimed(run.config, run.checkpoint),
    ):
        pass


def test_wrong_input_leaves_no_folder(tmp_path) -> None:
    with pytest.raises(hansa.InputError):
        hansa.train(config(tmp_path / "new", data={"clients": 5000}))
    assert not (tmp_path / "new").exists()


def test_what_an_unfinished_round_left_behind_is_ignored(tmp_path) -> None:
    whole = hansa.train(config(tmp_path))
    run = hansa.train(config(tmp_path, rounds=3))
    # As if killed in round 4: a state and a table are there, the checkpoint is not.
    for folder in (run.path / "states").iterdir():
        (folder / "00000004.msg").write_bytes(b"half a st")
    (run.path / "parts").mkdir()
    (run.path / "parts" / "00000004-scores.parquet").write_bytes(b"PAR1")
    assert outcome(hansa.train(resume=run.path, overrides=["rounds=4"])) == outcome(whole)


def test_a_run_killed_while_its_tables_were_gathered_is_whole(tmp_path, monkeypatch) -> None:
    whole = hansa.train(config(tmp_path, rounds=5))
    run = hansa.train(config(tmp_path, rounds=3))
    with monkeypatch.context() as patch:
        patch.setattr(hansa.Run, "finish", lambda run, common: {})
        longer = hansa.train(resume=run.path, overrides=["rounds=5"])
    # The first of three tables is the new one, the others are those of three rounds.
    pq.write_table(longer.history.table("scores"), run.path / "scores.parquet")
    assert outcome(hansa.train(resume=run.path)) == outcome(whole)


def test_a_run_killed_while_its_folder_was_made_leaves_its_name_free(tmp_path, monkeypatch) -> None:
    plan = config(tmp_path, rounds=1)
    with monkeypatch.context() as patch:
        patch.setattr("hansa.runs.sync_folder", _stop)
        patch.setattr("hansa.files.sync_folder", _stop)
        with pytest.raises(KeyboardInterrupt):
            hansa.train(plan)
    assert not (tmp_path / "t-seed0").exists()
    assert hansa.train(plan).path == tmp_path / "t-seed0"


def _stop(folder: Path) -> None:
    raise KeyboardInterrupt


def _killed(path: Path, folder: Path, last: int, delay: float) -> int:
    """Start a run and kill it a moment after its checkpoint of a round; return its last round."""
    process = subprocess.Popen([HANSA, "train", str(path)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if json.loads((folder / "checkpoint.json").read_text())["round"] >= last:
                break
        except FileNotFoundError:
            pass
        time.sleep(0.005)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return int(json.loads((folder / "checkpoint.json").read_text())["round"])


@pytest.mark.parametrize(
    ("draw", "engine"),
    [(0, {"kind": "sequential"}), (1, {"kind": "stacked", "stack": 2}), (2, {"kind": "auto"})],
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, draw: int, engine: dict[str, Any]) -> None:
    rng = random.Random(draw)  # noqa: S311
    rounds = 12
    training = {"lr": 0.1, "batch_size": 3, "epochs": 40}
    plan = config(tmp_path, rounds=rounds, training=training, engine=engine)
    whole = hansa.train({**plan, "output": str(tmp_path / "whole")})
    path = tmp_path / "plan.toml"
    path.write_text(load(plan).as_toml())
    last = rng.randrange(0, rounds - 2)
    stopped = _killed(path, tmp_path / "t-seed0", last, rng.random() * 0.2)
    assert last <= stopped < rounds
    resumed = hansa.train(resume=tmp_path / "t-seed0")
    assert outcome(resumed) == outcome(whole)
    first, second = (hansa.read_bundle(r.path / "bundle").weights for r in (resumed, whole))
    assert same(first, second)

"""Figures of a run, read back from what TensorBoard and MLflow keep."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hansa
from hansa.errors import InputError
from hansa.runs import Run
from hansa.training import train
from support import config

pytestmark = pytest.mark.filterwarnings("ignore")  # what both packages warn of is theirs
Curves = dict[str, list[tuple[int, float]]]


@pytest.fixture(autouse=True)
def _no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def in_tensorboard(run: Run) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    held = EventAccumulator(str(run.path / "tensorboard"), {"scalars": 0}).Reload()
    return {
        name: [(event.step, event.value) for event in held.Scalars(name)]
        for name in held.Tags()["scalars"]
    }


def in_mlflow(run: Run, uri: str = "") -> Curves:
    from mlflow import MlflowClient

    client = MlflowClient(uri or f"sqlite:///{run.path.parent}/mlruns/mlflow.db")
    number = json.loads((run.path / "mlflow.json").read_text())["run"]
    return {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(number, name)]
        for name in client.get_run(number).data.metrics
    }


READ = {"tensorboard": in_tensorboard, "mlflow": in_mlflow}


def expected(run: Run) -> Curves:
    """What a run's tables say of a few curves, by another way than the trackers'."""
    scores = run.history.scored("test", "accuracy")
    traffic = run.history.bytes()
    summary = run.history.summary()
    return {
        "test/accuracy": [(k, float(np.mean(list(row.values())))) for k, row in scores.items()],
        "bytes/up": [(k, float(up)) for k, (up, _) in traffic.items()],
        "bytes/down": [(k, float(down)) for k, (_, down) in traffic.items()],
        "summary/metrics/accuracy/mean": [(run.round, summary["metrics"]["accuracy"]["mean"])],
        "summary/seconds": [(run.round, summary["seconds"])],
    }


def check(found: Curves, run: Run) -> None:
    for name, points in expected(run).items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [v for _, v in found[name]] == pytest.approx([v for _, v in points], rel=1e-6), name
    assert [step for step, _ in found["round/seconds"]] == list(range(1, run.round + 1))
    assert all(value > 0 for _, value in found["round/seconds"])


def stopped_after(number: int, values: dict[str, Any]) -> Run:
    """Begin a run and interrupt it after a round."""
    runs = []

    def stop(run: Run, result: Any) -> None:
        runs.append(run)
        if result.number == number:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(values, watch=stop)
    return runs[-1]


@pytest.mark.slow(20)
def test_one_line_of_configuration_tracks_a_run_and_changes_none_of_its_numbers(tmp_path) -> None:
    plain = hansa.train(config(tmp_path, name="plain"))
    run = hansa.train(config(tmp_path, tracking=["tensorboard", "mlflow"]))
    for read in READ.values():
        check(read(run), run)
    for name in ("scores", "ledger", "pairs", "figures"):
        assert run.history.table(name).equals(plain.history.table(name)), name
    assert not logging.getLogger("hansa").disabled


def test_the_digest_of_a_bundle_is_that_of_a_run_without_tracking(tmp_path) -> None:
    method = {"name": "fedavg"}
    plain = hansa.train(config(tmp_path, name="plain", method=method))
    run = hansa.train(config(tmp_path, method=method, tracking="tensorboard"))
    digests = [hansa.read_bundle(each.path / "bundle").digest for each in (plain, run)]
    assert digests[0] == digests[1]
    assert "tracking" in (run.path / "config.toml").read_text()
    assert "tracking" not in (plain.path / "config.toml").read_text()


@pytest.mark.slow(20)
@pytest.mark.parametrize("tracker", READ)
def test_a_resumed_run_goes_on_without_doubled_steps(tmp_path, tracker: str) -> None:
    run = stopped_after(2, config(tmp_path, tracking=tracker))
    run = hansa.train(resume=run.path)
    check(READ[tracker](run), run)
    hansa.train(resume=run.path)  # nothing is left to do, nor to be written
    check(READ[tracker](Run(run.path)), run)


@pytest.mark.parametrize("tracker", READ)
def test_rounds_that_a_tracker_lacks_are_added(tmp_path, tracker: str) -> None:
    """As where a kill came between the run's record and the tracker's, or tracking was off."""
    run = stopped_after(2, config(tmp_path))
    run = train(resume=run.path, overrides=[f"tracking={tracker}"])
    check(READ[tracker](run), run)


def test_what_a_kill_left_of_a_round_is_taken_back(tmp_path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    run = stopped_after(2, config(tmp_path, tracking="tensorboard"))
    with SummaryWriter(str(run.path / "tensorboard")) as writer:
        writer.add_scalar("test/accuracy", 0.123, 3)
    run = hansa.train(resume=run.path)
    check(in_tensorboard(run), run)


def test_a_run_of_mlflow_has_its_configuration_and_its_end(tmp_path, monkeypatch) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/store.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run = stopped_after(1, config(tmp_path, rounds=2, tracking="mlflow"))
    client = MlflowClient(uri)
    number = json.loads((run.path / "mlflow.json").read_text())["run"]
    assert client.get_run(number).info.status == "KILLED"
    run = hansa.train(resume=run.path)
    check(in_mlflow(run, uri), run)
    kept = client.get_run(number)
    assert kept.info.status == "FINISHED"
    assert kept.info.run_name == run.path.name
    assert kept.data.params["training.lr"] == "0.1"
    assert kept.data.tags["hansa.data"] == run.data_fingerprint
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize("tracker", READ)
def test_a_missing_package_is_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(InputError, match=rf"the package '{tracker}'.*hansa\[tracking\]"):
        train(config(tmp_path / "runs", tracking=tracker))
    assert not (tmp_path / "runs").exists()


def test_a_tracker_that_is_not_there_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match=r"tracking.*'wandb'"):
        train(config(tmp_path, tracking="wandb"))


def test_a_store_that_cannot_be_opened_is_named_before_the_first_round(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    with pytest.raises(InputError, match=r"tracking: found 'mlflow', which cannot be opened"):
        train(config(tmp_path, tracking="mlflow"))
    assert Run(tmp_path / "t-seed0").round == 0


def test_a_tracker_that_fails_stops_no_training(tmp_path, monkeypatch, caplog) -> None:
    from hansa.tracking.tensorboard import TensorBoard

    def fail(self: object, step: int, values: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(TensorBoard, "write", fail)
    run = hansa.train(config(tmp_path, tracking="tensorboard"))
    assert run.round == 4
    assert caplog.text.count("tensorboard: no more is written (disk full)") == 1

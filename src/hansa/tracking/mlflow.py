"""MLflow: the store that MLFLOW_TRACKING_URI names, or a file beside the runs."""

import fcntl
import json
import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hansa.files import write_atomic
from hansa.runs import Run
from hansa.tracking.figures import ROUND, SUMMARY

_LONGEST = 500  # characters of a parameter, which every store takes
_MOST = 1000  # numbers in one call, and
_MOST_PARAMETERS = 100  # parameters


class MLflow:
    """A run of MLflow, whose number is kept in the run's own folder, ``mlflow.json``.

    Args:
        run: the run, some rounds of which may be there already.
    """

    name = "mlflow"

    def __init__(self, run: Run) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        place = run.path.resolve().parent / "mlruns"
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        with _alone(place) if not uri else _told_less():
            self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{place}/mlflow.db")
            self._id = self._going_on(run) or self._begun(run, None if uri else place)
        self._steps: defaultdict[str, set[int]] = defaultdict(set)
        for key in (ROUND, SUMMARY):
            history = self._client.get_metric_history(self._id, key)
            self._steps[key] = {metric.step for metric in history}

    def steps(self, key: str) -> Set[int]:
        """Return the steps that a round's or a summary's last number is there for."""
        return self._steps[key]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the numbers of one step, all in one call or, of very many, the last in the last."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_spelled(name), value, now, step) for name, value in values.items()]
        for first in range(0, len(metrics), _MOST):
            self._client.log_batch(self._id, metrics=metrics[first : first + _MOST])
        for name in values:
            self._steps[name].add(step)

    def close(self, done: bool) -> None:
        """Say whether the run came to its end."""
        self._client.set_terminated(self._id, "FINISHED" if done else "KILLED")

    def _going_on(self, run: Run) -> str | None:
        """Return the number of a run that the store still has, under way again."""
        from mlflow.exceptions import MlflowException

        try:
            number = str(json.loads((run.path / "mlflow.json").read_text())["run"])
            self._client.update_run(number, "RUNNING")
        except (OSError, ValueError, KeyError, TypeError, MlflowException):
            return None
        return number

    def _begun(self, run: Run, place: Path | None) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "hansa")
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            artifacts = (place / "artifacts").as_uri() if place else None
            number = self._client.create_experiment(name, artifacts)
        else:
            number = experiment.experiment_id
        tags = {"hansa.data": run.data_fingerprint}
        begun: str = self._client.create_run(number, tags=tags, run_name=run.path.name).info.run_id
        parameters = [
            Param(_spelled(key), value[:_LONGEST]) for key, value in _flat(run.config.as_dict())
        ]
        for first in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(begun, params=parameters[first : first + _MOST_PARAMETERS])
        write_atomic(run.path / "mlflow.json", json.dumps({"run": begun}) + "\n")
        return begun


def _spelled(name: str) -> str:
    """Return a name in the characters that MLflow allows."""
    return re.sub(r"[^\w./: -]", "_", name)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Let one process at a time make the tables of a file that several runs share."""
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("w") as lock, _told_less():
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _told_less() -> Iterator[None]:
    """Leave out what MLflow says of making its tables."""
    logger = logging.getLogger("mlflow.store.db.utils")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)

"""A run's figures where others watch them: TensorBoard, MLflow.

The run's own tables stay what counts. What is written here is made of them, round by round, so that
a run that goes on, or is tracked only later, first adds the rounds that are missing there, and
writes no round twice.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pyarrow.compute as pc

from hansa.config import Tracker
from hansa.errors import InputError, first_line
from hansa.federation.engines.engine import RoundResult
from hansa.federation.history import SCHEMAS, tables_of
from hansa.runs import Run
from hansa.tracking.figures import ROUND, SUMMARY, of_round, of_summary
from hansa.tracking.mlflow import MLflow
from hansa.tracking.sink import Sink
from hansa.tracking.tensorboard import TensorBoard

_log = logging.getLogger("hansa")
_SINKS: dict[Tracker, Callable[[Run], Sink]] = {"tensorboard": TensorBoard, "mlflow": MLflow}
_NEEDED: dict[Tracker, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}


def check_trackers(trackers: Sequence[Tracker]) -> None:
    """Refuse trackers whose packages are missing.

    Raises:
        InputError: naming the first.
    """
    for tracker in trackers:
        for package in _NEEDED[tracker]:
            if importlib.util.find_spec(package) is None:
                found = f"{tracker!r} without the package {package!r}"
                raise InputError("tracking", found, "pip install hansa[tracking], or no tracking")


@contextmanager
def tracked(run: Run) -> Iterator[Callable[[Run, RoundResult], None]]:
    """Give what writes each round of a run to its trackers once the run has recorded it.

    Rounds that a tracker lacks are added at once, the summary at the end of the last round. A
    tracker that fails later on is left alone, with a warning: it stops no training.

    Raises:
        InputError: a tracker that cannot be opened.
    """
    sinks = []
    for tracker in run.config.tracking:
        try:
            sinks.append(_opened(tracker, run))
        except Exception as error:  # a store elsewhere may raise anything
            found = f"{tracker!r}, which cannot be opened ({first_line(error)})"
            raise InputError("tracking", found, "one that can be written to, or none") from error

    def told(step: int, key: str, values: Callable[[], dict[str, float]]) -> None:
        for sink in list(sinks):
            try:
                if step not in sink.steps(key):
                    sink.write(step, values())
            except Exception as error:
                sinks.remove(sink)
                _log.warning("%s: no more is written (%s)", sink.name, first_line(error))

    done = False
    try:
        yield lambda _, result: told(result.number, ROUND, lambda: of_round(tables_of(result)))
        told(run.round, SUMMARY, lambda: of_summary(run.history.summary()))
        done = True
    finally:
        for sink in sinks:
            sink.close(done)


def _opened(tracker: Tracker, run: Run) -> Sink:
    """Return a tracker that holds all rounds of a run so far."""
    sink = _SINKS[tracker](run)
    held = sink.steps(ROUND)
    numbers = run.history.table("rounds")["round"].to_pylist()
    for number in sorted(set(numbers) - held):
        of_it = pc.field("round") == number
        tables = {name: run.history.table(name).filter(of_it) for name in SCHEMAS}
        sink.write(number, of_round(tables))
    return sink

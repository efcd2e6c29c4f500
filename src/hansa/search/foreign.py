"""NAS-Bench-Macro's table (github.com/xiusu/NAS-Bench-Macro) as columns.

It holds the test accuracy of three trainings of each of 6,561 models after 50 epochs on CIFAR-10,
and neither validation accuracy nor seconds: what a search is told is the accuracy of one training,
and what it found is judged by the mean of all three.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from hansa.errors import InputError
from hansa.search.columns import Columns
from hansa.search.spaces import MACRO
from hansa.untrusted import json_of, read_bytes

_CODE = re.compile(r"[0-2]{8}")


def read_macro(path: str | Path) -> Columns:
    """Read the JSON file of NAS-Bench-Macro: 8-digit code -> test_acc (percent), params, flops.

    The one accuracy of a training stands as validation and as test accuracy; seconds are nan.

    Raises:
        InputError: no such file, or one that holds something else.
    """
    try:
        records = json_of(read_bytes(Path(path)))
    except OSError as error:
        raise InputError(str(path), error.strerror, "NAS-Bench-Macro's JSON file") from None
    except ValueError as error:
        raise InputError(str(path), f"no JSON ({error})", "NAS-Bench-Macro's JSON file") from None
    if not isinstance(records, dict) or not records:
        raise InputError(str(path), type(records).__name__, "an object with a record per model")
    rows = sorted(_row(path, code, record) for code, record in records.items())
    num_seeds = {len(row[1]) for row in rows}
    if len(num_seeds) > 1:
        found = f"{sorted(num_seeds)} trainings"
        raise InputError(f"{path}: test_acc", found, "as many trainings of every model")
    accuracy = np.array([row[1] for row in rows]) / 100
    return Columns(
        space=MACRO,
        recipe="nas-bench-macro-cifar10",
        models=np.array([row[0] for row in rows]),
        seeds=tuple(range(accuracy.shape[1])),
        validation=accuracy,
        test=accuracy,
        train_seconds=np.full(accuracy.shape, np.nan),
        parameters=np.array([row[2] for row in rows], dtype=np.float64),
        multiply_adds=np.array([row[3] for row in rows], dtype=np.float64),
    )


def _row(path: str | Path, code: str, record: Any) -> tuple[int, list[float], float, float]:
    if not _CODE.fullmatch(code):
        raise InputError(f"{path}: a model", repr(code), "eight digits, each 0, 1 or 2")
    try:
        accuracy = [float(each) for each in record["test_acc"]]
        parameters, multiply_adds = float(record["params"]), float(record["flops"])
    except (KeyError, TypeError, ValueError, OverflowError):
        allowed = "numbers: a list test_acc, params and flops"
        raise InputError(f"{path}: {code}", str(record)[:80], allowed) from None
    if not accuracy or not all(0 <= each <= 100 for each in accuracy):
        raise InputError(f"{path}: {code}.test_acc", accuracy, "percentages, 0 to 100")
    return int(code, 3), accuracy, parameters, multiply_adds

"""Tables in the csv layout of the released Blox tables, as columns and back.

A folder holds ``blox-base-SEED.csv`` (validation accuracy of every epoch, test accuracy, seconds),
perhaps ``blox-ext-SEED.csv`` (losses and top-5 accuracy), ``blox-info.csv`` (parameters,
multiply-adds, ``arch_vec``) and ``blox-bench-DEVICE.csv`` (latency). Each begins with a YAML
header; then comes a row of column names and a row per model. Accuracy is in percent with three
decimals, losses have six, seconds and latency are seconds. What has a value per epoch stands in
one field, as a JSON list. A model's hash is an id that ties the files together and no more: which
model it is, its ``arch_vec`` says.
"""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hansa.errors import InputError
from hansa.files import write_atomic
from hansa.models.blox_space import RawVector, id_of, vector_of
from hansa.search.columns import Columns
from hansa.search.spaces import BLOX, Floats
from hansa.untrusted import json_of, read_text

_SEED = re.compile(r"[0-9]{1,18}")
_HASH = "model_hash"
_BASE = (_HASH, "val_top1", "test_top1", "train_time_s")
_INFO = (_HASH, "params", "flops", "arch_vec")
_BENCH = (_HASH, "latency")
_CURVES = {
    "train_top1": "train",
    "train_loss": "train_loss",
    "train_top5": "train_top5",
    "val_loss": "validation_loss",
    "val_top5": "validation_top5",
    "test_loss": "test_loss",
    "test_top5": "test_top5",
}
"""Columns of the extended files and what they are called here; those of the test have one epoch."""
Rows = dict[str, dict[str, str]]


def read_blox(folder: str | Path) -> Columns:
    """Read a folder of csv files.

    Validation accuracy is that of the best epoch.

    Raises:
        InputError: no such files, a file that is broken, or files that do not fit together.
    """
    base = _by_name(folder, "base")
    if not base or not all(_SEED.fullmatch(name) for name in base):
        found = f"seeds {sorted(base)}" if base else "no blox-base-SEED.csv"
        raise InputError(str(folder), found, "csv files; other encodings are not read")
    info = _rows(Path(folder) / "blox-info.csv", "info", _INFO)[1]
    hash_of = _models(Path(folder) / "blox-info.csv", info)
    seeds = sorted(base, key=int)
    read = {seed: _rows(base[seed], "base", _BASE) for seed in seeds}
    trained = {key for _, rows in read.values() for key in rows}
    for key in sorted(trained - set(info)):
        raise InputError(f"{folder}: model", key, "one of blox-info.csv")
    models = sorted(model for model, key in hash_of.items() if key in trained)
    keys = [hash_of[model] for model in models]
    curves = {
        "validation": _by_seed([(base[s], read[s][1]) for s in seeds], keys, "val_top1") / 100
    }
    extended = _by_name(folder, "ext")
    if sorted(extended) == sorted(seeds):
        more = [(extended[s], _rows(extended[s], "ext", (_HASH, *_CURVES))[1]) for s in seeds]
        for name, ours in _CURVES.items():
            unit = 1 if name.endswith("loss") else 100
            curves[ours] = _by_seed(more, keys, name) / unit
    pairs = [(base[s], read[s][1]) for s in seeds]
    missing = np.isnan(curves["validation"])
    best = np.where(missing, -np.inf, curves["validation"]).max(-1)
    info_path = [(Path(folder) / "blox-info.csv", info)]
    latency = {
        device: _by_seed([(path, _rows(path, "bench", _BENCH)[1])], keys, "latency")[:, 0, 0]
        for device, path in sorted(_by_name(folder, "bench").items())
    }
    return Columns(
        space=BLOX,
        recipe=f"blox-{read[seeds[0]][0].get('dataset', 'unnamed')}",
        models=np.array(models, dtype=np.int64),
        seeds=tuple(int(seed) for seed in seeds),
        validation=np.where(missing.all(-1), np.nan, best),
        test=_by_seed(pairs, keys, "test_top1")[:, :, 0] / 100,
        train_seconds=_by_seed(pairs, keys, "train_time_s")[:, :, 0],
        parameters=_by_seed(info_path, keys, "params")[:, 0, 0],
        multiply_adds=_by_seed(info_path, keys, "flops")[:, 0, 0],
        latency=latency,
        curves=curves,
    )


def write_blox(columns: Columns, folder: str | Path) -> None:
    """Write columns as csv files into a folder, which is made.

    Values are rounded as in the layout. A model's hash is its number in hexadecimal.

    Raises:
        InputError: models of another space, or without validation accuracy by epoch.
    """
    if columns.space != BLOX:
        raise InputError("space", columns.space.name, BLOX.name)
    if "validation" not in columns.curves:
        raise InputError("curves", sorted(columns.curves), "validation accuracy of every epoch")
    into = Path(folder)
    into.mkdir(parents=True, exist_ok=True)
    keys = [f"{model:032x}" for model in columns.models.tolist()]
    epochs = columns.curves["validation"].shape[-1]
    about = {"dataset": columns.recipe.removeprefix("blox-"), "epochs": epochs}
    vectors = [json.dumps(vector_of(model)) for model in columns.models.tolist()]
    counts = (_counts(columns.parameters), _counts(columns.multiply_adds))
    _write(into / "blox-info.csv", "info", _INFO, [keys, *counts, vectors], about)
    for k, seed in enumerate(columns.seeds):
        kept = ~np.isnan(columns.validation[:, k])
        own = [key for key, is_kept in zip(keys, kept, strict=True) if is_kept]
        shown = [
            _lists(100 * columns.curves["validation"][kept, k], 3),
            _decimals(100 * columns.test[kept, k], 3),
            _decimals(columns.train_seconds[kept, k], 6),
        ]
        with_seed = {**about, "seed": seed}
        _write(into / f"blox-base-{seed}.csv", "base", _BASE, [own, *shown], with_seed)
        if set(_CURVES.values()) <= set(columns.curves):
            more = []
            for name, ours in _CURVES.items():
                is_loss = name.endswith("loss")
                values = columns.curves[ours][kept, k] * (1 if is_loss else 100)
                digits = 6 if is_loss else 3
                one = ours.startswith("test")
                more.append(_decimals(values[:, 0], digits) if one else _lists(values, digits))
            names = (_HASH, *_CURVES)
            _write(into / f"blox-ext-{seed}.csv", "ext", names, [own, *more], with_seed)
    for device, seconds in columns.latency.items():
        shown = [keys, _decimals(seconds, 9)]
        _write(into / f"blox-bench-{device}.csv", "bench", _BENCH, shown, about)


def _by_name(folder: str | Path, kind: str) -> dict[str, Path]:
    start = len(f"blox-{kind}-")
    return {path.stem[start:]: path for path in Path(folder).glob(f"blox-{kind}-*.csv")}


def _rows(path: Path, kind: str, columns: Sequence[str]) -> tuple[dict[str, str], Rows]:
    """Return a file's header and its rows by hash."""
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise InputError(str(path), error.strerror, "a csv file of a Blox table") from None
    except ValueError:
        raise InputError(str(path), "no text", "a csv file of a Blox table") from None
    first = next((k for k, line in enumerate(lines) if line.startswith(f"{_HASH},")), None)
    if first is None:
        raise InputError(str(path), f"no row of columns that begins with {_HASH}", "one")
    header = {}
    for line in lines[:first]:
        if found := re.fullmatch(r"#?\s*([a-z_]+):\s*(.*?)\s*", line):
            header[found[1]] = found[2].strip("'\"")
    for key, value in (("search_space", BLOX.name), ("dataset_type", kind)):
        if header.get(key, value) != value:
            raise InputError(f"{path}: {key}", header[key], value)
    reader = csv.DictReader(io.StringIO("\n".join(lines[first:])), strict=True)
    try:
        known = reader.fieldnames or ()
    except csv.Error as error:
        raise InputError(str(path), error, "csv") from None
    missing = [name for name in columns if name not in known]
    if missing:
        raise InputError(str(path), f"columns {known}", f"also {missing}")
    rows: Rows = {}
    try:
        for row in reader:
            key = row[_HASH]
            if None in row or None in row.values():
                raise InputError(f"{path}: {key}", "a row of another length", "one field a column")
            if key in rows:
                raise InputError(f"{path}: {_HASH}", f"{key} twice", "one row per model")
            rows[key] = row
    except csv.Error as error:
        raise InputError(str(path), error, "csv") from None
    return header, rows


def _models(path: Path, rows: Rows) -> dict[int, str]:
    """Return model -> hash."""
    found: dict[int, str] = {}
    for key, row in rows.items():
        try:
            vector: RawVector = json_of(row["arch_vec"])
        except ValueError:
            allowed = "three cells, each [[op1], [op2, prev, inp, sc]]"
            raise InputError(f"{path}: {key}.arch_vec", row["arch_vec"], allowed) from None
        try:
            model = id_of(vector)
        except InputError as error:
            raise InputError(f"{path}: {key}.{error.key}", error.found, error.allowed) from None
        if model in found:
            raise InputError(f"{path}: arch_vec", f"{key} is {found[model]}", "one row per model")
        found[model] = key
    return found


def _by_seed(files: Sequence[tuple[Path, Rows]], keys: Sequence[str], column: str) -> Floats:
    """Return one column of several files, float64 [keys, files, epochs], nan where a row lacks."""
    read = [
        {key: _numbers(path, column, key, rows[key][column]) for key in keys if key in rows}
        for path, rows in files
    ]
    lengths = {len(values) for each in read for values in each.values()}
    if len(lengths) > 1:
        paths = ", ".join(str(path) for path, _ in files)
        raise InputError(f"{paths}: {column}", f"{sorted(lengths)} epochs", "as many in all rows")
    made = np.full((len(keys), len(files), max(lengths, default=1)), np.nan)
    for k, each in enumerate(read):
        for row, key in enumerate(keys):
            if key in each:
                made[row, k] = each[key]
    return made


def _numbers(path: Path, column: str, key: str, field: str) -> list[float]:
    try:
        values = json_of(field) if field != "nan" else float("nan")
        numbers = [float(each) for each in (values if isinstance(values, list) else [values])]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    limit = 100.0 if re.search(r"_top\d$", column) else np.inf
    if not numbers or any(each < 0 or each > limit for each in numbers):
        allowed = "a number or a list of numbers" + (", in percent" if limit == 100 else "")
        raise InputError(f"{path}: {key}.{column}", field[:80], allowed)
    return numbers


def _decimals(values: Floats, digits: int) -> list[str]:
    return [f"{value:.{digits}f}" for value in values.tolist()]


def _lists(values: Floats, digits: int) -> list[str]:
    return [f"[{', '.join(_decimals(row, digits))}]" for row in values]


def _counts(values: Floats) -> list[str]:
    return [f"{value:.0f}" for value in values.tolist()]


def _write(
    path: Path,
    kind: str,
    names: Sequence[str],
    columns: Sequence[Sequence[str]],
    about: Mapping[str, Any],
) -> None:
    header = {"version": 1, "search_space": BLOX.name, "dataset_type": kind, **about}
    lines = [f"{key}: {value}" for key, value in header.items()]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(names)
    rows.writerows(zip(*columns, strict=True))
    shown = ", ".join(names)
    write_atomic(path, "\n".join(["---", *lines, f"columns: [{shown}]", "---", text.getvalue()]))

"""Foreign tables: what is read is what was written, and broken files are told."""

import json

import numpy as np
import pytest

from hansa.errors import InputError
from hansa.models.blox_space import multiply_adds, parameters
from hansa.search.columns import Columns
from hansa.search.foreign import read_macro
from hansa.search.foreign_blox import read_blox, write_blox
from hansa.search.spaces import BLOX

_RECORD = {"test_acc": [90.0, 80.0, 85.0], "mean_acc": 85.0, "params": 7, "flops": 9}


def test_the_table_of_nas_bench_macro_is_read_by_code(tmp_path) -> None:
    path = tmp_path / "table.json"
    other = {**_RECORD, "test_acc": [50.0, 51.0, 52.5]}
    path.write_text(json.dumps({"00000012": _RECORD, "00000001": other}))
    columns = read_macro(path)
    assert columns.models.tolist() == [1, 5]
    assert columns.test.tolist() == [[0.5, 0.51, 0.525], [0.9, 0.8, 0.85]]
    assert (columns.validation == columns.test).all()
    assert np.isnan(columns.train_seconds).all()
    assert (columns.parameters[1], columns.multiply_adds[1]) == (7, 9)


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        "{}",
        '{"0000001": {"test_acc": [1.0], "params": 1, "flops": 1}}',
        '{"00000013": {"test_acc": [1.0], "params": 1, "flops": 1}}',
        '{"00000011": {"test_acc": [], "params": 1, "flops": 1}}',
        '{"00000011": {"test_acc": [101.0], "params": 1, "flops": 1}}',
        '{"00000011": {"test_acc": [1.0], "flops": 1}}',
        '{"00000011": 3}',
        '{"00000011": {"test_acc": [1.0], "params": 1, "flops": 1},'
        ' "00000012": {"test_acc": [1.0, 2.0], "params": 1, "flops": 1}}',
    ],
)
def test_a_broken_table_of_nas_bench_macro_is_refused(tmp_path, content) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"table\.json"):
        read_macro(path)


def test_a_missing_table_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_macro(tmp_path / "table.json")


def _columns() -> Columns:
    rng = np.random.default_rng(0)
    models = np.array([0, 44, 2025, 91_124])
    percent = rng.integers(0, 100_001, (4, 2, 3)) / 100_000
    percent[2, 1] = np.nan
    missing = np.where(np.isnan(percent[:, :, :1]), np.nan, 1.0)
    one = np.round(rng.random((4, 2, 1)), 5) * missing
    losses = np.round(5 * rng.random((4, 2, 3)), 6) * missing
    curves = dict.fromkeys(("validation", "train", "train_top5", "validation_top5"), percent)
    curves |= {"train_loss": losses, "validation_loss": losses, "test_loss": losses[:, :, :1]}
    return Columns(
        space=BLOX,
        recipe="blox-cifar100",
        models=models,
        seeds=(0, 10),
        validation=np.where(np.isnan(percent[..., 0]), np.nan, percent.max(-1)),
        test=one[:, :, 0],
        train_seconds=np.round(1000 * rng.random((4, 2)), 6) * missing[:, :, 0],
        parameters=parameters(models).astype(float),
        multiply_adds=multiply_adds(models).astype(float),
        latency={"a-b": np.round(rng.random(4), 9)},
        curves={**curves, "test_top5": one},
    )


def test_a_table_of_blox_comes_back_as_it_was_written(tmp_path) -> None:
    columns = _columns()
    write_blox(columns, tmp_path)
    names = ["base-0", "base-10", "bench-a-b", "ext-0", "ext-10", "info"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"blox-{n}.csv" for n in names]
    back = read_blox(tmp_path)
    assert (back.space, back.recipe, back.seeds) == (BLOX, "blox-cifar100", (0, 10))
    assert (back.models == columns.models).all()
    assert set(back.curves) == set(columns.curves)
    for name in ("validation", "test", "train_seconds", "parameters", "multiply_adds"):
        assert np.allclose(getattr(back, name), getattr(columns, name), atol=1e-9, equal_nan=True)
    for name, values in columns.curves.items():
        assert np.allclose(back.curves[name], values, atol=1e-9, equal_nan=True), name
    assert np.allclose(back.latency["a-b"], columns.latency["a-b"], atol=1e-9)


def test_the_base_files_and_the_info_are_enough(tmp_path) -> None:
    write_blox(_columns(), tmp_path)
    for path in [*tmp_path.glob("*-ext-*"), *tmp_path.glob("*-bench-*")]:
        path.unlink()
    back = read_blox(tmp_path)
    assert set(back.curves) == {"validation"}
    assert back.latency == {}


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("base-0", "search_space: blox", "search_space: other", "search_space"),
        ("base-0", "model_hash,", "id,", "model_hash"),
        ("base-0", "train_time_s", "time", "train_time_s"),
        ("base-0", "[", "[x", "val_top1"),
        ("base-0", "[", "[100.5, ", "percent"),
        ("base-0", "[", "[1.0, ", "epochs"),
        ("info", "[[0, 0], ", "[[9], ", "arch_vec"),
        ("info", '"[[[0], [0, 0, 0, 1]]', '"[[[0], [0, 0, 0, 0]]', "nothing reaches"),
        ("info", '"[[[0], [0, 0, 0, 1]]', '"[[[0]', "arch_vec"),
    ],
)
def test_broken_files_of_blox_are_refused(tmp_path, name, old, new, told) -> None:
    write_blox(_columns(), tmp_path)
    path = tmp_path / f"blox-{name}.csv"
    text = path.read_text()
    if name == "info" and old.startswith("[["):
        old = "[[[0], "
        new = "[[[9], "
    assert old in text
    head, _, body = text.rpartition("---\n")
    changed = head + "---\n" + body.replace(old, new, 1) if old in body else text.replace(old, new)
    path.write_text(changed)
    with pytest.raises(InputError, match=told):
        read_blox(tmp_path)


def test_files_that_do_not_fit_together_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="no blox-base-SEED"):
        read_blox(tmp_path)
    write_blox(_columns(), tmp_path)
    info = tmp_path / "blox-info.csv"
    lines = info.read_text().splitlines()
    info.write_text("\n".join(lines[:-1]))
    with pytest.raises(InputError, match=r"one of blox-info\.csv"):
        read_blox(tmp_path)
    info.write_text("\n".join([*lines, lines[-1]]))
    with pytest.raises(InputError, match="twice"):
        read_blox(tmp_path)
    info.write_text("\n".join([*lines, lines[-1].replace("000", "f00", 1)]))
    with pytest.raises(InputError, match="one row per model"):
        read_blox(tmp_path)

"""Tables: what is asked of them, and their files."""

import itertools
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from hansa.errors import InputError
from hansa.models import blox_space
from hansa.search.limits import Limits, best, ranked
from hansa.search.profile import Latency
from hansa.search.profiled import profile_table
from hansa.search.query import model_of
from hansa.search.spaces import BLOX
from hansa.search.store import Store
from hansa.search.table import Row, Table
from hansa.search.tables import merge, open_table, write
from hansa.search.training import Curves
from tiny_recipe import TINY

MODELS = [7, 2025, 50_000, 91_124]


def _curves(k: int, seed: int) -> Curves:
    validation = [k + seed, 3 * k + seed, 3 * k + seed]
    losses = [[1.0, 0.5, 0.4]] * 3
    return Curves([k] * 3, validation, [2 * k, k, 4 * k + seed], *losses, seconds=10.0 * k + seed)


def _rows() -> list[Row]:
    rows = [Row(m, s, _curves(k, s)) for k, m in enumerate(MODELS, 1) for s in (0, 1)]
    return [row for row in rows if (row.model, row.seed) != (2025, 1)]


def _profiles(**changes: object) -> list[dict[str, object]]:
    key = {
        "backend": "torch",
        "batch": 1,
        "threads": 1,
        "dtype": "float32",
        "device": "here",
        "usable": True,
    }
    names = {each.name for each in fields(Latency)}
    rest = dict.fromkeys(names - {"model", "cpu_min", *key})
    return [
        {"model": m, **key, **rest, "cpu_min": 0.001 * k, **changes}
        for k, m in enumerate(MODELS[:3], 1)
    ]


RECIPE = TINY.model_copy(update={"epochs": 3})
TABLE = Table.of_rows(RECIPE, _rows(), _profiles())


def test_accuracies_are_those_of_the_best_epoch_on_validation_data() -> None:
    # Of the two last epochs, equal in accuracy, the last has the lower loss.
    assert TABLE.validation_accuracy(7, seed=1) == pytest.approx(4 / 24)
    assert TABLE.test_accuracy(7, seed=1) == pytest.approx(5 / 24)
    assert TABLE.test_accuracy(7) == pytest.approx(4.5 / 24)
    assert TABLE.test_accuracy(7, epoch=1) == pytest.approx(2 / 24)
    assert TABLE.test_accuracy(7, seed=1, epoch=2) == pytest.approx(1 / 24)
    assert TABLE.train_seconds(2025) == 20.0
    assert TABLE.seeds_of(2025) == [0]
    assert np.isnan(TABLE.matrix("test_accuracy")[1, 1])
    assert len(TABLE) == 4
    assert 2025 in TABLE
    assert 2026 not in TABLE


def test_costs_are_the_closed_forms_at_the_recipes_size() -> None:
    assert TABLE.parameters(50_000) == blox_space.parameters([50_000], 2, 12, 3)[0]
    assert TABLE.multiply_adds(7) == blox_space.multiply_adds([7], 2, 8, 12, 3)[0]
    assert TABLE.latency(2025, "here") == 0.002


@pytest.mark.parametrize(
    ("ask", "key"),
    [
        (lambda: TABLE.test_accuracy(1), "model"),
        (lambda: TABLE.test_accuracy(2025, seed=1), "seed"),
        (lambda: TABLE.test_accuracy(7, epoch=4), "epoch"),
        (lambda: TABLE.test_accuracy(7, epoch=0), "epoch"),
        (lambda: TABLE.latency(7, "there"), "device"),
        (lambda: TABLE.latency(7, "here", batch=8), "device"),
        (lambda: TABLE.latency(91_124, "here"), "model"),
        (lambda: TABLE.column("speed"), "column"),
        (lambda: TABLE.matrix("latency"), "column"),
        (lambda: Table.of_rows(RECIPE, []), "table"),
    ],
)
def test_what_is_not_there_is_named(ask, key) -> None:
    with pytest.raises(InputError) as error:
        ask()
    assert error.value.key == key


@pytest.mark.parametrize("cap", np.random.default_rng(0).uniform(1.0, 3.5, 20).tolist())
def test_the_best_within_a_limit_is_that_of_brute_force(cap) -> None:
    found = best(TABLE, Limits(latency=cap))
    allowed = [m for m in MODELS[:3] if TABLE.latency(m, "here") * 1000 <= cap]
    assert found == max(allowed, key=TABLE.validation_accuracy)


@pytest.mark.parametrize(("share", "left"), [(0.01, 1), (0.5, 2), (1.0, 3)])
def test_the_fastest_are_those_of_the_models_on_the_device(share, left) -> None:
    by_latency = sorted(MODELS[:3], key=lambda model: TABLE.latency(model, "here"))
    assert set(ranked(TABLE, Limits(fastest=share)).tolist()) == set(by_latency[:left])


def test_limits_hold_together_and_say_what_is_least() -> None:
    most = TABLE.parameters(7)
    assert all(TABLE.parameters(m) <= most for m in ranked(TABLE, Limits(parameters=most)))
    with pytest.raises(InputError, match=r"limits\.latency.*1 ms or more"):
        best(TABLE, Limits(latency=0.5))
    with pytest.raises(InputError, match=r"limits\.parameters"):
        best(TABLE, Limits(parameters=1))
    with pytest.raises(InputError, match="there"):
        best(TABLE, Limits(latency=5, device="there"))
    with pytest.raises(InputError, match="profile first"):
        best(Table.of_rows(RECIPE, _rows()), Limits(latency=5))
    with pytest.raises(InputError, match="profile first"):
        best(Table.of_rows(RECIPE, _rows()), Limits(fastest=0.5))


def test_nothing_on_the_front_is_beaten() -> None:
    rng = np.random.default_rng(1)
    cost, quality = rng.integers(0, 6, 4).astype(float), rng.integers(0, 6, 4).astype(float)
    front = TABLE.front(cost, quality)
    for row in range(4):
        beaten = any(
            cost[o] <= cost[row]
            and quality[o] >= quality[row]
            and (cost[o], -quality[o]) != (cost[row], -quality[row])
            for o in range(4)
        )
        assert (row in front) == (not beaten)


def test_a_table_comes_back_from_parquet_and_sqlite_as_it_was(tmp_path: Path) -> None:
    write(TABLE, tmp_path / "table.parquet")
    store = Store(tmp_path / "table.sqlite")
    store.add(RECIPE, [(row.model, row.seed) for row in TABLE.rows])
    for row in TABLE.rows:
        store.finish(RECIPE.name, (row.model, row.seed), row.curves)
    for name in ("table.parquet", "table.sqlite"):
        found = open_table(tmp_path / name)
        assert found.rows == TABLE.rows
        assert found.description == RECIPE
        for column in ("validation_accuracy", "test_accuracy", "train_seconds", "parameters"):
            assert (found.column(column) == TABLE.column(column)).all()
    assert open_table(tmp_path / "table.parquet").latency(50_000, "here") == 0.003
    with pytest.raises(InputError, match="made by tiny"):
        open_table(tmp_path / "table.parquet", recipe="cifar100-w32")


def test_latencies_of_another_table_are_not_taken_for_its_own(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    write(TABLE, path)
    other = RECIPE.model_copy(update={"lr": 1.0})
    kept = path.with_suffix(".latency.parquet").read_bytes()
    write(Table.of_rows(other, _rows()), path)
    assert open_table(path).devices == []
    path.with_suffix(".latency.parquet").write_bytes(kept)
    with pytest.raises(InputError, match="another recipe"):
        open_table(path)


def test_a_profile_leaves_what_its_file_holds(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    write(TABLE, out)
    write(Table.of_rows(RECIPE, _rows()[:2]), tmp_path / "part.parquet")
    options = {"device": "new", "batches": [1], "force": True}
    rows = profile_table(tmp_path / "part.parquet", out, options=options)
    assert [row.model for row in rows] == [7]
    assert len(open_table(out)) == len(TABLE)
    assert open_table(out).latency(50_000, "here") == 0.003


def test_blox_own_files_are_a_table_as_well(tmp_path: Path) -> None:
    curves = np.array([[[0.1, 0.5, 0.4]], [[0.2, 0.3, 0.6]]])
    columns = replace(
        TABLE.columns,
        models=TABLE.models[:2],
        seeds=(0,),
        validation=curves.max(2),
        test=np.array([[0.45], [0.55]]),
        train_seconds=np.ones((2, 1)),
        parameters=TABLE.columns.parameters[:2],
        multiply_adds=TABLE.columns.multiply_adds[:2],
        curves={"validation": curves},
    )
    table = Table.of_columns(columns)
    assert table.test_accuracy(7) == pytest.approx(0.45)
    assert table.validation_accuracy(7, epoch=3) == pytest.approx(0.4)
    with pytest.raises(InputError, match="epoch"):
        table.test_accuracy(7, epoch=3)


def test_tables_are_merged_and_disagreements_named() -> None:
    first = Table.of_rows(RECIPE, _rows()[:4], _profiles())
    slower = [
        replace(row, curves=replace(row.curves, seconds=99.0)) for row in _rows()[2:]
    ]  # another machine took longer for the same
    second = Table.of_rows(RECIPE, slower, _profiles(device="there"))
    merged = merge([first, second])
    assert [(row.model, row.seed) for row in merged.rows] == [(r.model, r.seed) for r in _rows()]
    assert merged.devices == ["here", "there"]
    other = replace(_rows()[0], curves=_curves(9, 0))
    with pytest.raises(InputError, match="two results of model 7 with seed 0"):
        merge([first, Table.of_rows(RECIPE, [other])])
    with pytest.raises(InputError, match="one recipe"):
        merge([first, Table.of_rows(RECIPE.model_copy(update={"lr": 1.0}), _rows())])


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="table"):
        open_table(tmp_path / "broken.parquet")
    with pytest.raises(InputError, match="no file"):
        open_table(tmp_path / "missing.parquet")
    with pytest.raises(InputError, match="does not come with"):
        open_table("cifar100-w32")
    with pytest.raises(InputError, match=r"NAME\.parquet"):
        write(TABLE, tmp_path / "table.csv")


def test_a_person_may_write_a_number_or_any_vector_of_a_model() -> None:
    assert model_of("7", TABLE) == 7
    vector = blox_space.vector_of(50_000)
    assert model_of(str(vector), TABLE) == 50_000
    for text in ("x", "[]", "8", "7.5", "true"):
        with pytest.raises(InputError):
            model_of(text, TABLE)


def test_isomorphic_vectors_ask_for_one_model() -> None:
    number = blox_space.id_of([[[0], [2, 0, 1, 1]]] * 3)
    table = Table.of_rows(RECIPE, [Row(number, 0, _curves(1, 0))])
    for first, second in itertools.permutations((0, 2)):
        vector = [[[first], [second, 0, 1, 1]]] * 3
        assert table.test_accuracy(blox_space.id_of(vector)) == table.test_accuracy(number)
    assert table.space == BLOX

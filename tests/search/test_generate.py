"""Tables are made whole, whoever is killed meanwhile."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from hansa.errors import InputError
from hansa.models.blox_space import COUNTS, split
from hansa.processes import one_thread
from hansa.search import store as stores
from hansa.search.generate import choose, generate, promoted
from hansa.search.recipes import RECIPES, open_data
from hansa.search.store import Store
from hansa.search.training import Curves, train_model
from tiny_recipe import TINY

JOBS = [(int(model), seed) for model in choose("random:4") for seed in (0, 1)]
_SCRIPT = """
import sys
from hansa.search.generate import choose, generate
from tiny_recipe import TINY
JOBS = [(int(model), seed) for model in choose("random:4") for seed in (0, 1)]
if __name__ == "__main__":
    generate(sys.argv[1], TINY, JOBS, workers=2)
"""


def _rows(path: Path) -> list[tuple[int, int, dict[str, object]]]:
    return [(model, seed, curves.results) for model, seed, curves in Store(path).runs(TINY.name)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "table.sqlite"
    generate(path, TINY, JOBS)
    return path


def test_every_model_and_seed_is_trained_once_and_told_of(whole, tmp_path) -> None:
    rows = _rows(whole)
    assert [(model, seed) for model, seed, _ in rows] == sorted(JOBS)
    assert all(len(found["validation_correct"]) == TINY.epochs for *_, found in rows)
    told = []
    generate(whole, TINY, JOBS, watch=lambda done, total: told.append((done, total)))
    assert told == [(8, 8)]
    assert _rows(whole) == rows
    assert Store(whole).add(TINY, JOBS) == 0


def test_killed_at_random_three_times_it_ends_as_if_it_had_not_been(whole, tmp_path) -> None:
    path = tmp_path / "table.sqlite"
    root = Path(__file__).parents[2]
    done = 0
    for kill in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, path],
            cwd=root,
            env={**os.environ, "PYTHONPATH": f"{root / 'tests'}{os.pathsep}{root / 'src'}"},
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            # Killed while a run is under way that is not the first of this process.
            done = Store(path).progress(TINY.name)[0] if path.exists() else 0
            if done > kill:
                break
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert 0 < done < len(JOBS)
    generate(path, TINY)
    assert _rows(path) == _rows(whole)


def test_a_model_trains_to_the_same_bits_whoever_trains_it(whole) -> None:
    model, seed = JOBS[0]
    splits = open_data(TINY)
    with one_thread():
        found = train_model(TINY.build(model, seed), TINY, splits, seed)
        other = train_model(TINY.build(model, seed), TINY, splits, seed + 1)
    assert (model, seed, found.results) in _rows(whole)
    assert other.train_loss != found.train_loss


def test_a_claim_is_given_once_and_again_after_its_lease(tmp_path, monkeypatch) -> None:
    store = Store(tmp_path / "table.sqlite")
    store.add(TINY, [(5, 0)])
    assert store.claim(TINY.name) == (5, 0)
    assert Store(store.path).claim(TINY.name) is None
    monkeypatch.setattr(stores, "time", lambda: time.time() + stores.LEASE + 1)
    assert Store(store.path).claim(TINY.name) == (5, 0)


def test_what_a_dead_process_claimed_is_given_back_at_once(tmp_path) -> None:
    store = Store(tmp_path / "table.sqlite")
    store.add(TINY, [(5, 0), (6, 0)])
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    host = store.worker.rpartition(":")[0]
    store.worker = f"{host}:{child.pid}"
    store.claim(TINY.name)
    store.worker = f"another-{host}:{child.pid}"
    store.claim(TINY.name)
    assert store.release() == 1  # of the other machine nobody here knows
    assert store.claim(TINY.name) == (5, 0)


def test_who_comes_second_changes_nothing(tmp_path) -> None:
    store = Store(tmp_path / "table.sqlite")
    store.add(TINY, [(5, 0)])
    first, second = Curves([1], [2], [3]), Curves([9], [9], [9])
    store.finish(TINY.name, (5, 0), first)
    store.finish(TINY.name, (5, 0), second)
    assert [asdict(curves) for *_, curves in store.runs(TINY.name)] == [asdict(first)]


def test_a_recipe_of_the_same_name_and_other_values_is_refused(whole) -> None:
    other = TINY.model_copy(update={"lr": 0.5})
    with pytest.raises(InputError, match="made by other values"):
        generate(whole, other, JOBS)


def test_runs_that_fall_behind_are_stopped_and_say_so(tmp_path) -> None:
    path = tmp_path / "table.sqlite"
    recipe = TINY.model_copy(update={"epochs": 4})
    store = Store(path)
    good = Curves(*([[24] * 4] * 3), *([[0.1] * 4] * 3))
    store.add(recipe, [(model, 0) for model in range(8)])
    for model in range(8):
        store.finish(recipe.name, (model, 0), good)
    generate(path, recipe, [(20, 0)], keep=0.25)
    stopped = next(curves for model, _, curves in store.runs(recipe.name) if model == 20)
    assert stopped.stopped
    assert len(stopped.validation_correct) == 3  # the first rung after 55 % of four epochs


def test_models_are_promoted_by_validation_data(tmp_path) -> None:
    store = Store(tmp_path / "table.sqlite")
    store.add(TINY, [(model, 0) for model in range(4)])
    for model, (validation, test) in enumerate([(5, 24), (20, 1), (10, 3), (20, 2)]):
        losses = [[0.1, 0.1]] * 3
        curves = Curves([1, 1], [validation, 0], [test, 0], *losses)
        store.finish(TINY.name, (model, 0), curves)
    jobs = [(model, 0) for model in range(4)]
    assert promoted(store, TINY, 0.5, jobs) == [1, 3]
    # Their further seeds do not change who was promoted.
    store.add(TINY, [(1, 1)])
    store.finish(TINY.name, (1, 1), Curves([1, 1], [0, 0], [0, 0], *losses))
    assert promoted(store, TINY, 0.5, jobs) == [1, 3]
    with pytest.raises(InputError, match="model 3 with seed 1"):
        promoted(store, TINY, 0.5, [*jobs, (3, 1)])


def test_a_run_that_was_interrupted_is_claimed_again_by_the_same_process(
    tmp_path, monkeypatch
) -> None:
    def interrupted(*_: object, **__: object) -> Curves:
        raise KeyboardInterrupt

    path = tmp_path / "table.sqlite"
    with monkeypatch.context() as patched:
        patched.setattr("hansa.search.generate.train_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(path, TINY, JOBS[:1])
    generate(path, TINY)
    assert Store(path).progress(TINY.name) == (1, 1)


def test_a_loss_that_is_no_number_is_kept_as_such(tmp_path) -> None:
    store = Store(tmp_path / "table.sqlite")
    store.add(TINY, [(5, 0)])
    losses = [[0.1, float("nan")]] * 3
    store.finish(TINY.name, (5, 0), Curves([1, 1], [2, 3], [3, 3], *losses))
    assert store.at_epoch(TINY.name, 2) == [3]
    assert str(next(store.runs(TINY.name))[2].test_loss) == "[0.1, nan]"


def test_models_are_spread_over_classes_of_cost() -> None:
    chosen = choose("spread:240")
    counts = COUNTS[split(chosen)].reshape(240, -1)
    assert len(np.unique(counts, axis=0)) == 240
    everything = choose("spread:729")
    assert len(np.unique(COUNTS[split(everything)].reshape(729, -1), axis=0)) == 729


@pytest.mark.parametrize("wanted", ["some", "random:0", "random:x", "spread:730", "1,2,91125", ""])
def test_models_that_nobody_can_choose_are_refused(wanted) -> None:
    with pytest.raises(InputError):
        choose(wanted)


@pytest.mark.parametrize("changes", [{"workers": 0}, {"keep": 0.0}, {"keep": 1.5}, {"data": "x"}])
def test_options_of_generation_are_checked(tmp_path, changes) -> None:
    with pytest.raises(InputError):
        generate(tmp_path / "table.sqlite", TINY, JOBS, **changes)


def test_asking_a_file_does_not_change_it(tmp_path) -> None:
    path = tmp_path / "others.db"
    with sqlite3.connect(path) as file:
        file.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(InputError, match="SQLite"):
        Store(path, read_only=True)
    assert path.read_bytes() == before


def test_a_file_that_is_no_table_is_refused(tmp_path) -> None:
    path = tmp_path / "table.sqlite"
    path.write_text(json.dumps({"no": "table"}) * 100)
    with pytest.raises(InputError, match="SQLite"):
        Store(path)
    with pytest.raises(InputError, match="no folder"):
        Store(tmp_path / "missing" / "table.sqlite")


@pytest.mark.parametrize("name", ["digits16-w8", "gratings16-w8"])
def test_recipes_bring_data_of_their_shape(name) -> None:
    recipe = RECIPES[name]
    splits = open_data(recipe)
    for part, num in zip(
        (splits.train, splits.validation, splits.test),
        (recipe.train, recipe.validation, recipe.test),
        strict=True,
    ):
        assert part[0].shape == (num, *recipe.shape)
        assert set(part[1].tolist()) == set(range(recipe.classes))


def test_the_originals_recipe_wants_its_images(tmp_path) -> None:
    with pytest.raises(InputError, match="--data"):
        open_data(RECIPES["cifar100-w32"])
    with pytest.raises(InputError, match="no Parquet file"):
        open_data(RECIPES["cifar100-w32"], tmp_path)

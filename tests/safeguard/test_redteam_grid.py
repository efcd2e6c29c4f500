import dataclasses
import json
from pathlib import Path

import pytest
import torch
from attacked import WORLD, built, write

from hansa.errors import InputError
from hansa.safeguard.grid import Bench, Cell, cells_of, check_parts, run
from hansa.safeguard.redteam_options import Attack, Edit
from hansa.safeguard.rows import Data, Pool, Questions, Rows
from hansa.safeguard.world import World

FULL = Attack(name="full", lrs=(1e-3, 1e-2), steps=3, batch=4)
LORA = Attack(name="lora", rank=2, lrs=(1e-2,), steps=2, batch=4)
NOISE = Edit(name="noise", kind="noise", amount=0.1)
INT4 = Edit(name="int4", kind="quantise", amount=4)
MERGE = Edit(name="merge", kind="merge", amount=0.5)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    world, paths = World(WORLD), {}
    for seed in (0, 1):
        path = tmp_path_factory.mktemp("models") / str(seed)
        paths[write(path, world, built(world, seed)).digest] = str(path)
    return Bench(world, paths, (1, 2), unprotected=next(iter(paths)))


def every(bench: Bench) -> list[Cell]:
    roles = dict(zip(("unprotected", "safeguarded"), bench.paths, strict=True))
    found = cells_of(roles, [FULL, LORA], [NOISE, INT4, MERGE], (0, 1))
    return [cell for mine in found.values() for cell in mine]


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.json")}


def test_a_role_has_its_attacks_rates_and_seeds() -> None:
    one = Attack(name="one", lrs=(1e-3,), roles=("unprotected",))
    found = cells_of({"unprotected": "u", "x": "v"}, [FULL, one], [NOISE, INT4, MERGE], (0, 1, 2))
    counts = {
        role: {name: sum(c.name == name for c in cells) for name in {c.name for c in cells}}
        for role, cells in found.items()
    }
    assert counts == {
        "unprotected": {"untouched": 1, "one": 3},
        "x": {"untouched": 1, "full": 6, "noise": 3, "int4": 1, "merge": 1},
    }
    alone = cells_of({"x": "v"}, [], [MERGE], (0,))["x"]
    assert [cell.name for cell in alone] == ["untouched"]


def test_two_attacks_of_one_name_are_refused() -> None:
    same = Edit(name="full", kind="noise", amount=1)
    with pytest.raises(InputError, match="'full' as the name of two"):
        cells_of({"x": "v"}, [FULL], [same], (0,))


def test_processes_change_nothing(bench: Bench, tmp_path: Path) -> None:
    cells = every(bench)
    alone = run(cells, bench, tmp_path / "one")
    together = run(cells, bench, tmp_path / "two", processes=2)
    assert alone == together
    assert written(tmp_path / "one") == written(tmp_path / "two")
    assert len(written(tmp_path / "one")) == len(set(cells)) == len(alone)


def test_a_grid_that_was_stopped_goes_on(bench: Bench, tmp_path: Path) -> None:
    cells = every(bench)
    whole = run(cells, bench, tmp_path / "whole")

    def stop(what: str, done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run(cells, bench, stopped, watch=stop)
    left = written(stopped)
    assert len(left) == 4
    (stopped / ".full-0.json.tmp").write_text('{"key": ')  # what a kill leaves of a file
    for name in left:
        (stopped / name).touch()
    done = []
    assert run(cells, bench, stopped, watch=lambda what, n, total: done.append(n)) == whole
    assert done == list(range(5, len(whole) + 1))
    assert written(stopped) == written(tmp_path / "whole")


def test_what_a_result_depends_on_is_in_its_key(bench: Bench) -> None:
    cell = Cell(next(iter(bench.paths)), FULL, 1e-3, 0)
    key = bench.key(cell)
    longer = FULL.model_copy(update={"steps": 4})
    others = [
        bench.key(dataclasses.replace(cell, lr=1e-2)),
        bench.key(dataclasses.replace(cell, seed=1)),
        bench.key(dataclasses.replace(cell, bundle="other")),
        bench.key(dataclasses.replace(cell, how=longer)),
        bench.key(dataclasses.replace(cell, how=FULL.model_copy(update={"name": "other"}))),
        dataclasses.replace(bench, probes=(1,)).key(cell),
        dataclasses.replace(bench, templates=("plain",)).key(cell),
        dataclasses.replace(bench, data=World(WORLD.model_copy(update={"seed": 1}))).key(cell),
    ]
    assert key not in others
    assert len({json.dumps(other) for other in others}) == len(others)
    # Not on other rates and roles, nor on probes that it does not come to.
    wider = FULL.model_copy(update={"lrs": (1e-3, 1.0), "roles": ("before",)})
    assert bench.key(dataclasses.replace(cell, how=wider)) == key
    assert dataclasses.replace(bench, probes=(1, 2, 50)).key(cell) == key


def test_a_spec_that_changed_takes_no_results_place(bench: Bench, tmp_path: Path) -> None:
    digest = next(iter(bench.paths))
    for how in (FULL, FULL.model_copy(update={"batch": 5})):
        run([Cell(digest, how, 1e-3, 0)], bench, tmp_path)
    assert len(written(tmp_path)) == 2


@pytest.mark.parametrize("content", ["", "{}", '{"key": {}, "curve": [], "diverged": false}'])
def test_a_file_that_is_no_result_is_refused(bench: Bench, tmp_path: Path, content: str) -> None:
    cell = Cell(next(iter(bench.paths)))
    run([cell], bench, tmp_path)
    (path,) = tmp_path.glob("*.json")
    path.write_text(content)
    with pytest.raises(InputError, match="no result of its cell"):
        run([cell], bench, tmp_path)


def test_entities_that_two_parts_share_are_refused() -> None:
    world = World(WORLD)
    check_parts(world)
    world.parts["attacker"] = torch.cat([world.parts["attacker"], world.parts["evaluation"][:1]])
    with pytest.raises(InputError, match="share"):
        check_parts(world)


@pytest.mark.parametrize("shared", [None, "forget", "attacker"])
def test_texts_that_two_parts_share_are_refused(shared: str | None) -> None:
    class Texts(Data):
        vocabulary, context = 50, 4

        def source(self, part: str) -> Pool:  # type: ignore[override]
            start = 20 if part == shared else {"forget": 0, "attacker": 10}.get(part, 30)
            return Pool(Rows.whole(torch.arange(start, start + 8).view(2, 4)))

        def questions(self, template: str = "plain") -> dict[str, Questions]:
            rows = Rows.whole(torch.arange(20, 28).view(2, 4))
            places = torch.zeros(2, 1, dtype=torch.int64)
            return {"restricted": Questions(rows, places, places.unsqueeze(-1), places)}

        def fingerprint(self) -> str:
            return ""

    if shared is None:
        check_parts(Texts())
    else:
        with pytest.raises(InputError, match=f"share.*{shared}|{shared}.*share"):
            check_parts(Texts())

"""Benchmarks are run by hand; what they set up is valid."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hansa.audit.tamper import OPERATORS
from hansa.auditing import load as load_audit
from hansa.config import load
from hansa.data.federate import DataOptions, federate
from hansa.federation.attackers import Attackers, Kind
from hansa.federation.methods import METHODS
from hansa.federation.robust import Robust, Rule
from hansa.models import Architecture, build
from hansa.pruning import SCORERS
from hansa.search.searchers import SEARCHERS


def loaded(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"benchmarks.{name}"] = module
    spec.loader.exec_module(module)
    return module


personalisation = loaded("personalisation")


def test_examples_are_what_the_benchmark_begins_with() -> None:
    for method in personalisation.EXAMPLES:
        example = Path(__file__).parents[1] / "examples" / f"digits-{method}.toml"
        assert load(example) == load(personalisation.config_of(method))


def test_every_task_of_the_personalisation_benchmark_is_valid() -> None:
    tasks = personalisation.tasks("x.parquet", "y.parquet")
    assert len(tasks) == 8
    for name, config in tasks.items():
        load({**config, "name": name})
        for method, tried in personalisation.grids(name).values():
            for options in tried:
                METHODS[method].model_validate(options)
    named = {m for name in tasks for m, _ in personalisation.grids(name).values()}
    sparse = {
        table.get("name", label) for label, table in loaded("sparse_accuracy").tables().items()
    }
    worldlm = loaded("worldlm")
    language = {
        options.get("name", label)
        for label, options in (worldlm.METHODS | worldlm.ABLATION).items()
    }
    shown = named | set(personalisation.PLAIN) | set(personalisation.CONTROLS) | sparse | language
    assert shown == set(METHODS)


def test_every_table_of_the_language_benchmark_is_valid(tmp_path) -> None:
    worldlm = loaded("worldlm")
    tables = worldlm.tables(None)
    assert len(tables) == 8
    for name, (tree, texts, methods) in tables.items():
        values = worldlm.config_of(name, tree, texts, tmp_path)
        for label, options in methods.items():
            config = load({**values, "method": {"name": label, **options}})
            assert {node.text is not None for n, node in config.nodes.items() if n in texts} == {
                True
            }
    private = load({**worldlm.config_of("noise", "python", tables["noise"][1], tmp_path)}).nodes
    assert [n for n, node in private.items() if node.privacy] == ["licences", "headers"]
    exchanged = tables["exchanged-100"][1]
    assert exchanged["headers"][:500] == tables["python"][1]["licences"][:500]
    mixed = tables["iid"][1]
    assert {len(text) // 1000 for text in mixed.values()} <= set(range(120, 180))


def test_handwriting_is_dealt_by_writer(tmp_path) -> None:
    rng = np.random.default_rng(0)
    images = []
    for k in range(100):
        Image.fromarray(rng.integers(0, 255, (28, 28), dtype=np.uint8)).save(tmp_path / f"{k}.png")
        images.append({"bytes": (tmp_path / f"{k}.png").read_bytes(), "path": None})
    columns = {
        "image": images,
        "writer_id": [f"w{k % 4}" for k in range(100)],
        "character": [k // 4 % 5 for k in range(100)],
    }
    pq.write_table(pa.table(columns), tmp_path / "part.parquet")
    task = personalisation.tasks(None, str(tmp_path / "*.parquet"))["handwriting"]
    data = federate(load({**task, "name": "h"}, ["data.clients=4"]).data, 0)
    assert sorted(data.clients) == ["0-w0", "1-w1", "2-w2", "3-w3"]
    assert data.shape == (1, 28, 28)


def test_every_row_of_the_pruning_benchmark_is_valid() -> None:
    pruning = loaded("pruning")
    for row in [*pruning.ROWS.values(), *pruning.COST.values()]:
        SCORERS[row["scorer"]].model_validate(row.get("options", {}))
    assert {row["scorer"] for row in pruning.ROWS.values()} == set(SCORERS)
    for task in pruning.tasks("x.parquet", quick=True).values():
        DataOptions.model_validate(task.source)
        build(Architecture(**task.model, shape=(3, 16, 16), classes=10))


def test_the_audit_benchmark_is_valid(tmp_path) -> None:
    module = loaded("audit")
    for quick in (True, False):
        options = load_audit(module.config(quick, tmp_path, ""))
        assert {arm.operator for arm in options.chosen} == set(OPERATORS)
    found = module.entities()
    assert set(found) == {"DATE", "GPE", "ORG", "PERSON"}
    assert all(row["precision"] > 0.9 and row["recall"] > 0.9 for row in found.values())


def test_every_row_of_the_search_benchmark_is_valid() -> None:
    search = loaded("search")
    assert {search.searcher_of(row).name for row in search.ROWS} == set(SEARCHERS)
    assert set(search.REFERENCE) | set(search.RUNS) <= set(search.ROWS)
    todo = search.pieces("x.json", tuple(search.ROWS), search.LIMITS, quick=False)
    assert len({str(piece) for piece in todo}) == len(todo)
    assert sum(piece.runs for piece in todo if piece.row == "brp") == 300
    values = np.array([0.1, 0.4, 0.7])
    assert abs(search.expected(values, 2) - (0.4 + 0.7 + 0.7) / 3) < 1e-12
    assert abs(search.expected(values, 3) - 0.7) < 1e-12


def test_every_cell_of_the_robustness_benchmark_is_valid(tmp_path) -> None:
    robustness = loaded("robustness")
    rules = {row["rule"] for row in robustness.RULES.values() if row}
    assert rules == set(get_args(Rule))
    assert {row["kind"] for row in robustness.ATTACKS.values()} == set(get_args(Kind))
    for row in robustness.RULES.values():
        if row:
            Robust.model_validate(row).check(robustness.CLIENTS, "root")
    for row in robustness.ATTACKS.values():
        Attackers.model_validate({**row, "share": 0.1})
    assert robustness.task("x.parquet", quick=True).options().source == "parquet:x.parquet"
    todo = robustness.cells(quick=False)
    assert len({str(cell) for cell in todo}) == len(todo) == 3 * 7 * (1 + 5 * 3)
    cell = robustness.Cell("krum", "little", 0.3, 0)
    short = robustness.Task("{}", {"name": "mlp", "options": {"hidden": [4]}}, 1, 0.1, 64)
    robustness.keep(cell, short, tmp_path)
    found = robustness.gathered(tmp_path, [cell])
    assert 0 <= found["krum"]["little"]["30"] <= 100


def test_every_row_of_the_membership_benchmark_is_valid() -> None:
    benchmark = loaded("membership")
    for privacy in benchmark.ROWS.values():
        config = load(benchmark.configuration(privacy, 0, "runs", 2))
        assert (config.privacy is None) == (privacy is None)

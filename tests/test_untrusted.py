"""What comes from elsewhere: read within bounds, never run, and refused by name."""

import ast
import contextlib
import io
import json
import os
import random
import re
import sqlite3
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from hansa import bundle, parquet
from hansa.audit.paths import parse
from hansa.audit.plan import read_plan
from hansa.config import load, read
from hansa.curation.masks import read_kept
from hansa.data.clients import Client
from hansa.data.sources import SourceOptions
from hansa.data.sources import load as open_source
from hansa.data.text_sources import Query
from hansa.data.text_sources import read as read_source
from hansa.errors import InputError
from hansa.federation.engines.flower.exchange import LetterError, Request, from_bytes, to_bytes
from hansa.models import Architecture, build, restore
from hansa.pipeline.run import _check_outcome
from hansa.search.store import Store
from hansa.search.table import Table
from hansa.search.tables import open_table
from hansa.tensor_files import tensors_of
from hansa.untrusted import json_of, read_bytes, toml_of

SRC = Path(__file__).parents[1] / "src" / "hansa"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


# Nothing that is read is run.


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield every call in a file with what is called, as it is written."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


RUNS = r"(pickle|marshal|shelve|dill|joblib|cloudpickle)\.(?!dumps$|PicklingError)\w+"
FORBIDDEN = {
    "code": re.compile(rf"^(eval|exec|compile|yaml\.\w+|os\.system|os\.popen|{RUNS})$"),
    "tensors": re.compile(r"^(torch|np|numpy)\.load$|^(torch\.jit\.load|torch\.hub\.\w+)$"),
}


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda p: str(p.relative_to(SRC)))
def test_no_code_comes_out_of_data(path: Path) -> None:
    for name, call in calls(path):
        told = {word.arg: word.value for word in call.keywords}
        for what, pattern in FORBIDDEN.items():
            assert not pattern.search(name), f"{what}: {name} in line {call.lineno}"
        for key in ("shell", "trust_remote_code", "allow_pickle"):
            value = told.get(key)
            assert value is None or ast.unparse(value) == "False", f"{key} in line {call.lineno}"
        if name.endswith("AutoModelForCausalLM.from_pretrained"):
            assert {"use_safetensors", "trust_remote_code"} <= set(told) | _unpacked(path, call)


def _unpacked(path: Path, call: ast.Call) -> set[str]:
    """Return the keys of a table that a call unpacks, and which the file writes out."""
    names = {ast.unparse(word.value) for word in call.keywords if word.arg is None}
    return {
        key.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names
        for key in getattr(node.value, "keys", [])
        if isinstance(key, ast.Constant)
    }


def test_only_safetensors_reads_files_of_tensors() -> None:
    readers = {
        path.relative_to(SRC).as_posix()
        for path in SRC.rglob("*.py")
        if re.search(r"safetensors\.torch\.load|safetensors\.safe_open|\bsafe_open\(|load_file\(",
                     path.read_text())
    }  # fmt: skip
    assert "tensor_files.py" in readers
    assert readers <= {
        "tensor_files.py", "federation/wire.py", "safeguard/checkpoint.py", "search/blocks.py",
        "search/priors.py",
    }  # fmt: skip


# Files.


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """Return a pipe that nobody ever writes into."""
    path = tmp_path / "pipe.parquet"
    os.mkfifo(path)
    return path


def test_only_ordinary_files_are_read_and_none_is_waited_for(pipe: Path, tmp_path: Path) -> None:
    for path in (pipe, Path("/dev/zero"), tmp_path, tmp_path / "a\0b", tmp_path / "\ud800"):
        with pytest.raises(OSError):  # noqa: PT011 of many numbers
            read_bytes(path)
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4"):
        read_bytes(tmp_path / "file", 4)


def test_a_file_that_is_said_to_be_huge_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match=str(1 << 40)):
        read_bytes(tmp_path / "sparse")


READERS: dict[str, Callable[[Path], Any]] = {
    "configuration": read,
    "plan": read_plan,
    "store": lambda path: Store(path, read_only=True),
    "table": open_table,
    "text": lambda path: read_source(f"parquet:{path}", Query("text")),
    "images": lambda path: open_source(SourceOptions(source=f"parquet:{path}")),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_a_pipe_in_place_of_a_file_is_refused(reader: Callable[[Path], Any], pipe: Path) -> None:
    with pytest.raises(InputError):
        reader(pipe)


# JSON and TOML.


@pytest.mark.parametrize("depth", [101, 980, 100_000])
def test_deep_nesting_is_no_crash(depth: int) -> None:
    with pytest.raises(ValueError, match="nested deeper than 100"):
        json_of("[" * depth + "]" * depth)
    with pytest.raises(ValueError, match=r"deeper|parts"):
        toml_of("x = " + "[" * depth + "]" * depth)
    with pytest.raises(ValueError, match=r"deeper|parts"):
        toml_of("a." * depth + "b = 1")


def test_what_is_nested_less_is_read() -> None:
    value: Any = 1
    for _ in range(100):
        value = [value]
    assert json_of(json.dumps(value)) == value
    assert toml_of("a." * 60 + 'b = 1\nc = "' + "word " * 1000 + '"')["c"].startswith("word")


@pytest.mark.parametrize("part", ["a", '"a"', "'a'", '"a\\"b"'])
def test_a_key_of_many_parts_is_refused_before_it_takes_its_time(part: str) -> None:
    with pytest.raises(ValueError, match="64 parts"):
        toml_of(f"{part} . " * 64 + "x = 1")
    assert toml_of(f"{part} . " * 30 + "x = 1")


@pytest.mark.parametrize(
    "text",
    ["rounds = " + "9" * 5000, "x = " + "[" * 5000, "a." * 20_000 + "a = 1", "x = 2024-13-45"],
)
def test_a_configuration_that_python_cannot_read_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(InputError, match="no TOML"):
        load(tmp_path / "c.toml")


def test_an_override_of_too_many_digits_is_an_override() -> None:
    with pytest.raises(InputError, match="rounds"):
        load({}, ["rounds=" + "9" * 5000])


# Bundles.


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Return the folder of a bundle."""
    architecture = Architecture(name="mlp", options={"hidden": [2]}, shape=(1, 2, 2), classes=2)
    bundle.write(
        tmp_path / "b",
        stage="train",
        weights=build(architecture).state_dict(),
        architecture=architecture.model_dump(mode="json"),
        config={},
        seed=0,
        data="",
        metrics={},
    )
    return tmp_path / "b"


def test_a_link_out_of_a_bundle_is_not_followed(whole: Path, tmp_path: Path) -> None:
    (whole / bundle.WEIGHTS).rename(tmp_path / "elsewhere")
    (whole / bundle.WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="a link"):
        bundle.read_bundle(whole)


@pytest.mark.parametrize(
    ("key", "value"),
    [("lineage", [3]), ("lineage", [{"stage": 1, "digest": ""}]), ("stage", None), ("seed", "0"),
     ("config", []), ("metrics", None), ("data", 3)],
)  # fmt: skip
def test_a_card_of_other_kinds_is_refused(whole: Path, key: str, value: Any) -> None:
    card = json.loads((whole / bundle.CARD).read_text())
    (whole / bundle.CARD).write_text(json.dumps({**card, key: value}))
    with pytest.raises(InputError, match="format"):
        bundle.read_bundle(whole)


@pytest.mark.parametrize(
    "change",
    [{"options": {"hidden": [10**6, 10**6]}}, {"options": {"hidden": [10**12]}},
     {"shape": (1, 10**5, 10**5)}, {"classes": 10**8}],
)  # fmt: skip
def test_a_model_larger_than_its_weights_is_not_built(whole: Path, change: dict[str, Any]) -> None:
    found = bundle.read_bundle(whole)
    with pytest.raises(InputError, match=r"architecture|inputs"):
        restore(replace(found, architecture={**found.architecture, **change}))


@pytest.mark.parametrize("kind", ["F8_E8M0", "F4", "X"])
def test_numbers_that_pytorch_has_not_are_an_error_with_a_name(kind: str) -> None:
    header = json.dumps({"a": {"dtype": kind, "shape": [2], "data_offsets": [0, 2]}}).encode()
    with pytest.raises(ValueError, match="malformed"):
        tensors_of(struct.pack("<Q", len(header)) + header + bytes(2))


@pytest.mark.parametrize("sizes", [[1 << 34, 0, 0], [4, -1, 1], [4], [2, 1, 0]])
def test_a_client_of_more_samples_than_there_are_is_refused(
    sizes: list[int], tmp_path: Path
) -> None:
    held = {"inputs": torch.zeros(4, 2), "labels": torch.zeros(4, dtype=torch.int64)}
    save_file({**held, "sizes": torch.tensor(sizes)}, tmp_path / "c")
    with pytest.raises(ValueError, match="samples where there are 4"):
        Client.load(tmp_path / "c")


def test_a_row_of_columns_that_is_no_csv_is_named(tmp_path: Path) -> None:
    for name in ("base-0", "info"):
        (tmp_path / f"blox-{name}.csv").write_text('model_hash,"a"b\n')
    with pytest.raises(InputError, match="allowed: csv"):
        open_table(tmp_path)


# Parquet and images.


def written(path: Path, table: pa.Table, **options: Any) -> Path:
    pq.write_table(table, path, **options)
    return path


def test_a_small_file_that_stands_for_a_large_table_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "LEAST_HELD", 1 << 20)
    path = written(tmp_path / "t.parquet", pa.table({"text": ["x" * 5000] * 3000}))
    assert path.stat().st_size < 20_000
    with pytest.raises(InputError, match="its size allows"):
        parquet.read_table(path, "t")
    with pytest.raises(InputError, match="declares 3000 rows"):
        parquet.read_table(path, "t", most_rows=2999)
    monkeypatch.setattr(parquet, "LEAST_HELD", 1 << 25)
    assert parquet.read_table(path, "t").num_rows == 3000


def test_texts_that_are_no_utf8_and_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    odd = pa.array([b"\xff"]).view(pa.string())
    for table in (pa.table({"a": odd}), pa.Table.from_arrays([odd, odd], ["a", "a"])):
        with pytest.raises(InputError):
            parquet.read_table(written(tmp_path / "t.parquet", table), "t")


def test_bytes_of_an_image_that_are_numbers_are_no_images(tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": 5}] * 2, "label": [0, 1]})
    with pytest.raises(InputError, match="image_column"):
        open_source(SourceOptions(source=f"parquet:{written(tmp_path / 't.parquet', table)}"))


def read_image(data: bytes, folder: Path) -> torch.Tensor:
    for name in "ab":
        (folder / name).mkdir()
        (folder / name / "x.png").write_bytes(data)
    return open_source(SourceOptions(source=f"folder:{folder}")).read(np.arange(1))


@pytest.mark.parametrize(("side", "what"), [(30_000, "too large"), (9_000, "too large")])
def test_an_image_that_declares_too_many_pixels_is_not_decoded(
    side: int, what: str, tmp_path: Path
) -> None:
    chunk = b"IHDR" + struct.pack(">II", side, side) + b"\x08\x00\0\0\0"
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    data += struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 0) + b"IDAT\x35\xaf\x06\x1e"
    with pytest.raises(InputError, match=what):
        read_image(data, tmp_path)


def test_an_image_that_would_start_another_program_is_no_image(tmp_path: Path) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (4, 4)).save(sink, "EPS")  # which Pillow reads by Ghostscript
    with pytest.raises(InputError, match="no image"):
        read_image(sink.getvalue(), tmp_path)


# Paths and names.


@pytest.mark.parametrize("path", ["/etc", "../x", "a/../../x", "javascript:x", "a\0b", "\ud800"])
@pytest.mark.parametrize("key", ["bundle", "report"])
def test_an_outcome_leads_nowhere_else(key: str, path: str) -> None:
    whole = {"bundle": "a/b", "digest": "", "report": None, "seconds": 1.5, "figures": {"a": "b"}}
    _check_outcome(whole)
    with pytest.raises(ValueError, match=key):
        _check_outcome({**whole, key: path})


@pytest.mark.parametrize("name", ["../a", "/etc", "a/b", ".."])
def test_masks_of_a_name_that_leads_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"counts": {name: {}}}))
    with pytest.raises(InputError, match=r"names of folders|no ordinary"):
        read_kept(tmp_path)


@pytest.mark.parametrize("field", ["run", "path"])
def test_a_request_without_a_digest_is_refused(field: str) -> None:
    made = replace(Request("train", "run", "root"), **{field: "\ud800"})
    with pytest.raises(LetterError, match="malformed"):
        from_bytes(Request, to_bytes(made))
    with pytest.raises(LetterError, match="malformed"):
        from_bytes(Request, to_bytes(Request("train", "run", "root", round=1 << 63)))


@pytest.mark.parametrize("text", ["a[" + "9" * 5000 + "]", r'["\q"]'])
def test_a_path_that_python_cannot_read_is_named(text: str) -> None:
    with pytest.raises(InputError, match="path"):
        parse(text)


def test_a_factor_of_too_many_digits_is_refused() -> None:
    rule = {"action": "scale", "path": "a", "by": 10**400}
    with pytest.raises(InputError, match="by"):
        read_plan({"tamper": [rule]})


def test_a_store_whose_tables_are_views_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "s.sqlite") as held:
        endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) SELECT x"
        held.execute(
            f"CREATE VIEW recipes AS {endless} AS name, x AS digest, x AS description FROM n"
        )
        held.execute("CREATE TABLE runs (recipe TEXT)")
    held.close()
    with pytest.raises(InputError, match="no table recipes"):
        Store(tmp_path / "s.sqlite", read_only=True)


def test_a_table_of_more_values_than_are_held_is_refused() -> None:
    from hansa.search.recipes import RECIPES
    from hansa.search.table import Row
    from hansa.search.training import Curves

    recipe = RECIPES["digits16-w8"].model_copy(update={"epochs": 1 << 40})
    curves = Curves([1], [1], [1], [1.0], [1.0], [1.0], 1.0, False)
    with pytest.raises(InputError, match="fewer"):
        Table.of_rows(recipe, [Row(0, 0, curves)])


# The targets of `benchmarks/fuzz.py`, a few hundred inputs each.


@pytest.fixture(scope="module")
def targets() -> Iterator[Any]:
    """Return what the benchmark hands bytes to."""
    was, most = list(sys.path), parquet.LEAST_HELD
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import fuzz_targets

        yield fuzz_targets
    finally:
        sys.path[:], parquet.LEAST_HELD = was, most


NAMES = [
    *("message", "letter", "state", "bundle", "tensors", "config", "pipeline", "outcome"),
    *("search", "safeguard", "audit", "plan", "body", "cases", "party", "charter", "jsonl"),
    *("parquet", "image", "table", "store", "macro", "blox", "tokenizer"),
]


@pytest.mark.parametrize("name", NAMES)
def test_damaged_input_ends_in_an_error_with_a_name(
    name: str, targets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fuzz_mutations

    monkeypatch.chdir(tmp_path)
    target = targets.TARGETS[name]
    corpus = target.seeds(tmp_path)
    for data in corpus:
        refused(target, data, tmp_path)

    @settings(
        max_examples=200,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32 - 1))
    def tried(seed: int) -> None:
        rng = random.Random(seed)  # noqa: S311
        data = fuzz_mutations.damaged(rng, rng.choice(corpus), corpus)
        refused(target, target.fixed(data), tmp_path)

    tried()


def refused(target: Any, data: bytes, folder: Path) -> None:
    """Have an input read, which may end in one of the target's own errors and in no other."""
    with contextlib.suppress(target.named):
        target.run(data, folder)

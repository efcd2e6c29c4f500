"""Files of tables: read, merge, write.

On disk a table is a Parquet file, one row per model and seed, with its recipe in the file's
metadata, and, where models were profiled, a second one beside it (``NAME.latency.parquet``); or
the SQLite file of ``store.py`` while it is made.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hansa.errors import InputError, first_line
from hansa.files import write_atomic
from hansa.parquet import read_table
from hansa.search.foreign import read_macro
from hansa.search.foreign_blox import read_blox
from hansa.search.profile import KEY
from hansa.search.recipes import RECIPES, Recipe
from hansa.search.store import Store
from hansa.search.table import Row, Table
from hansa.search.training import Curves
from hansa.untrusted import json_of

SMALL = "gratings16-w8"
"""The table that comes with Hansa."""
_KEY = b"hansa"


def open_table(path: str | Path = SMALL, recipe: str | None = None) -> Table:
    """Read a table.

    Args:
        path: ``gratings16-w8``, the one that comes with Hansa; a Parquet or SQLite file of
            Hansa's; NAS-Bench-Macro's JSON; or a folder in the layout of Blox's csv files.
        recipe: which recipe of an SQLite file that holds several; of others, the name that they
            must have.

    Raises:
        InputError: no such file, one that is no table, or one of another recipe.
    """
    place = packaged(str(path)) if str(path) in RECIPES else Path(path)
    if place.is_dir():
        table = Table.of_columns(read_blox(place))
    elif place.suffix == ".json":
        table = Table.of_columns(read_macro(place))
    elif not place.is_file():
        raise InputError("table", f"no file {path}", f"{SMALL}, or a file that is there")
    elif place.suffix == ".parquet":
        table = _read(place)
    else:
        store = Store(place, read_only=True)
        own = _checked(store.recipe(recipe), place)
        table = _table(own, (Row(*each) for each in store.runs(own.name)), (), place)
    if recipe is not None and table.recipe != recipe:
        raise InputError("table", f"{path}, made by {table.recipe}", f"a table of {recipe}")
    return table


def packaged(name: str) -> Path:
    """Return the file of a table that comes with Hansa.

    Raises:
        InputError: none of this name does.
    """
    found = Path(str(resources.files("hansa.search"))) / "data" / f"{name}.parquet"
    if not found.is_file():
        raise InputError("table", f"{name}, which does not come with Hansa", f"{SMALL}, or a file")
    return found


def merge(tables: Sequence[Table]) -> Table:
    """Put tables of one recipe together, each run once.

    Raises:
        InputError: tables of different recipes, of others, or one run with two results.
    """
    recipe = tables[0].description
    if recipe is None or any(table.description != recipe for table in tables):
        found = ", ".join(table.recipe for table in tables)
        raise InputError("tables", found, "tables made by one recipe with equal values")
    rows: dict[tuple[int, int], Row] = {}
    profiles: dict[tuple[Any, ...], dict[str, Any]] = {}
    for table in tables:
        for row in table.rows:
            before = rows.setdefault((row.model, row.seed), row)
            if str(before.curves.results) != str(row.curves.results):  # nan equals nan
                found = f"two results of model {row.model} with seed {row.seed}"
                raise InputError("tables", found, "tables that agree where they overlap")
        for profile in table.profiles:
            key = tuple(profile[name] for name in KEY)
            if key not in profiles or profile["usable"] or not profiles[key]["usable"]:
                profiles[key] = profile
    return Table.of_rows(recipe, rows.values(), profiles.values())


def write(table: Table, path: str | Path) -> None:
    """Write a table as a Parquet file, and its profiles as a second one beside it.

    Raises:
        InputError: a table of others, or a path that does not end in ``.parquet``.
    """
    place = Path(path)
    if table.description is None:
        raise InputError("table", table.recipe, "a table made by Hansa")
    if place.suffix != ".parquet" or not place.parent.is_dir():
        raise InputError("--out", path, "a file NAME.parquet in a folder that is there")
    values = {"recipe": table.description.model_dump(), "digest": table.description.digest}
    columns: dict[str, Any] = {"model": [], "seed": []}
    for row in table.rows:
        for name, value in {"model": row.model, "seed": row.seed, **asdict(row.curves)}.items():
            columns.setdefault(name, []).append(value)
    schema = pa.schema(_FIELDS, metadata={_KEY: json.dumps(values)})
    _write_parquet(pa.table(columns, schema=schema), place)
    if table.profiles:
        profiles = pa.Table.from_pylist(list(table.profiles))
        digest = {_KEY: table.description.digest}
        _write_parquet(profiles.replace_schema_metadata(digest), _beside(place))
    else:
        _beside(place).unlink(missing_ok=True)  # of another table that lay here


_COUNTS, _LOSSES = pa.list_(pa.uint16()), pa.list_(pa.float64())
_FIELDS = [
    ("model", pa.int32()),
    ("seed", pa.int32()),
    ("train_correct", pa.list_(pa.uint32())),
    ("validation_correct", _COUNTS),
    ("test_correct", _COUNTS),
    ("train_loss", _LOSSES),
    ("validation_loss", _LOSSES),
    ("test_loss", _LOSSES),
    ("seconds", pa.float64()),
    ("stopped", pa.bool_()),
]


def _write_parquet(table: pa.Table, path: Path) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", compression_level=12)
    write_atomic(path, sink.getvalue().to_pybytes())


def _beside(path: Path) -> Path:
    return path.with_suffix(".latency.parquet")


def _read(path: Path) -> Table:
    try:
        found = read_table(path, "table")
        recipe = Recipe.model_validate(json_of(found.schema.metadata[_KEY])["recipe"])
        rows = [
            Row(each.pop("model"), each.pop("seed"), Curves(**each)) for each in found.to_pylist()
        ]
        profiles = []
        if _beside(path).is_file():
            beside = read_table(_beside(path), "table")
            if beside.schema.metadata[_KEY].decode() != recipe.digest:
                raise InputError(
                    "table", f"{_beside(path)}, of another recipe", "that of the table"
                )
            profiles = beside.to_pylist()
    except InputError:
        raise
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError("table", f"{path} ({first_line(error)})", "a table of Hansa's") from error
    return _table(_checked(recipe, path), rows, profiles, path)


def _table(
    recipe: Recipe, rows: Iterable[Row], profiles: Iterable[dict[str, Any]], path: Path
) -> Table:
    try:
        return Table.of_rows(recipe, rows, profiles)
    except InputError:
        raise
    # Whatever values of another kind, or too few or too many of them, lead to.
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise InputError("table", f"{path} ({first_line(error)})", "a table of Hansa's") from error


def _checked(recipe: Recipe, path: Path) -> Recipe:
    """Return a recipe, unless it is another of the name of one of Hansa's."""
    known = RECIPES.get(recipe.name)
    if known is not None and known != recipe:
        found = f"{path}, whose {recipe.name} has other values than Hansa's"
        raise InputError("table", found, "a table of the recipe as it is now")
    return recipe

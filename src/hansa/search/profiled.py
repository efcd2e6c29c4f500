"""Profile the models of a table, and keep their latencies beside it."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hansa.errors import InputError
from hansa.search.generate import choose
from hansa.search.profile import KEY, Latency, Meter, ProfileOptions, profile
from hansa.search.table import Table
from hansa.search.tables import merge, open_table, write


def profile_table(
    source: str | Path,
    out: str | Path,
    *,
    models: str = "",
    options: Mapping[str, Any] | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> list[Latency]:
    """Measure models of a table on this machine and write the table with their latencies.

    What ``out`` holds already under the same device, backend, batch, threads and dtype is kept,
    and each window of models is written when it is done.

    Args:
        source: a table's name or file.
        out: the Parquet file to write, or to go on with.
        models: numbers with commas between them; by default all of the table.
        options: fields of ``ProfileOptions``.
        watch: called with how many latencies are there, and of how many.

    Returns:
        The latencies asked for.

    Raises:
        InputError: input that cannot be used; latencies that do not repeat, unless forced.
    """
    try:
        wanted = ProfileOptions.model_validate(dict(options or {}))
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        key = ".".join(map(str, wrong["loc"]))
        raise InputError(f"--{key}", wrong["input"], wrong["msg"]) from error
    table = given = open_table(source)
    recipe = table.description
    if recipe is None:
        raise InputError("table", table.recipe, "a table of models that are here")
    if Path(out).is_file():
        table = merge([open_table(out, recipe.name), given])
    numbers = (choose(models) if models else given.models).tolist()
    for number in numbers:
        table.row(number)
    rows = {_key(row): row for row in table.profiles}

    def keep(found: list[Latency]) -> None:
        rows.update((latency.key, latency.row()) for latency in found)
        write(Table.of_rows(recipe, table.rows, rows.values()), out)

    keep([])  # a path that cannot be written is known before anything is measured
    return profile(
        [(number, partial(recipe.build, number, 0)) for number in numbers],
        recipe.shape,
        wanted,
        done=[Latency.of(row) for row in rows.values()],
        keep=keep,
        watch=watch,
        meter=Meter.open(),
    )


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)

"""Where text comes from: the Python installation, files, folders, Parquet files, a hub.

A source yields its documents one by one, so that a small part of a large one costs a small part.
"""

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from hansa.data.bundled_text import MOST, bundled
from hansa.data.sources import parquet_files
from hansa.errors import InputError, first_line
from hansa.parquet import opened, pieces

TEXT_SUFFIXES = {
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".html", ".htm"),
    *(".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".sh", ".sql"),
}
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Query:
    """What to read of a source.

    Attributes:
        key: the configuration key that names the source.
        most: most bytes of UTF-8, None for all.
        column: the text column of a table; by default ``text`` or the only one that holds strings.
        hub_split: the split of a hub data set.
    """

    key: str
    most: int | None = None
    column: str | None = None
    hub_split: str = "train"


def read(source: str, query: Query) -> str:
    """Return the text of a source, its documents joined by an empty line.

    Raises:
        InputError: unknown kind, missing file or column, something that is no UTF-8, no text.
    """
    kind, _, rest = source.partition(":")
    if kind not in _KINDS or not rest:
        raise InputError(
            query.key,
            repr(source),
            "'python:KIND', 'file:PATH', 'folder:PATH', 'parquet:PATH' or 'hub:NAME'",
        )
    held, size = [], 0
    for document in _KINDS[kind](rest, query):
        if not document.strip():
            continue
        held.append(document)
        size += len(document) + len(SEPARATOR)  # a character is a byte or more
        if query.most is not None and size >= query.most:
            break
    text = SEPARATOR.join(held)
    if query.most is not None and len(text) * 4 > query.most:
        # What ignoring errors drops is a character that the cut has left half.
        text = text.encode()[: query.most].decode(errors="ignore")
    if not text.strip():
        raise InputError(query.key, f"no text in {source!r}", "a source with text in it")
    return text


def _python(kind: str, query: Query) -> Iterator[str]:
    yield bundled(kind, query.key, MOST if query.most is None else query.most)


def _file(path: str, query: Query) -> Iterator[str]:
    if not Path(path).is_file():
        raise InputError(query.key, f"no file at {path}", "a text file in UTF-8")
    yield _text(Path(path), query)


def _folder(path: str, query: Query) -> Iterator[str]:
    root = Path(path)
    if not root.is_dir():
        raise InputError(query.key, f"no folder at {path}", "a folder of text files")
    # By their names and not as paths, which Windows orders in its own way.
    files = {file.relative_to(root).as_posix(): file for file in root.rglob("*")}
    for name in sorted(files):
        is_hidden = any(part.startswith(".") for part in name.split("/"))
        if files[name].suffix.lower() in TEXT_SUFFIXES and not is_hidden and files[name].is_file():
            yield _text(files[name], query)


def _text(file: Path, query: Query) -> str:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # without the mark that Windows puts
    try:
        with file.open("rb") as stream:
            held = stream.read() if query.most is None else stream.read(query.most)
            is_whole = not stream.read(1)
        return decoder.decode(held, final=is_whole)
    except OSError as error:
        raise InputError(query.key, f"{file} that cannot be read ({error})", "a file") from error
    except UnicodeDecodeError as error:
        raise InputError(
            query.key, f"byte {error.start} of {file} that is no UTF-8", "text files in UTF-8"
        ) from error


def _parquet(path: str, query: Query) -> Iterator[str]:
    for file in parquet_files(path, query.key):
        with opened(file, query.key) as held:
            column = _column(held.file.schema_arrow, str(file), query)
            for batch in pieces(held, [column]):
                yield from _strings(batch.column(column))


def _hub(name: str, query: Query) -> Iterator[str]:
    loaded = hub_table(name, query.hub_split, query.key)
    column = _column(loaded.features.arrow_schema, f"hub:{name}", query)
    for table in loaded.select_columns([column]).with_format("arrow").iter(1024):
        yield from _strings(table.column(column))


def hub_table(name: str, split: str, key: str) -> Any:
    """Return a split of a hub data set, as the library ``datasets`` has it.

    Raises:
        InputError: the library is missing, or there is no such data set within reach.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            key, "a hub data set without the library 'datasets'", "pip install hansa[hub]"
        ) from error
    try:
        # Of which state is for whoever names the data set to say; it is data and never code.
        return datasets.load_dataset(name, split=split)  # nosec B615 # data, never code
    except Exception as error:  # the library raises a dozen kinds, of three other libraries
        raise InputError(
            key,
            f"'hub:{name}' that could not be loaded ({first_line(error)})",
            "a data set that the hub has and this machine reaches, or parquet:PATH",
        ) from error


def _column(schema: pa.Schema, place: str, query: Query) -> str:
    """Return the wanted column; by default ``text``, or the only one that holds strings."""
    fitting = [str(field.name) for field in schema if _holds_text(field.type)]
    if query.column is not None:
        if query.column in fitting:
            return query.column
        found = f"no column {query.column!r} with strings in {place}"
    elif "text" in fitting or len(fitting) == 1:
        return "text" if "text" in fitting else fitting[0]
    else:
        found = f"{len(fitting)} columns with strings in {place}, none of them 'text'"
    names = ", ".join(fitting or schema.names)
    raise InputError("text.column", found, f"one of the columns {names}, with strings in it")


def _holds_text(held: pa.DataType) -> bool:
    if pa.types.is_dictionary(held):
        held = held.value_type
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(kind(held) for kind in kinds)


def _strings(column: Any) -> Iterator[str]:
    yield from (value for value in column.to_pylist() if value is not None)


_KINDS: dict[str, Callable[[str, Query], Iterator[str]]] = {
    "python": _python,
    "file": _file,
    "folder": _folder,
    "parquet": _parquet,
    "hub": _hub,
}

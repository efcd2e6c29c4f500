"""Parquet files from elsewhere, read within bounds.

A file of a few kilobytes may stand for billions of rows, or for one long text a million times. So
what it declares is looked at before anything is read, and it is read piece by piece, while what
was made of it is counted.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hansa.errors import InputError, first_line

MOST_ROWS = 1 << 30
"""Default limit on the rows of one file."""
LEAST_HELD = 1 << 30
"""Bytes of memory that what a file holds may take, however small the file is."""
RATIO = 256
"""How many times its own size a larger file may take."""
_PIECE = 1024  # rows


@dataclass(frozen=True)
class Opened:
    """A Parquet file that is open, and the bytes of memory that its size allows for."""

    file: pq.ParquetFile
    most: int


@contextmanager
def opened(path: Path, key: str, most_rows: int = MOST_ROWS) -> Iterator[Opened]:
    """Open a Parquet file; what goes wrong with it while it is open is put into words, too.

    Args:
        path: the file.
        key: what an error calls it.
        most_rows: rows that it may declare.

    Raises:
        InputError: no ordinary file, no Parquet, two columns of one name, or too many rows.
    """
    allowed = "a Parquet file"
    if not path.is_file():  # a pipe would be waited for
        raise InputError(key, f"{path}, which is no ordinary file", allowed)
    try:
        size = path.stat().st_size
        with pq.ParquetFile(path) as held:
            names = held.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1][:1]:
                raise InputError(key, f"{path} with two columns {twice[0]!r}", "names of their own")
            rows = held.metadata.num_rows
            if not 0 <= rows <= most_rows:
                raise InputError(key, f"{path}, which declares {rows} rows", f"up to {most_rows}")
            yield Opened(held, max(LEAST_HELD, RATIO * size))
    except InputError:
        raise
    # Damaged bytes set off whatever Arrow has: of a size, of a text, of a schema in base64.
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError, TypeError) as error:
        found = f"no Parquet: {path} cannot be read ({first_line(error)})"
        raise InputError(key, found, allowed) from error


def pieces(held: Opened, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a file, a thousand at a time, never more than it has declared.

    Raises:
        ValueError: it declares or holds more bytes than a file of its size may (``LEAST_HELD``,
            ``RATIO``), holds more rows than it declares, or texts that are no UTF-8.
    """
    about, most = held.file.metadata, held.most
    declared = sum(about.row_group(k).total_byte_size for k in range(about.num_row_groups))
    if not 0 <= declared <= most:
        raise ValueError(f"it declares {declared} bytes, of {most} that its size allows")
    rows = size = 0
    for batch in held.file.iter_batches(_PIECE, columns=columns):
        batch.validate(full=True)
        rows, size = rows + batch.num_rows, size + batch.nbytes
        if rows > about.num_rows:
            raise ValueError("more rows than it declares")
        if size > most:
            raise ValueError(f"it holds more than the {most} bytes that its size allows")
        yield batch


def read_table(path: Path, key: str, most_rows: int = MOST_ROWS) -> pa.Table:
    """Return a whole file as a table.

    Args:
        path: the file.
        key: what an error calls it.
        most_rows: rows that it may declare.

    Raises:
        InputError: as for ``opened``, or what ``pieces`` refuses.
    """
    with opened(path, key, most_rows) as held:
        return pa.Table.from_batches(list(pieces(held)), held.file.schema_arrow)

"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a restart after a kill, sees the old or the new content.

    The content reaches the disk before the name does: write beside it, sync, rename, sync folder.
    """
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (a no-op where folders cannot be opened)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

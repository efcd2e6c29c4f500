"""Files that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hansa.errors import InputError


def write_atomic(path: Path, content: bytes | str, is_secret: bool = False) -> None:
    """Write a file so that a reader, or a restart after a kill, sees the old or the new content.

    The content reaches the disk before the name does: write beside it, sync, rename, sync folder.

    Args:
        path: the file.
        content: what it is to hold.
        is_secret: whether nobody but its owner may read it, at any moment.
    """
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with beside.open("wb") as file:
            if is_secret:  # while there is nothing in it yet
                beside.chmod(0o600)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill, which takes its name when all of it is on the disk, or goes.

    Args:
        path: where it is to lie; an empty folder may lie there.

    Raises:
        InputError: something else lies there.
    """
    allowed = "a new folder: nothing is overwritten"
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(str(path), "something that is no folder", allowed)
    if path.is_dir() and (held := sorted(entry.name for entry in path.iterdir())):
        raise InputError(str(path), f"a folder with {held[0]} in it", allowed)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)  # what a kill may have left
    beside.mkdir()
    try:
        yield beside
        for folder, _, names in os.walk(beside):
            for name in names:
                with (Path(folder) / name).open("rb") as file:
                    os.fsync(file.fileno())
            sync_folder(Path(folder))
        beside.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


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


def cache_folder(name: str) -> Path:
    """Return a folder of this user for what can be made again: below ``HANSA_CACHE`` or ~/.cache.

    Others have no business there: what it holds is executed.
    """
    parent = os.environ.get("HANSA_CACHE") or os.environ.get("XDG_CACHE_HOME", "")
    root = Path(parent) if parent else Path.home() / ".cache"
    folder = root / "hansa" / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder

"""Files that are there whole or not at all."""

import os
from pathlib import Path


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

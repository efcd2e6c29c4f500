"""What comes from elsewhere is read within bounds: files, JSON, TOML.

A path that is given may lead to a pipe that never ends, a device that has no end, or a file larger
than memory. A text may be nested deeper than Python's own reader or whatever walks over it can
follow. All of that ends here in an ``OSError`` or a ``ValueError``, which callers put into words.
"""

import errno
import json
import os
import re
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 36
"""Default limit on a file: more is no model, table or text that fits into memory."""
MOST_TEXT = 1 << 26
"""Limit on files that people write or that describe others: configurations, cards, manifests."""
MOST_DEPTH = 100
"""Default limit on tables within tables; what walks over them calls itself for each."""
_MOST_PARTS = 64
# Of a dotted key, which Python's reader takes time for that grows with their square: 40 kB, 10 s.
# A part begins where none could have begun before, so that the search itself is linear.
_PART = r"""(?:[A-Za-z0-9_-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+"""
_LONG_KEY = re.compile(rf"(?<![A-Za-z0-9_\\-])(?:{_PART}\.[ \t]*+){{{_MOST_PARTS}}}")


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return the content of a file, which must be an ordinary one; it is never waited for.

    Args:
        path: the file; a link is followed.
        most: bytes that it may hold, looked at before any is read.

    Raises:
        OSError: it cannot be read, is a pipe, device or folder, or holds more.
    """
    # Without O_NONBLOCK opening a pipe waits for whoever writes into it.
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:  # a null character, or half of one
        raise OSError(errno.EINVAL, "no name that a file could have", repr(path)) from error
    with os.fdopen(handle, "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "no ordinary file", str(path))
        if about.st_size > most:
            raise OSError(errno.EFBIG, f"{about.st_size} bytes, more than {most}", str(path))
        # What is written to it meanwhile is left out: so much is allocated, whatever there is.
        return file.read(about.st_size)


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """Return the text of a file in UTF-8, its ends of lines as line feeds; see ``read_bytes``.

    Raises:
        OSError: as there.
        ValueError: it is no UTF-8.
    """
    text = read_bytes(path, most).decode("utf-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_of(text: str | bytes, depth: int = MOST_DEPTH) -> Any:
    """Return the value that JSON stands for.

    Raises:
        ValueError: it is none, or nested deeper.
    """
    return _parsed(json.loads, text, depth)


def toml_of(text: str, depth: int = MOST_DEPTH) -> dict[str, Any]:
    """Return the table that TOML stands for.

    Raises:
        ValueError: it is none, nested deeper, or has a key of too many parts.
    """
    if _LONG_KEY.search(text):
        raise ValueError(f"a key of more than {_MOST_PARTS} parts")
    values: dict[str, Any] = _parsed(tomllib.loads, text, depth)
    return values


_DEEP = "nested deeper than {} levels"


def _parsed(parse: Callable[[Any], Any], text: str | bytes, depth: int) -> Any:
    """Return what a text stands for, unless it is nested deeper than asked for."""
    try:
        value = parse(text)
    except RecursionError as error:
        raise ValueError(_DEEP.format(depth)) from error
    _check_depth(value, depth)
    return value


def _check_depth(value: Any, most: int) -> None:
    """Refuse tables and lists that are nested too deep, level by level and without recursion."""
    level = [value]
    for _ in range(most):
        level = [
            below
            for held in level
            if isinstance(held, dict | list)
            for below in (held.values() if isinstance(held, dict) else held)
            if isinstance(below, dict | list)
        ]
        if not level:
            return
    raise ValueError(_DEEP.format(most))

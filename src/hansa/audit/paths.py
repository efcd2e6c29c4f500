"""Places in a JSON document, written ``current.temp_c`` or ``query.pages[0].extract``.

A key that holds a dot or a bracket is written in quotes: ``["a.b"].c``.
"""

import difflib
import json
import re
from collections.abc import Iterator
from typing import Any

from hansa.errors import InputError

Path = tuple[str | int, ...]
Pattern = tuple[str, ...]
"""A path with stars for entries of lists: ``articles[*].title`` is ("articles", "*", "title")."""
_STEP = re.compile(r'\[(\d{1,9})\]|\["((?:[^"\\]|\\.)*)"\]|(?:^|\.)([^.\[\]"]+)')


def parse(text: str) -> Path:
    """Return the path that a text writes.

    Raises:
        InputError: text that writes none.
    """
    steps: list[str | int] = []
    at = 0
    while isinstance(text, str) and at < len(text):
        match = _STEP.match(text, at)
        if match is None:
            break
        number, quoted, name = match.groups()
        if number is not None:
            steps.append(int(number))
        else:
            try:
                steps.append(name if name is not None else json.loads(f'"{quoted}"'))
            except ValueError:  # an escape that JSON has not
                break
        at = match.end()
    if not steps or at < len(text):
        raise InputError("path", repr(text), "a path such as current.temp_c or articles[0].title")
    return tuple(steps)


def written(path: Path) -> str:
    """Return a path as text, which ``parse`` reads."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif re.fullmatch(r'[^.\[\]"]+', step):
            text += f".{step}" if text else step
        else:
            text += f"[{json.dumps(step)}]"
    return text


def look(document: Any, path: Path) -> Any:
    """Return what stands at a path.

    Raises:
        InputError: nothing does; it names the nearest paths that there are.
    """
    value = document
    for step in path:
        try:
            if isinstance(value, list) != isinstance(step, int):
                raise KeyError(step)
            value = value[step]
        except (KeyError, IndexError, TypeError):
            known = [written(each) for each, _ in leaves(document)]
            near = difflib.get_close_matches(written(path), known, 3, 0.4) or known[:3]
            allowed = f"a path of the response ({', '.join(near)})" if near else "a path in it"
            raise InputError("path", f"unknown path {written(path)!r}", allowed) from None
    return value


def exists(document: Any, path: Path) -> bool:
    """Tell whether anything stands at a path."""
    value = document
    for step in path:
        in_list = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if not in_list and not (isinstance(value, dict) and step in value):
            return False
        value = value[step]
    return True


def leaves(document: Any, before: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every path that ends in no table and no list, or in an empty one, with its value."""
    if isinstance(document, dict) and document:
        for key, value in document.items():
            yield from leaves(value, (*before, key))
    elif isinstance(document, list) and document:
        for number, value in enumerate(document):
            yield from leaves(value, (*before, number))
    else:
        yield before, document


def differing(first: Any, second: Any) -> set[Path]:
    """Return the paths at which two documents differ, the deepest that hold a difference each."""
    return _differing(first, second, ())


def _differing(first: Any, second: Any, before: Path) -> set[Path]:
    if isinstance(first, dict) and isinstance(second, dict):
        found: set[Path] = set()
        for key in [*first, *(key for key in second if key not in first)]:
            if key in first and key in second:
                found |= _differing(first[key], second[key], (*before, key))
            else:
                found.add((*before, key))
        return found
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return {p for k, (a, b) in pairs for p in _differing(a, b, (*before, k))}
    same = type(first) is type(second) and first == second
    return set() if same else {before}


def pattern(path: Path) -> Pattern:
    """Return a path with a star for every entry of a list."""
    return tuple("*" if isinstance(step, int) else step for step in path)


def pattern_of(text: str) -> Pattern:
    """Return the pattern that a text writes: ``articles[*].title``, or any path.

    Raises:
        InputError: text that writes none.
    """
    return pattern(parse(text.replace("[*]", "[0]")))

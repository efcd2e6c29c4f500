"""Edits of a JSON document: small, logged, reversible, and confined to the paths they name.

An edit puts a value where another or none stood, or exchanges a piece of a text. Its log entry
holds both sides, so that a document is given back bit by bit: ``restored(tampered(d, e), e) == d``,
down to the order of keys.
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hansa.audit.paths import Path, look, parse, written
from hansa.errors import InputError

Operator = Literal["insertion", "deletion", "substitution"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)


class _Missing:
    """Stands for nothing, which is not the same as null."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING = _Missing()


@dataclass(frozen=True)
class Edit:
    """One change of a document.

    Attributes:
        operator: what it is for.
        path: the only place it touches.
        before: what stood there, MISSING for nothing; of a text edit the piece of text.
        after: what stands there now.
        start: of a text edit, the character at which the piece begins.
        position: of an edit that adds or removes, the place among its siblings.
    """

    operator: Operator
    path: Path
    before: Any
    after: Any
    start: int | None = None
    position: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the log's entry, from which ``from_json`` makes the edit again."""
        entry: dict[str, Any] = {"operator": self.operator, "path": written(self.path)}
        for side in ("before", "after"):
            if (value := getattr(self, side)) is not MISSING:
                entry[side] = value
        for key in ("start", "position"):
            if (number := getattr(self, key)) is not None:
                entry[key] = number
        return entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Edit":
        """Return the edit of a log's entry.

        Raises:
            InputError: an entry that is none.
        """
        try:
            return cls(
                entry["operator"],
                parse(entry["path"]),
                entry.get("before", MISSING),
                entry.get("after", MISSING),
                entry.get("start"),
                entry.get("position"),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError("edit", repr(entry), "an entry of an audit's log") from error

    @property
    def reverse(self) -> "Edit":
        """The edit that undoes this one."""
        return Edit(self.operator, self.path, self.after, self.before, self.start, self.position)


def tampered(document: Any, edits: Iterable[Edit]) -> Any:
    """Return a copy of a document with edits made, one after another.

    Raises:
        InputError: an edit does not find what it says stood there.
    """
    made = copy.deepcopy(document)
    for edit in edits:
        made = _apply(made, edit)
    return made


def restored(document: Any, edits: Sequence[Edit]) -> Any:
    """Return a copy of a tampered document with its edits undone.

    Raises:
        InputError: the document is not what the edits made.
    """
    return tampered(document, [edit.reverse for edit in reversed(edits)])


def encoded(document: Any) -> bytes:
    """Return a document as it is sent: compact JSON in UTF-8, keys in their order."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def decoded(body: bytes, key: str = "response") -> Any:
    """Return the document of a body.

    Raises:
        InputError: a body that is not JSON, named by ``key``.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(key, f"no JSON ({error})", "a JSON document in UTF-8") from error


def digest(body: bytes) -> str:
    """Return the SHA-256 of a body, as hexadecimal."""
    return hashlib.sha256(body).hexdigest()


def put(document: Any, path: Path, value: Any) -> Edit:
    """Return the edit that replaces what stands at a path."""
    return Edit("substitution", path, copy.deepcopy(look(document, path)), value)


def delete(document: Any, path: Path) -> Edit:
    """Return the edit that removes a key or an entry of a list."""
    parent = look(document, path[:-1])
    before = copy.deepcopy(look(document, path))
    step = path[-1]
    position = step if isinstance(step, int) else list(parent).index(step)
    return Edit("deletion", path, before, MISSING, position=position)


def add(document: Any, path: Path, value: Any, position: int | None = None) -> Edit:
    """Return the edit that adds a key, or an entry of a list, last unless a position is given.

    Raises:
        InputError: something stands there, or there is no table or list to add it to.
    """
    parent, step = look(document, path[:-1]), path[-1]
    if isinstance(parent, dict) and isinstance(step, str) and step not in parent:
        return Edit("insertion", path, MISSING, value, position=_place(parent, position))
    if isinstance(parent, list) and isinstance(step, int) and step <= len(parent):
        return Edit("insertion", path, MISSING, value, position=step)
    raise InputError("path", f"{written(path)!r}, where nothing can be added", "a new key")


def splice(
    document: Any, path: Path, start: int, old: str, new: str, operator: Operator = "substitution"
) -> Edit:
    """Return the edit that exchanges a piece of the text at a path.

    Raises:
        InputError: no text, or another piece, stands there.
    """
    edit = Edit(operator, path, old, new, start=start)
    _check(look(document, path), edit)
    return edit


def _place(parent: Mapping[str, Any], position: int | None) -> int:
    return len(parent) if position is None else min(position, len(parent))


def _apply(document: Any, edit: Edit) -> Any:
    if not edit.path:
        _check(document, edit)
        return copy.deepcopy(edit.after)
    parent, step = look(document, edit.path[:-1]), edit.path[-1]
    if edit.before is MISSING:
        value = copy.deepcopy(edit.after)
        if isinstance(parent, list) and isinstance(step, int):
            parent.insert(step, value)
            return document
        if not isinstance(parent, dict) or step in parent:
            raise InputError("edit", f"something at {written(edit.path)}", "a path that is free")
        items = list(parent.items())
        items.insert(_place(parent, edit.position), (str(step), value))
        parent.clear()
        parent.update(items)
        return document
    held = look(document, edit.path)
    _check(held, edit)
    if edit.after is MISSING:
        del parent[step]
    elif edit.start is not None:
        parent[step] = held[: edit.start] + edit.after + held[edit.start + len(edit.before) :]
    else:
        parent[step] = copy.deepcopy(edit.after)
    return document


def _check(held: Any, edit: Edit) -> None:
    if edit.start is not None:
        end = edit.start + len(edit.before)
        if isinstance(held, str) and held[edit.start : end] == edit.before:
            return
    elif type(held) is type(edit.before) and held == edit.before:
        return
    found = f"another value at {written(edit.path)}"
    raise InputError("edit", found, f"{edit.before!r}, which the edit says stood there")

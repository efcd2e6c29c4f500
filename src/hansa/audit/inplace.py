"""Edits in the text of a JSON document: what no edit names stays as it was sent, byte by byte.

A document that is decoded and encoded again differs in white space, in escapes and in the digits of
numbers, so that what an application does with it could be due to that, and not to the edit.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hansa.audit.paths import Path
from hansa.audit.tamper import MISSING, Edit, decoded, encoded, tampered
from hansa.errors import InputError

_SPACE = " \t\n\r"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class _Member:
    """One entry of a table or list in a text.

    Attributes:
        step: its key, or its number.
        start: where it begins, with its key.
        value: where its value begins.
        end: where its value ends.
    """

    step: str | int
    start: int
    value: int
    end: int


def edited(body: bytes, edits: Sequence[Edit]) -> bytes:
    """Return a body with edits made in its text, in its own encoding.

    Where a table has one key twice, its edits cannot be made so, and the document is encoded anew.

    Args:
        body: a document as it was sent.
        edits: what to do, one after another.

    Raises:
        InputError: a body that is not JSON, or an edit that does not find what it says stood there.
    """
    wanted = tampered(decoded(body), edits)
    encoding = json.detect_encoding(body)
    text = body.decode(encoding, "surrogatepass")
    for edit in edits:
        text = _edited(text, edit)
    if _canonical(json.loads(text)) != _canonical(wanted):
        return encoded(wanted)
    try:
        return text.encode("utf-8-sig" if body.startswith(b"\xef\xbb\xbf") else encoding)
    except UnicodeEncodeError as error:
        raise InputError("response", "half a character", "a document in UTF-8") from error


def _canonical(document: Any) -> str:
    return json.dumps(document)


def _edited(text: str, edit: Edit) -> str:
    if not edit.path:
        return _written(text, edit.after)
    if edit.before is MISSING:
        return _inserted(text, edit)
    members, number = _find(text, edit.path)
    member = members[number]
    if edit.after is MISSING:
        if number + 1 < len(members):
            return text[: member.start] + text[members[number + 1].start :]
        start = members[number - 1].end if number else member.start
        return text[:start] + text[member.end :]
    new = edit.after
    if edit.start is not None:
        held = json.loads(text[member.value : member.end])
        new = held[: edit.start] + edit.after + held[edit.start + len(edit.before) :]
    return text[: member.value] + _written(text, new) + text[member.end :]


def _inserted(text: str, edit: Edit) -> str:
    parent = _value_at(text, edit.path[:-1])
    members, step = _members(text, parent), edit.path[-1]
    new = _written(text, edit.after)
    if isinstance(step, str):
        first = members[0] if members else None
        is_wide = first is not None and text[first.value - 1] in _SPACE
        new = f"{_written(text, step)}:{' ' * is_wide}{new}"
    if not members:
        return text[: parent + 1] + new + text[parent + 1 :]
    place = len(members) if edit.position is None else min(edit.position, len(members))
    if place < len(members):
        at = members[place].start
        return text[:at] + new + "," + _space_before(text, at) + text[at:]
    last = members[-1]
    return text[: last.end] + "," + _space_before(text, last.start) + new + text[last.end :]


def _space_before(text: str, at: int) -> str:
    start = at
    while text[start - 1] in _SPACE:
        start -= 1
    return text[start:at]


def _written(text: str, value: Any) -> str:
    """Return a value as JSON, in ASCII where the rest of the document is."""
    return json.dumps(value, ensure_ascii=text.isascii(), separators=(",", ":"))


def _value_at(text: str, path: Path) -> int:
    if not path:
        return _skip(text, 0)
    members, number = _find(text, path)
    return members[number].value


def _find(text: str, path: Path) -> tuple[list[_Member], int]:
    """Return the members of a path's parent, and which of them it names; of two, the last."""
    at, members, number = _skip(text, 0), list[_Member](), 0
    for step in path:
        members = _members(text, at)
        number = max(k for k, member in enumerate(members) if member.step == step)
        at = members[number].value
    return members, number


def _members(text: str, at: int) -> list[_Member]:
    """Return the entries of the table or list that begins at a place."""
    is_table, found = text[at] == "{", list[_Member]()
    at = _skip(text, at + 1)
    while text[at] not in "}]":
        start, step = at, len(found)
        key: str | int = step
        if is_table:
            key, at = _DECODER.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)
        value = at
        end = _DECODER.raw_decode(text, at)[1]
        found.append(_Member(key, start, value, end))
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at

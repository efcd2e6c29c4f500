"""How inputs of ``fuzz.py`` are damaged: at random, and where a format tells sizes."""

import random
import re
import struct
from collections.abc import Callable, Sequence

NUMBERS = (
    *("0", "-1", "-0.0", "1e999", "-1e999", "NaN", "Infinity", "nan", "inf", "1e-400", "0.1"),
    *("255", "65536", "2147483647", "2147483648", "4294967296", "9223372036854775807"),
    *("9223372036854775808", "18446744073709551616", "1" * 400, "9" * 5000, "0x" + "f" * 300),
    *("true", "null", '"1"', "[]", "{}", "1979-05-27", "1979-05-27T07:32:00Z", "1_000_000_000_000"),
)
TEXTS = (
    *("../../../../etc/passwd", "/etc/passwd", "/dev/zero", "/dev/stdin", "..", ".", "/", "~"),
    *("a/../../b", "\\\\host\\share", "file:///etc/passwd", "python:os", "os:system"),
    *("builtins:eval", "subprocess:Popen", "\\u0000", "\\ud800", "\\uDFFF\\uD800", "\u202e", ""),
    *("{{7*7}}", "%s%n", "a" * 5000, "nan", "-1", "\U0010ffff", "__class__", "e\u0301"),
    *("parquet:/dev/zero", "jsonl:/dev/stdin", "folder:/proc", "hub:", "made:", "sentences:/etc"),
)
SIZES = (0, 1, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1)
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_TEXT = re.compile(rb'"(?:[^"\\\n]|\\.)*"')
_VALUE = re.compile(rb"[\[{]")
_MOST = 1 << 20
Change = Callable[[random.Random, bytearray, Sequence[bytes]], None]


def damaged(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """Return an input with one change or a few.

    Args:
        rng: what is drawn from.
        data: the input.
        corpus: others of its kind, pieces of which may be put in.
    """
    made = bytearray(data)
    if rng.random() < 0.25 and (whole := _tensors(rng, data)):
        made = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        rng.choice(_CHANGES)(rng, made, corpus)
    return bytes(made[:_MOST])


def _place(rng: random.Random, data: bytearray) -> int:
    return rng.randrange(len(data) + 1)


def _flip(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    for _ in range(rng.choice((1, 2, 8))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 10, 34, 44, 91, 92, 123, 127, 128, 255))


def _cut(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    if rng.random() < 0.5:
        del data[_place(rng, data) :]
    else:
        start = _place(rng, data)
        del data[start : start + rng.choice((1, 2, 8, 64))]


def _put(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    start = _place(rng, data)
    data[start:start] = rng.choice((rng.randbytes(rng.choice((1, 4, 16))), b"\0", b"\r\n", b"\xed"))


def _splice(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    other = rng.choice(corpus)
    start = rng.randrange(len(other) + 1)
    piece, at = other[start : start + rng.choice((4, 32, 256, 4096))], _place(rng, data)
    data[at : at + rng.choice((0, len(piece)))] = piece


def _size(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    """Put a size where a binary format may have one."""
    size, width = rng.choice(SIZES), rng.choice((2, 4, 8))
    at = rng.choice((0, 8, 16, 24, _place(rng, data), max(len(data) - 8, 0)))
    data[at : at + width] = (size & ((1 << 8 * width) - 1)).to_bytes(width, "little")


def _replaced(rng: random.Random, data: bytearray, what: re.Pattern[bytes], new: bytes) -> None:
    found = list(what.finditer(data[:65536]))
    if found:
        chosen = rng.choice(found)
        data[chosen.start() : chosen.end()] = new


def _number(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    _replaced(rng, data, _NUMBER, rng.choice(NUMBERS).encode())


def _text(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    _replaced(rng, data, _TEXT, f'"{rng.choice(TEXTS)}"'.encode())


def _other(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    """Put a number where a text stood, or a text, a table or a list where a number stood."""
    what = rng.choice((_NUMBER, _TEXT))
    values = (*NUMBERS, *(f'"{text}"' for text in TEXTS), "[[]]", "[1, 2]", '{"a": 1}', "{a = 1}")
    _replaced(rng, data, what, rng.choice(values).encode())


def _twice(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    """Have a piece of text, such as a key, once more."""
    lines = bytes(data[:65536]).split(rng.choice((b"\n", b",")))
    piece, at = rng.choice(lines), _place(rng, data)
    place = data.find(piece)
    data[place if place >= 0 else at : 0] = b""
    data[max(place, 0) : max(place, 0)] = piece + rng.choice((b"\n", b","))


def _nest(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    depth = rng.choice((10, 90, 110, 500, 900, 1100, 20_000))
    begin, end = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"{a=", b"}")))
    new = begin * depth + rng.choice((b"1", b"")) + end * depth
    if rng.random() < 0.5:
        _replaced(rng, data, rng.choice((_NUMBER, _TEXT, _VALUE)), new)
    else:
        key = rng.choice((b"a.", b'"a".')) * depth
        data[0:0] = rng.choice((key + b"a = 1\n", b"x = " + new + b"\n", b"[" + key + b"a]\n"))


def _tensors(rng: random.Random, data: bytes) -> bytes:
    """Return a safetensors file, at the front or within, whose header tells something else."""
    starts = [k for k in (0, 1, 24) if data[k + 8 : k + 9] == b"{"]
    if not starts or len(data) < starts[0] + 8:
        return b""
    start = starts[0]
    (length,) = struct.unpack_from("<Q", data, start)
    if length > len(data):
        return b""
    header = bytearray(data[start + 8 : start + 8 + length])
    for _ in range(rng.choice((1, 2))):
        rng.choice((_number, _text, _other, _twice, _nest))(rng, header, [bytes(header)])
    kinds = (b"F64", b"F32", b"F16", b"BF16", b"I64", b"U8", b"BOOL", b"F8_E4M3", b"F4", b"C64")
    if rng.random() < 0.3:
        _replaced(rng, header, re.compile(rb"\b(?:[FIU]\d+|BOOL|BF16)\b"), rng.choice(kinds))
    size = struct.pack("<Q", len(header) + rng.choice((0, 0, 0, 0, 1, 1 << 40)))
    return data[:start] + size + bytes(header) + data[start + 8 + length :]


_CHANGES: tuple[Change, ...] = (
    *(_flip, _set, _cut, _put, _splice, _size),
    *(_number, _number, _text, _text, _other, _other, _twice, _nest),
)

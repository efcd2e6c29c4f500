"""Encodings of bodies on the way (``Content-Encoding``): undone before an edit, and done again."""

import gzip
import importlib
import importlib.util
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

_PIECE = 4096  # bytes handed to a decoder that knows no limit of its own
_LONGER = 4096  # bytes by which an encoded body may be longer than what it stands for


class TooLarge(ValueError):  # noqa: N818
    """A body that holds more than may be held."""


@cache
def known() -> tuple[str, ...]:
    """Return the encodings that can be undone: ``br`` where the library Brotli is installed."""
    brotli = importlib.util.find_spec("brotli") is not None
    return ("gzip", "x-gzip", "deflate", *(("br",) if brotli else ()), "identity")


def encodings(header: str) -> list[str]:
    """Return what a ``Content-Encoding`` names, in the order in which it was done."""
    return [name for part in header.split(",") if (name := part.strip().lower())]


def acceptable(header: str) -> str:
    """Return an ``Accept-Encoding`` with what can be undone, ``identity`` where nothing is left."""
    kept = []
    for part in header.split(","):
        if part.partition(";")[0].strip().lower() in known():
            kept.append(part.strip())
    return ", ".join(kept) or "identity"


def decode(body: bytes, names: Sequence[str], largest: int) -> bytes:
    """Return a body without its encodings.

    Args:
        body: as it was sent.
        names: the encodings, all of them known.
        largest: bytes that it may hold, so that a small body which stands for a huge one does no
            harm.

    Raises:
        TooLarge: it holds more.
        ValueError: it is not encoded so.
    """
    for name in reversed(names):
        if name != "identity":
            body = _joined(_decoders(body, name), largest + _LONGER)
    if len(body) > largest:
        raise TooLarge(f"more than {largest} bytes")
    return body


def encode(body: bytes, names: Sequence[str], like: bytes) -> bytes:
    """Return a body with encodings, in the forms of another one that was sent so."""
    for name in names:
        if name in ("gzip", "x-gzip"):
            body = gzip.compress(body, 6, mtime=0)
        elif name == "deflate":
            body = _deflated(body, raw=len(names) == 1 and not _has_zlib_header(like))
        elif name == "br":
            body = _brotli().compress(body, quality=5)
    return body


def _joined(pieces: Iterator[bytes], largest: int) -> bytes:
    whole = bytearray()
    try:
        for piece in pieces:
            whole += piece
            if len(whole) > largest:
                raise TooLarge(f"more than {largest} bytes")
    except zlib.error as error:
        raise ValueError(str(error)) from error
    return bytes(whole)


def _decoders(body: bytes, name: str) -> Iterator[bytes]:
    if name == "br":
        return _unbrotli(body)
    if name == "deflate":
        return _inflated(body, zlib.MAX_WBITS if _has_zlib_header(body) else -zlib.MAX_WBITS)
    return _inflated(body, zlib.MAX_WBITS | 16)


def _inflated(body: bytes, bits: int) -> Iterator[bytes]:
    """Yield what zlib makes of a body; a gzip file may have several members."""
    while body:
        inflater = zlib.decompressobj(bits)
        rest = body
        while rest and not inflater.eof:
            yield inflater.decompress(rest, 1 << 16)
            rest = inflater.unconsumed_tail
        yield inflater.flush()
        if not inflater.eof:
            raise ValueError("it ends too early")
        body = inflater.unused_data if bits > zlib.MAX_WBITS else b""


def _deflated(body: bytes, raw: bool) -> bytes:
    deflater = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS if raw else zlib.MAX_WBITS)
    return deflater.compress(body) + deflater.flush()


def _has_zlib_header(body: bytes) -> bool:
    """Tell whether a body has zlib's header, which ``deflate`` should have and often lacks."""
    return len(body) > 1 and body[0] & 15 == 8 and (body[0] * 256 + body[1]) % 31 == 0


def _unbrotli(body: bytes) -> Iterator[bytes]:
    brotli = _brotli()
    decoder = brotli.Decompressor()
    try:
        for start in range(0, len(body), _PIECE):
            yield decoder.process(body[start : start + _PIECE])
    except brotli.error as error:
        raise ValueError(str(error)) from error
    if not decoder.is_finished():
        raise ValueError("it ends too early")


def _brotli() -> Any:
    return importlib.import_module("brotli")

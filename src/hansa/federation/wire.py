"""The one encoding of a message to bytes.

Layout: a 24-byte prefix (magic, version, CRC-32 and length of the rest), then a safetensors
file. Every tensor takes whichever form is smallest, losslessly:

=================  ==========================================  ==========================
form               bytes for n entries, k of them not zero     for
=================  ==========================================  ==========================
dense              n * itemsize                                anything
bits               n / 8                                       bool
indices            k * width                                   bool, few true
bitmap             n / 8 + k * itemsize                        many zeros
gaps               k * (width + itemsize)                      very many zeros
=================  ==========================================  ==========================

Positions are stored as gaps between neighbours, in the narrowest of 1, 2, 4 or 8 bytes that
holds the largest gap. A zero is an entry whose bits are all zero, so -0.0 and NaN survive.
"""

import json
import math
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hansa.federation.message import Message, MessageError
from hansa.tensor_files import tensors_of

MAGIC = b"HANSAMSG"
VERSION = 1
PREFIX = struct.Struct("<8sIIQ")
MAX_BYTES = 1 << 34
"""Default limit on what a message may unfold to, checked before anything is allocated."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
_GROUP = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class _Part:
    """One tensor as it will stand in the file: its entry in the header, and its bytes on demand."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    form: list[Any] | None
    data: Callable[[], bytes]


def encode(message: Message) -> bytes:
    """Return the message as bytes. Equal messages give equal bytes.

    Raises:
        MessageError: a dtype outside the encoding, a scalar or metric of another kind, a group
            name with odd characters, or a tensor name without a UTF-8 form.
    """
    parts = _parts(message)
    body = b"".join([_header(message, parts), *(part.data() for part in parts)])
    return PREFIX.pack(MAGIC, VERSION, zlib.crc32(body), len(body)) + body


def encoded_size(message: Message) -> int:
    """Return ``len(encode(message))`` without building the bytes; 0 for an empty message."""
    if not message:
        return 0
    parts = _parts(message)
    return PREFIX.size + len(_header(message, parts)) + sum(part.size for part in parts)


def csr_size(message: Message) -> int:
    """Return the bytes of a message's values as papers on sparse training count them.

    Compressed sparse rows of flattened tensors: a float32 value and an int32 index for each entry
    that is not zero, or all entries as float32 where that is less. Buffers, truth values and
    whatever stands around them are left out (Qiu et al., ICLR 2022, Table 1, count so).
    """
    tensors = [
        tensor
        for group, named in message.groups.items()
        if group != "buffers"
        for tensor in named.values()
        if tensor.is_floating_point()
    ]
    filled = sum(int(tensor.count_nonzero()) for tensor in tensors)
    return min(8 * filled, 4 * sum(tensor.numel() for tensor in tensors))


def decode(data: bytes, max_bytes: int = MAX_BYTES) -> Message:
    """Return the message that the bytes hold.

    Raises:
        MessageError: wrong magic or version, truncated or longer than declared, damaged, a dtype
            or shape that does not fit its bytes, a name that stands twice, sizes that do not add
            up, or content that would unfold to more than ``max_bytes``.
    """
    if len(data) < PREFIX.size:
        raise MessageError(f"{len(data)} bytes are shorter than a message's prefix")
    magic, version, checksum, length = PREFIX.unpack_from(data)
    body = data[PREFIX.size :]
    if magic != MAGIC:
        raise MessageError("wrong magic: these bytes are no message")
    if version != VERSION:
        raise MessageError(f"version {version} of the encoding is not {VERSION}")
    if length != len(body):
        raise MessageError(f"{len(body)} bytes follow the prefix, which declares {length}")
    if zlib.crc32(body) != checksum:
        raise MessageError("damaged: the checksum does not match")
    about = _about(body)
    _check_declared(about, len(body), max_bytes)
    try:
        stored = tensors_of(body)
    except ValueError as error:
        raise MessageError(str(error)) from error
    forms = about["forms"]
    if not forms.keys() <= stored.keys():
        raise MessageError("a packed tensor is declared and not there")
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key in sorted(stored):
        group, slash, name = key.partition("/")
        if not (slash and _GROUP.fullmatch(group)):
            raise MessageError(f"tensor name {key!r} has no group")
        tensor = _unpack(key, stored[key], forms[key]) if key in forms else stored[key]
        if tensor.dtype not in _DTYPES:
            raise MessageError(f"{key}: dtype {tensor.dtype} is not part of the encoding")
        if tensor.dtype is torch.bool and tensor.view(torch.uint8).gt(1).any():
            raise MessageError(f"{key}: a truth value is neither 0 nor 1")
        # A clone is aligned as PyTorch aligns its own tensors; vector kernels may depend on that.
        groups.setdefault(group, {})[name] = tensor.clone()
    metrics = {name: (total, count) for name, (total, count) in about["metrics"].items()}
    return Message(groups, about["scalars"], metrics)


def _parts(message: Message) -> list[_Part]:
    parts = []
    for group, tensors in message.groups.items():
        if not _GROUP.fullmatch(group):
            raise MessageError(f"group name {group!r} has odd characters")
        parts += [_part(f"{group}/{name}", tensor) for name, tensor in tensors.items()]
    # Wide types first keeps every tensor aligned to its item size, as readers expect.
    width = {part.key: 1 if part.form else _BY_NAME[part.dtype].itemsize for part in parts}
    return sorted(parts, key=lambda part: (-width[part.key], part.key))


def _part(key: str, tensor: torch.Tensor) -> _Part:
    if key.encode(errors="replace").decode() != key:
        raise MessageError(f"tensor name {key!r} has no UTF-8 form")
    if tensor.dtype not in _DTYPES:
        raise MessageError(f"{key}: dtype {tensor.dtype} is not part of the encoding")
    tensor = tensor.detach().cpu().contiguous()
    dtype, shape = _DTYPES[tensor.dtype], tuple(tensor.shape)
    raw = tensor.reshape(-1).view(torch.uint8).numpy()
    size = raw.nbytes

    def dense() -> _Part:
        return _Part(key, dtype, shape, size, None, raw.tobytes)

    itemsize = tensor.element_size()
    entries = raw.view(_UNSIGNED[itemsize])
    filled = int(np.count_nonzero(entries))
    is_bool = tensor.dtype is torch.bool
    bitmap = -(-len(entries) // 8)
    if not is_bool and bitmap + filled * itemsize >= size and filled * (1 + itemsize) >= size:
        return dense()
    positions = np.flatnonzero(entries)
    gaps = np.diff(positions, prepend=-1) - 1
    width = _width(int(gaps.max())) if filled else 1
    values = b"" if is_bool else entries[positions].tobytes()

    def packed(form: str, places: int, pack: Callable[[], bytes], *extra: int) -> _Part:
        packed_size = places + len(values)
        return _Part(
            key,
            "U8",
            (packed_size,),
            packed_size,
            [form, dtype, list(shape), *extra],
            lambda: pack() + values,
        )

    candidates = [
        packed(
            "bits" if is_bool else "bitmap",
            bitmap,
            lambda: np.packbits(entries != 0, bitorder="little").tobytes(),
        ),
        packed(
            "indices" if is_bool else "gaps",
            filled * width,
            lambda: gaps.astype(_UNSIGNED[width]).tobytes(),
            width,
        ),
        dense(),
    ]
    return min(candidates, key=_cost)


def _cost(part: _Part) -> int:
    # The bytes, and what differs in the header, where the form is JSON in a string inside JSON.
    form = len(_json(_json({part.key: part.form}))) - 2 if part.form else 0
    return part.size + len(_json([part.dtype, part.shape])) + form


def _width(largest: int) -> int:
    return next(width for width in _UNSIGNED if largest < 1 << 8 * width)


def _header(message: Message, parts: list[_Part]) -> bytes:
    about = {
        "forms": {part.key: part.form for part in parts if part.form},
        "metrics": {name: list(pair) for name, pair in message.metrics.items()},
        "scalars": dict(message.scalars),
    }
    _check_facts(about)
    header: dict[str, Any] = {"__metadata__": {"hansa": _json(about)}}
    offset = 0
    for part in parts:
        end = offset + part.size
        header[part.key] = {
            "dtype": part.dtype,
            "shape": list(part.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = _json(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise MessageError("a name stands twice in the header")
    return result


def _load_json(text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except MessageError:
        raise
    except (ValueError, RecursionError) as error:
        raise MessageError("the header is no JSON") from error
    if not isinstance(value, dict):
        raise MessageError("the header is no JSON object")
    return value


def _about(body: bytes) -> dict[str, Any]:
    """Return what the header says beside the tensors, its types checked."""
    if len(body) < 8:
        raise MessageError("truncated before the header")
    (length,) = struct.unpack_from("<Q", body)
    if length > len(body) - 8:
        raise MessageError("truncated inside the header")
    header = _load_json(body[8 : 8 + length])
    metadata = header.get("__metadata__")
    text = metadata.get("hansa") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise MessageError("the header lacks the message's own part")
    about = _load_json(text)
    for part in ("forms", "metrics", "scalars"):
        if not isinstance(about.get(part), dict):
            raise MessageError(f"the header's {part!r} is no object")
    _check_facts(about)
    return about


def _check_facts(about: dict[str, Any]) -> None:
    for name, pair in about["metrics"].items():
        numbers = isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair))
        if not numbers:
            raise MessageError(f"metric {name!r} is no pair of numbers")
    for name, value in about["scalars"].items():
        if not (isinstance(value, bool | str) or _is_number(value)):
            raise MessageError(f"scalar {name!r} is no scalar")


def _is_number(value: object) -> bool:
    # Whole numbers of more than 64 bits would not fit the floats that they are summed in.
    is_int = type(value) is int and abs(value) < 1 << 63
    return is_int or isinstance(value, float)


def _check_declared(about: dict[str, Any], held: int, max_bytes: int) -> None:
    total = held
    for key, form in about["forms"].items():
        match form:
            case ["bits" | "bitmap", str() as dtype, list() as shape]:
                pass
            case ["indices" | "gaps", str() as dtype, list() as shape, int() as width]:
                if type(width) is not int or width not in _UNSIGNED:
                    raise MessageError(f"{key}: positions of {width} bytes")
            case _:
                raise MessageError(f"{key}: unknown form {form!r}")
        if dtype not in _BY_NAME:
            raise MessageError(f"{key}: unknown dtype {dtype!r}")
        if (form[0] in ("bits", "indices")) != (dtype == "BOOL"):
            raise MessageError(f"{key}: form {form[0]!r} does not hold {dtype}")
        size = _BY_NAME[dtype].itemsize
        for length in shape:
            # Nothing is saved by packing an empty tensor, so no length is 0.
            if type(length) is not int or length < 1:
                raise MessageError(f"{key}: shape {shape!r}")
            size = min(size * length, max_bytes + 1)
        total += size
    if total > max_bytes:
        raise MessageError(f"the message unfolds to more than the limit of {max_bytes} bytes")


def _unpack(key: str, stored: torch.Tensor, form: list[Any]) -> torch.Tensor:
    """Return the dense tensor behind a packed one; every count is checked against the bytes."""
    if stored.dtype is not torch.uint8 or stored.dim() != 1:
        raise MessageError(f"{key}: a packed tensor must be a row of bytes")
    _, dtype, shape, *extra = form
    numel, itemsize = math.prod(shape), _BY_NAME[dtype].itemsize
    is_bool = dtype == "BOOL"
    raw = stored.numpy()
    if extra:
        step = extra[0] + (0 if is_bool else itemsize)
        count, rest = divmod(len(raw), step)
        if rest:
            raise MessageError(f"{key}: {len(raw)} bytes are no whole number of entries")
        places = count * extra[0]
        gaps = np.frombuffer(raw[:places].tobytes(), _UNSIGNED[extra[0]])
        # Sums run in Python-sized floats first, so that no hostile gap can wrap around.
        if gaps.astype(np.float64).sum() + count > numel:
            raise MessageError(f"{key}: a position lies outside the tensor")
        positions = np.cumsum(gaps.astype(np.int64) + 1) - 1
    else:
        places = -(-numel // 8)
        if len(raw) < places:
            raise MessageError(f"{key}: {len(raw)} bytes hold no bitmap of {numel}")
        flags = np.unpackbits(raw[:places], bitorder="little")
        if flags[numel:].any():
            raise MessageError(f"{key}: a position lies outside the tensor")
        positions = np.flatnonzero(flags[:numel])
    values = raw[places:]
    dense = np.zeros(numel, _UNSIGNED[itemsize])
    if is_bool:
        if len(values):
            raise MessageError(f"{key}: {len(values)} bytes too many")
        dense[positions] = 1
    else:
        if len(values) != len(positions) * itemsize:
            raise MessageError(f"{key}: {len(values)} bytes for {len(positions)} values")
        dense[positions] = np.frombuffer(values.tobytes(), _UNSIGNED[itemsize])
    flat = torch.from_numpy(dense.view(np.uint8)).view(_BY_NAME[dtype])
    return flat.reshape(shape)

import json
import random
import struct
import zlib
from collections.abc import Mapping
from itertools import product
from math import inf, nan, prod
from typing import Any, TypeVar

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.federation.message import Message, MessageError
from hansa.federation.wire import csr_size, decode, encode, encoded_size

T = TypeVar("T")

NAMES = {
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
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
EMPTY: dict[str, Any] = {"forms": {}, "metrics": {}, "scalars": {}}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def content(message: Message) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]]:
    """Return everything about a message's tensors, comparable bit by bit."""
    return {
        group: {name: (t.dtype, tuple(t.shape), bits(t)) for name, t in tensors.items()}
        for group, tensors in message.groups.items()
    }


def backwards(found: Mapping[str, T]) -> dict[str, T]:
    return dict(reversed(list(found.items())))


def one(tensor: torch.Tensor, name: str = "t") -> Message:
    return Message({"m": {name: tensor}})


def compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def seal(body: bytes) -> bytes:
    """Return a body behind a prefix that fits it."""
    return struct.pack("<8sIIQ", b"HANSAMSG", 1, zlib.crc32(body), len(body)) + body


def sealed(header: str | bytes, data: bytes = b"") -> bytes:
    text = header.encode() if isinstance(header, str) else header
    text += b" " * (-len(text) % 8)
    return seal(struct.pack("<Q", len(text)) + text + data)


def build(entries: dict[str, Any], data: bytes = b"", **about: Any) -> bytes:
    """Return a message from its header's entries, its data and changes to the message's part."""
    text = compact({**EMPTY, **about})
    return sealed(compact({"__metadata__": {"hansa": text}, **entries}), data)


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def packed(form: list[Any], data: bytes) -> bytes:
    return build({"m/t": entry("U8", [len(data)], 0, len(data))}, data, forms={"m/t": form})


def header_of(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack_from("<Q", data, 24)
    header: dict[str, Any] = json.loads(data[32 : 32 + length])
    return header


def form_of(data: bytes) -> tuple[list[Any] | None, int]:
    """Return the form that a message's one tensor takes, and the bytes it takes."""
    header = header_of(data)
    (form,) = json.loads(header.pop("__metadata__")["hansa"])["forms"].values() or [None]
    ((start, end),) = (found["data_offsets"] for found in header.values())
    return form, end - start


def in_every_form(tensor: torch.Tensor, name: str = "t") -> list[bytes]:
    """Return the message of one tensor in all forms that its dtype allows, dense first."""
    dtype, shape = NAMES[tensor.dtype], list(tensor.shape)
    raw, is_bool = bits(tensor), tensor.dtype is torch.bool
    entries = np.frombuffer(raw, UNSIGNED[tensor.element_size()])
    places = np.flatnonzero(entries)
    gaps = np.diff(places, prepend=-1) - 1
    values = b"" if is_bool else entries[places].tobytes()
    key = f"m/{name}"
    found = [build({key: entry(dtype, shape, 0, len(raw))}, raw)]

    def add(form: list[Any], data: bytes) -> None:
        found.append(build({key: entry("U8", [len(data)], 0, len(data))}, data, forms={key: form}))

    flags = np.packbits(entries != 0, bitorder="little").tobytes()
    add(["bits" if is_bool else "bitmap", dtype, shape], flags + values)
    for width, kind in UNSIGNED.items():
        if not len(gaps) or gaps.max() < 2 ** (8 * width):
            form = ["indices" if is_bool else "gaps", dtype, shape, width]
            add(form, gaps.astype(kind).tobytes() + values)
    return found


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Return a tensor of random bits, of which a random share of the entries is zero."""
    dtype = draw(st.sampled_from(list(NAMES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3)) + draw(st.sampled_from([[], [50], [700]]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    raw = rng.integers(0, 256, (prod(shape), dtype.itemsize), dtype=np.uint8)
    raw[rng.random(len(raw)) > draw(st.sampled_from([0.0, 0.01, 0.1, 0.6, 1.0]))] = 0
    if dtype is torch.bool:
        raw &= 1
    return torch.from_numpy(raw.reshape(-1)).view(dtype).reshape(shape)


GROUPS = st.text("abz019_.-", min_size=1, max_size=8)
TEXT = st.text(max_size=8) | st.sampled_from(["layer/0.weight", "..", "\"\\'", "é\U0001f41d", "\0"])
SCALARS = st.booleans() | st.integers(1 - 2**63, 2**63 - 1) | st.floats(allow_nan=False) | TEXT
FLOATS = st.floats(allow_nan=False)
MESSAGES = st.builds(
    Message,
    st.dictionaries(GROUPS, st.dictionaries(TEXT, tensors(), max_size=3), max_size=3),
    st.dictionaries(TEXT, SCALARS, max_size=3),
    st.dictionaries(TEXT, st.tuples(FLOATS, FLOATS), max_size=3),
)
SURE = settings(deadline=None, derandomize=True)


# Lossless.


@SURE
@given(MESSAGES)
def test_decoding_gives_back_every_bit(message: Message) -> None:
    again = decode(encode(message))
    assert content(again) == {group: t for group, t in content(message).items() if t}
    assert again.scalars == message.scalars
    assert list(map(type, again.scalars.values())) == [
        type(message.scalars[name]) for name in again.scalars
    ]
    assert again.metrics == message.metrics


@SURE
@given(MESSAGES)
def test_the_size_is_known_without_the_bytes(message: Message) -> None:
    assert encoded_size(message) == (len(encode(message)) if message else 0)


@SURE
@given(MESSAGES)
def test_equal_messages_give_equal_bytes_whatever_the_order(message: Message) -> None:
    turned = Message(
        {group: backwards(tensors) for group, tensors in backwards(message.groups).items()},
        backwards(message.scalars),
        backwards(message.metrics),
    )
    assert encode(turned) == encode(message)
    assert encode(decode(encode(message))) == encode(message)


SPECIAL = {
    torch.float64: ("<Q", [0x7FF8000000000001, 0x7FF0000000000ABC, 0xFFF << 52, 1 << 63, 1]),
    torch.float32: ("<I", [0x7FC00001, 0x7F800ABC, 0xFF800000, 0x80000000, 1]),
    torch.float16: ("<H", [0x7E01, 0x7C0B, 0xFC00, 0x8000, 1]),
    torch.bfloat16: ("<H", [0x7FC1, 0x7F8B, 0xFF80, 0x8000, 1]),
}


@pytest.mark.parametrize("zeros", [0, 3, 400])
@pytest.mark.parametrize("dtype", SPECIAL, ids=str)
def test_nan_payloads_infinities_minus_zero_and_subnormals_survive(
    dtype: torch.dtype, zeros: int
) -> None:
    pack, patterns = SPECIAL[dtype]
    raw = b"".join(struct.pack(pack, p) + bytes(zeros * dtype.itemsize) for p in patterns)
    tensor = torch.frombuffer(bytearray(raw), dtype=dtype)
    assert bits(decode(encode(one(tensor))).groups["m"]["t"]) == raw


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1), (600,)], ids=str)
def test_zeros_and_ones_of_every_dtype_and_shape_survive(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    message = Message(
        {"m": {"zero": torch.zeros(shape).to(dtype), "one": torch.ones(shape, dtype=dtype)}}
    )
    assert content(decode(encode(message))) == content(message)


@pytest.mark.parametrize(
    "dtype", [d for d in NAMES if not d.is_floating_point and d is not torch.bool], ids=str
)
def test_the_ends_of_every_integer_range_survive(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    message = one(torch.tensor([info.min, info.max, 0, 1], dtype=dtype))
    assert decode(encode(message)).groups["m"]["t"].tolist() == [info.min, info.max, 0, 1]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "a/b/c",
        "a.b",
        "..",
        ".",
        "__metadata__",
        '"',
        "\\",
        "'",
        "\n\t\0",
        "größe",
        "\U0001f41d",
    ],
)
def test_any_text_may_name_a_tensor_a_scalar_or_a_metric(name: str) -> None:
    # Both a dense and a packed tensor, since the name of the latter stands in two places.
    for tensor in (torch.ones(2), torch.zeros(500)):
        message = Message({"m": {name: tensor}}, {name: name}, {name: (1.0, 2.0)})
        again = decode(encode(message))
        assert content(again) == content(message)
        assert (again.scalars, again.metrics) == (message.scalars, message.metrics)
        assert encoded_size(message) == len(encode(message))


def test_names_that_look_alike_across_groups_stay_apart() -> None:
    message = Message({"a": {"b/c": torch.tensor(1)}, "a.b": {"c": torch.tensor(2)}})
    assert content(decode(encode(message))) == content(message)


def test_scalars_and_metrics_that_are_no_finite_numbers_survive() -> None:
    again = decode(encode(Message(scalars={"a": inf, "b": nan}, metrics={"l": (nan, -inf)})))
    assert repr(again.scalars) == "{'a': inf, 'b': nan}"
    assert repr(again.metrics) == "{'l': (nan, -inf)}"


def test_an_empty_message_can_be_encoded_but_costs_nothing() -> None:
    assert not decode(encode(Message()))
    assert encoded_size(Message()) == 0
    assert encoded_size(Message({"m": {}})) == 0


def test_a_group_without_tensors_leaves_no_trace() -> None:
    full = Message({"m": {"t": torch.ones(2)}})
    assert encode(Message({**full.groups, "none": {}})) == encode(full)


def test_views_and_variables_are_encoded_by_their_values() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    plain = encode(one(base.t().clone(memory_format=torch.contiguous_format)))
    assert encode(one(base.t())) == plain
    assert encode(one(base.t().requires_grad_())) == plain
    assert encode(one(torch.ones(1).expand(3))) == encode(one(torch.ones(3)))


def test_encoding_leaves_the_tensors_as_they_were_and_decoding_shares_nothing() -> None:
    tensor = torch.tensor([1.0, 0.0, -2.0])
    data = encode(one(tensor))
    decode(data).groups["m"]["t"].zero_()
    assert tensor.tolist() == [1.0, 0.0, -2.0]
    assert decode(data).groups["m"]["t"].tolist() == [1.0, 0.0, -2.0]


def test_decoded_tensors_are_aligned_as_pytorch_aligns_its_own() -> None:
    group = {str(k): torch.ones(k) for k in range(1, 40)}
    again = decode(encode(Message({"m": group}))).groups["m"]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in again.values())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.float8_e4m3fn], ids=str)
def test_encoding_refuses_other_dtypes_and_names_the_tensor(dtype: torch.dtype) -> None:
    for call in (encode, encoded_size):
        with pytest.raises(MessageError, match=r"m/t: dtype .* is not part of the encoding"):
            call(one(torch.zeros(2, dtype=dtype)))


@pytest.mark.parametrize("group", ["", "a/b", "a b", "é", "a\n", "x" * 65])
def test_encoding_refuses_odd_group_names(group: str) -> None:
    with pytest.raises(MessageError, match="group name"):
        encode(Message({group: {"t": torch.ones(1)}}))


def test_encoding_refuses_a_tensor_name_that_readers_would_refuse() -> None:
    with pytest.raises(MessageError, match="UTF-8"):
        encode(one(torch.ones(1), "half a pair \ud83d"))


# The layout.


def test_the_bytes_of_a_small_message_are_these() -> None:
    message = Message({"m": {"t": torch.tensor([1.0, -2.0])}}, {"weight": 3}, {"loss": (0.5, 2.0)})
    header = (
        rb'{"__metadata__":{"hansa":"{\"forms\":{},\"metrics\":{\"loss\":[0.5,2.0]},'
        rb'\"scalars\":{\"weight\":3}}"},"m/t":{"data_offsets":[0,8],"dtype":"F32","shape":[2]}}'
    )
    padded = header + b" " * (-len(header) % 8)
    body = struct.pack("<Q", len(padded)) + padded + struct.pack("<ff", 1.0, -2.0)
    prefix = b"HANSAMSG\x01\0\0\0" + struct.pack("<IQ", zlib.crc32(body), len(body))
    assert encode(message) == prefix + body


def test_the_tests_own_writer_writes_what_the_encoder_writes() -> None:
    tensor = torch.tensor([1.0, 2.0, 3.0])
    assert encode(one(tensor)) == in_every_form(tensor)[0]


def test_the_body_is_a_safetensors_file_with_the_dense_tensors_as_they_are() -> None:
    dense = {
        name: torch.arange(1, 6, dtype=torch.float64).to(dtype) for dtype, name in NAMES.items()
    }
    mask = torch.ones(400, dtype=torch.bool)
    body = encode(Message({"m": {**dense, "mask": mask}}, {"weight": 3}))[24:]
    stored = safetensors.torch.load(body)
    assert stored.keys() == {"m/mask", *(f"m/{name}" for name in dense)}
    assert stored["m/mask"].tolist() == [255] * 50
    for name, tensor in dense.items():
        assert stored[f"m/{name}"].dtype is tensor.dtype
        assert bits(stored[f"m/{name}"]) == bits(tensor)


def test_every_tensor_starts_at_a_multiple_of_its_item_size() -> None:
    group = {f"{k}-{name}": torch.ones(3).to(d) for k in range(2) for d, name in NAMES.items()}
    data = encode(Message({"m": group}))
    (length,) = struct.unpack_from("<Q", data, 24)
    assert length % 8 == 0
    header = header_of(data)
    for name, tensor in group.items():
        assert header[f"m/{name}"]["data_offsets"][0] % tensor.element_size() == 0


# The smallest form.


def filled(n: int, places: list[int] | range, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = torch.zeros(n, dtype=dtype)
    tensor[list(places)] = 1
    return tensor


@pytest.mark.parametrize(
    ("tensor", "form", "size"),
    [
        # dense 4000; bitmap 125 + 4000; gaps 1000 * 5
        (filled(1000, range(1000)), None, 4000),
        # dense 4000; bitmap 125 + 2000; gaps 500 * 5
        (filled(1000, range(0, 1000, 2)), ["bitmap", "F32", [1000]], 2125),
        # dense 32000; bitmap 1000 + 40; gaps of 799, so 10 * (2 + 4)
        (filled(8000, range(799, 8000, 800)), ["gaps", "F32", [8000], 2], 60),
        # dense 2560; bitmap 320 + 10; gaps of 255, so 10 * (1 + 1), or of 256, so 10 * (2 + 1)
        (filled(2560, range(255, 2560, 256), torch.int8), ["gaps", "I8", [2560], 1], 20),
        (filled(2570, range(256, 2570, 257), torch.int8), ["gaps", "I8", [2570], 2], 30),
        # one entry behind a gap of 65535 or 65536
        (filled(70000, [65535], torch.float64), ["gaps", "F64", [70000], 2], 10),
        (filled(70000, [65536], torch.float64), ["gaps", "F64", [70000], 4], 12),
        # nothing but zeros
        (torch.zeros(50, 20, dtype=torch.int64), ["gaps", "I64", [50, 20], 1], 0),
        # dense 1000; bitmap 125 + 500; gaps 500 * 2
        (filled(1000, range(0, 1000, 2), torch.uint8), ["bitmap", "U8", [1000]], 625),
        # dense 8000; bits 1000; indices 4000
        (filled(8000, range(0, 8000, 2), torch.bool), ["bits", "BOOL", [8000]], 1000),
        # dense 8000; bits 1000; indices 10 * 2
        (filled(8000, range(799, 8000, 800), torch.bool), ["indices", "BOOL", [8000], 2], 20),
        # dense 8000; bits 1000; indices 8000
        (filled(8000, range(8000), torch.bool), ["bits", "BOOL", [8000]], 1000),
        # a form in the header costs more than these few bytes
        (torch.zeros(8), None, 32),
        (torch.ones((), dtype=torch.bool), None, 1),
        (torch.zeros(0), None, 0),
    ],
)
def test_the_smallest_form_is_taken(
    tensor: torch.Tensor, form: list[Any] | None, size: int
) -> None:
    assert form_of(encode(one(tensor))) == (form, size)


def test_minus_zero_is_no_zero() -> None:
    # dense 4000; bitmap 125 + 4 * 4; gaps up to 249, so 4 * 5
    tensor = torch.zeros(1000)
    tensor[::250] = -0.0
    assert form_of(encode(one(tensor))) == (["gaps", "F32", [1000], 1], 20)


def small_tensors(seed: int, num: int) -> list[tuple[str, torch.Tensor]]:
    rng = random.Random(seed)  # noqa: S311
    found: list[tuple[str, torch.Tensor]] = []
    while len(found) < num:
        shape = [rng.choice([1, 2, 3, 8, 60]) for _ in range(rng.choice([0, 1, 2, 4]))]
        if prod(shape) > 5000:
            continue
        tensor = torch.zeros(shape, dtype=rng.choice(list(NAMES)))
        places = rng.sample(range(tensor.numel()), int(tensor.numel() * rng.random() ** 3))
        tensor.view(-1)[places] = 1
        found.append((rng.choice(["t", "größe" * 5, '"' * 12]), tensor))
    return found


def test_no_other_form_would_make_a_message_shorter_than_its_padding() -> None:
    for name, tensor in small_tensors(seed=0, num=300):
        shortest = min(map(len, in_every_form(tensor, name)))
        assert shortest <= len(encode(one(tensor, name))) < shortest + 8


def test_every_form_and_width_decodes_to_the_same_tensor() -> None:
    forms = 0
    for name, tensor in small_tensors(seed=1, num=100):
        want = content(one(tensor, name))
        for data in in_every_form(tensor, name):
            assert content(decode(data)) == want
            forms += 1
    assert forms > 500


def test_a_value_of_zero_in_a_packed_tensor_is_no_harm() -> None:
    data = packed(["gaps", "U8", [40], 1], bytes([3, 0, 7, 0]))
    tensor = decode(data).groups["m"]["t"]
    assert tensor.tolist() == [0, 0, 0, 7] + [0] * 36


# Refused: damage.

SAMPLE = Message(
    {
        "model": {"w": torch.tensor([1.5, -0.0, 3.0]), "sparse": filled(300, [5, 250])},
        "masks": {"w": filled(100, range(0, 100, 2), torch.bool)},
    },
    {"weight": 3, "name": "a"},
    {"loss": (0.5, 2.0)},
)


def test_bytes_cut_off_anywhere_are_refused() -> None:
    data = encode(SAMPLE)
    for length in range(len(data)):
        with pytest.raises(MessageError):
            decode(data[:length])


def test_bytes_cut_off_anywhere_are_refused_even_behind_a_prefix_that_fits() -> None:
    body = encode(SAMPLE)[24:]
    for length in range(len(body)):
        with pytest.raises(MessageError):
            decode(seal(body[:length]))


@pytest.mark.parametrize("mask", [1, 0x80, 0xFF])
def test_a_change_to_any_byte_is_noticed(mask: int) -> None:
    data = encode(SAMPLE)
    for place in range(len(data)):
        with pytest.raises(MessageError):
            decode(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])


def test_bytes_behind_the_message_are_refused() -> None:
    data = encode(SAMPLE)
    with pytest.raises(MessageError, match="bytes follow the prefix, which declares"):
        decode(data + b"\0")
    with pytest.raises(MessageError):
        decode(seal(data[24:] + b"\0"))
    with pytest.raises(MessageError):
        decode(data + data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "shorter than a message's prefix"),
        (b"HANSAMSG", "shorter than a message's prefix"),
        (b"HANSAMSH" + encode(SAMPLE)[8:], "wrong magic"),
        (safetensors.torch.save({"m/t": torch.ones(9)}), "wrong magic"),
        (struct.pack("<8sIIQ", b"HANSAMSG", 2, 0, 0), "version 2 of the encoding is not 1"),
        (struct.pack("<8sIIQ", b"HANSAMSG", 0x10001, 0, 0), "version 65537"),
        (struct.pack("<8sIIQ", b"HANSAMSG", 1, 0, 2**64 - 1), "0 bytes follow"),
        (struct.pack("<8sIIQ", b"HANSAMSG", 1, 7, 0), "checksum"),
    ],
)
def test_what_is_no_message_is_refused_for_its_first_fault(data: bytes, said: str) -> None:
    with pytest.raises(MessageError, match=said):
        decode(data)


# Refused: headers that lie. The prefix fits all of these.

ABOUT = compact(compact(EMPTY))
F32 = entry("F32", [2], 0, 8)
GAPS = ["gaps", "F32", [100], 1]
ONE_GAP = bytes(5)
LIES: dict[str, bytes] = {
    "no header": seal(b""),
    "half a header length": seal(bytes(7)),
    "header length 2**63": seal(struct.pack("<Q", 1 << 63) + b"{}"),
    "header length of one too many": seal(struct.pack("<Q", 3) + b"{}"),
    "empty header": seal(bytes(8)),
    "header no JSON": sealed("{"),
    "header a list": sealed("[]"),
    "header no UTF-8": sealed(b'{"__metadata__":{"hansa":"\xff"}}'),
    "header in UTF-16": sealed(f'{{"__metadata__":{{"hansa":{ABOUT}}}}}'.encode("utf-16-le")),
    "header with a byte order mark": sealed(f'\ufeff{{"__metadata__":{{"hansa":{ABOUT}}}}}'),
    "no metadata": sealed("{}"),
    "metadata a string": sealed('{"__metadata__":"hansa"}'),
    "metadata without us": sealed('{"__metadata__":{"other":"x"}}'),
    "our part an object": sealed('{"__metadata__":{"hansa":{}}}'),
    "our part no JSON": sealed('{"__metadata__":{"hansa":"x"}}'),
    "our part a list": sealed('{"__metadata__":{"hansa":"[]"}}'),
    "other metadata no text": sealed(f'{{"__metadata__":{{"hansa":{ABOUT},"b":1}}}}'),
    "metadata twice": sealed(
        f'{{"__metadata__":{{"hansa":{ABOUT}}},"__metadata__":{{"hansa":{ABOUT}}}}}'
    ),
    "tensor twice": sealed(
        f'{{"__metadata__":{{"hansa":{ABOUT}}},"m/t":{compact(F32)},"m/t":{compact(F32)}}}',
        bytes(8),
    ),
    "shape twice": sealed(
        f'{{"__metadata__":{{"hansa":{ABOUT}}},'
        '"m/t":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "scalar twice": sealed(
        compact({"__metadata__": {"hansa": '{"forms":{},"metrics":{},"scalars":{"a":1,"a":1}}'}})
    ),
    "no forms": sealed(compact({"__metadata__": {"hansa": '{"metrics":{},"scalars":{}}'}})),
    "forms a list": build({}, forms=[]),
    "metrics a list": build({}, metrics=[]),
    "scalars null": build({}, scalars=None),
    "entry a list": build({"m/t": []}),
    "entry without shape": build({"m/t": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "unknown dtype": build({"m/t": entry("F99", [2], 0, 8)}, bytes(8)),
    "dtype of safetensors only": build({"m/t": entry("U16", [4], 0, 8)}, bytes(8)),
    "dtype of eight bits": build({"m/t": entry("F8_E4M3", [8], 0, 8)}, bytes(8)),
    "dtype of four bits": build({"m/t": entry("F4", [16], 0, 8)}, bytes(8)),
    "dtype complex": build({"m/t": entry("C64", [1], 0, 8)}, bytes(8)),
    "shape too large": build({"m/t": entry("F32", [3], 0, 8)}, bytes(8)),
    "shape too small": build({"m/t": entry("F32", [1], 0, 8)}, bytes(8)),
    "shape negative": build({"m/t": entry("F32", [-2], 0, 8)}, bytes(8)),
    "shape a float": build({"m/t": entry("F32", [2.0], 0, 8)}, bytes(8)),
    "shape huge": build({"m/t": entry("F32", [10**15], 0, 8)}, bytes(8)),
    "shape wraps around": build({"m/t": entry("F32", [2**62 + 1, 4], 0, 16)}, bytes(16)),
    "shape empty and huge": build({"m/t": entry("F32", [0, 2**64], 0, 0)}),
    "shape empty and too large": build({"m/t": entry("F32", [0, 2**63], 0, 0)}),
    "shape empty with strides too large": build({"m/t": entry("F32", [0, 2**62, 2**62], 0, 0)}),
    "offsets beyond the data": build({"m/t": entry("F32", [2], 8, 16)}, bytes(8)),
    "offsets reversed": build({"m/t": entry("F32", [2], 8, 0)}, bytes(8)),
    "offsets negative": build({"m/t": entry("F32", [2], -8, 0)}, bytes(8)),
    "offsets overlap": build(
        {"m/a": entry("F32", [2], 0, 8), "m/b": entry("F32", [2], 4, 12)}, bytes(12)
    ),
    "offsets shared": build({"m/a": F32, "m/b": F32}, bytes(8)),
    "a hole before": build({"m/t": entry("F32", [2], 4, 12)}, bytes(12)),
    "a hole between": build(
        {"m/a": entry("F32", [2], 0, 8), "m/b": entry("F32", [2], 12, 20)}, bytes(20)
    ),
    "data left over": build({"m/t": F32}, bytes(9)),
    "data without tensors": build({}, bytes(8)),
    "a truth value of two": build({"m/t": entry("BOOL", [2], 0, 2)}, b"\1\2"),
    "no group": build({"t": F32}, bytes(8)),
    "empty group": build({"/t": F32}, bytes(8)),
    "group with a blank": build({"a b/t": F32}, bytes(8)),
    "group too long": build({"x" * 65 + "/t": F32}, bytes(8)),
    "form for an absent tensor": build({"m/t": F32}, bytes(8), forms={"m/u": GAPS}),
    "form for the metadata": build({}, forms={"__metadata__": GAPS}),
    "form of a dense tensor": build({"m/t": F32}, bytes(8), forms={"m/t": GAPS}),
    "form of bytes in two dimensions": build(
        {"m/t": entry("U8", [5, 1], 0, 5)}, bytes(5), forms={"m/t": GAPS}
    ),
    "form of signed bytes": build({"m/t": entry("I8", [5], 0, 5)}, bytes(5), forms={"m/t": GAPS}),
    "metric a number": build({}, metrics={"loss": 3}),
    "metric of three": build({}, metrics={"loss": [1, 2, 3]}),
    "metric of one": build({}, metrics={"loss": [1]}),
    "metric of text": build({}, metrics={"loss": [1, "2"]}),
    "metric of truth": build({}, metrics={"loss": [1, True]}),
    "metric of null": build({}, metrics={"loss": [None, 1]}),
    "metric an object": build({}, metrics={"loss": {"0": 1, "1": 2}}),
    "metric of text of two": build({}, metrics={"loss": "12"}),
    "scalar a list": build({}, scalars={"a": [1]}),
    "scalar an object": build({}, scalars={"a": {}}),
    "scalar absent": build({}, scalars={"a": None}),
    "number of too many digits": sealed(
        compact({"__metadata__": {"hansa": compact(EMPTY)[:-1] + ',"x":' + "9" * 5000 + "}"}})
    ),
    # Forms.
    "form a string": packed("gaps", ONE_GAP),  # type: ignore[arg-type]
    "form an object": packed({"0": "gaps"}, ONE_GAP),  # type: ignore[arg-type]
    "form null": packed(None, ONE_GAP),  # type: ignore[arg-type]
    "form empty": packed([], ONE_GAP),
    "form unknown": packed(["zip", "F32", [100], 1], ONE_GAP),
    "form no text": packed([1, "F32", [100], 1], ONE_GAP),
    "form too short": packed(["gaps", "F32", [100]], ONE_GAP),
    "form too long": packed([*GAPS, 1], ONE_GAP),
    "bitmap with a width": packed(["bitmap", "F32", [8], 1], ONE_GAP),
    "form of an unknown dtype": packed(["gaps", "F99", [100], 1], ONE_GAP),
    "form of a dtype in a list": packed(["gaps", ["F32"], [100], 1], ONE_GAP),
    "form of a dtype by another name": packed(["gaps", "float32", [100], 1], ONE_GAP),
    "gaps of truth": packed(["gaps", "BOOL", [100], 1], bytes(2)),
    "bitmap of truth": packed(["bitmap", "BOOL", [8]], b"\1\1"),
    "bits of numbers": packed(["bits", "U8", [8]], b"\1"),
    "indices of numbers": packed(["indices", "U8", [8], 1], b"\1"),
    "width 3": packed(["gaps", "F32", [100], 3], bytes(7)),
    "width 0": packed(["gaps", "F32", [100], 0], bytes(4)),
    "width negative": packed(["gaps", "F32", [100], -1], bytes(3)),
    "width a float": packed(["gaps", "F32", [100], 1.0], ONE_GAP),
    "width a truth value": packed(["gaps", "F32", [100], True], ONE_GAP),
    "width text": packed(["gaps", "F32", [100], "1"], ONE_GAP),
    "width huge": packed(["gaps", "F32", [100], 10**400], ONE_GAP),
    "packed shape a number": packed(["gaps", "F32", 100, 1], ONE_GAP),
    "packed shape text": packed(["gaps", "F32", "100", 1], ONE_GAP),
    "packed shape negative": packed(["gaps", "F32", [-100], 1], ONE_GAP),
    "packed shape twice negative": packed(["gaps", "F32", [-10, -10], 1], ONE_GAP),
    "packed shape of truth": packed(["gaps", "F32", [True, 100], 1], ONE_GAP),
    "packed shape of floats": packed(["gaps", "F32", [100.0], 1], ONE_GAP),
    "packed shape of text": packed(["gaps", "F32", ["100"], 1], ONE_GAP),
    "packed shape of lists": packed(["gaps", "F32", [[100]], 1], ONE_GAP),
    "packed shape empty": packed(["gaps", "F32", [0], 1], b""),
    "packed shape empty and huge": packed(["gaps", "F32", [0, 10**30], 1], b""),
    "packed shape huge": packed(["gaps", "F32", [10**15], 1], b""),
    "packed bits huge": packed(["bits", "BOOL", [10**15]], b""),
    "packed shape of huge lengths": packed(["gaps", "F32", [10**4000, 10**4000], 1], b""),
    "packed shape of many lengths": packed(["gaps", "F32", [2**40] * 50_000, 1], b""),
    "position outside by one": packed(["gaps", "U8", [10], 1], bytes([10, 1])),
    "last position outside": packed(["gaps", "U8", [10], 1], bytes([4, 5, 1, 1])),
    "more positions than entries": packed(["gaps", "U8", [1], 1], bytes(4)),
    "index outside": packed(["indices", "BOOL", [10], 1], bytes([10])),
    "gap of 2**64 - 1": packed(["gaps", "U8", [10], 8], b"\xff" * 8 + b"\1"),
    "gaps that wrap to a fit": packed(["gaps", "U8", [10], 8], b"\xff" * 8 + bytes(8) + b"\1\1"),
    "half an entry": packed(["gaps", "F32", [100], 1], bytes(7)),
    "half an index": packed(["indices", "BOOL", [100], 2], bytes(3)),
    "bitmap cut off": packed(["bitmap", "U8", [9]], b"\0"),
    "bits cut off": packed(["bits", "BOOL", [9]], b"\0"),
    "bits too many": packed(["bits", "BOOL", [8]], b"\0\0"),
    "bit outside": packed(["bits", "BOOL", [9]], b"\0\2"),
    "bit outside a bitmap": packed(["bitmap", "U8", [9]], b"\0\2\1"),
    "value missing": packed(["bitmap", "F32", [8]], b"\3" + bytes(4)),
    "value too many": packed(["bitmap", "F32", [8]], b"\1" + bytes(8)),
    "half a value": packed(["bitmap", "F32", [8]], b"\1" + bytes(3)),
}


@pytest.mark.parametrize("data", LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_refused(data: bytes) -> None:
    with pytest.raises(MessageError):
        decode(data)


def test_the_same_builders_without_a_lie_are_accepted() -> None:
    assert decode(build({})) == Message()
    assert decode(build({"m/t": F32}, bytes(8))).groups["m"]["t"].tolist() == [0, 0]
    assert decode(packed(GAPS, ONE_GAP)).groups["m"]["t"].tolist() == [0] * 100
    assert decode(packed(["bits", "BOOL", [9]], b"\0\1")).groups["m"]["t"].tolist() == [
        False
    ] * 8 + [True]
    assert decode(packed(["gaps", "U8", [10], 1], bytes([9, 1]))).groups["m"]["t"][9] == 1
    assert decode(build({}, metrics={"loss": [1, 2.5]})).metrics == {"loss": (1, 2.5)}


@pytest.mark.parametrize(("before", "after"), [("[", "]"), ('{"a":', "}")], ids=["[]", "{}"])
def test_deep_nesting_is_refused_at_every_depth(before: str, after: str) -> None:
    """Where parsing just succeeds, saying what was found must succeed too."""
    for depth in [1, 10, 100, *range(850, 1000), 100_000]:
        inner = before * depth + "0" + after * depth
        for text in (
            f'{{"forms":{{"m/t":{inner}}},"metrics":{{}},"scalars":{{}}}}',
            f'{{"forms":{{"m/t":["bits","BOOL",[{inner}]]}},"metrics":{{}},"scalars":{{}}}}',
            f'{{"forms":{{}},"metrics":{{"loss":{inner}}},"scalars":{{}}}}',
        ):
            header = compact({"__metadata__": {"hansa": text}, "m/t": entry("U8", [0], 0, 0)})
            with pytest.raises(MessageError):
                decode(sealed(header))
    with pytest.raises(MessageError):
        decode(sealed(before * 100_000 + "0" + after * 100_000))


def test_what_a_message_unfolds_to_is_limited_exactly() -> None:
    data = packed(["gaps", "F32", [10, 10], 1], b"")
    whole = len(data) - 24 + 400
    assert decode(data, whole).groups["m"]["t"].shape == (10, 10)
    with pytest.raises(MessageError, match=f"more than the limit of {whole - 1} bytes"):
        decode(data, whole - 1)


def test_the_limit_counts_all_tensors_together() -> None:
    form = ["bits", "BOOL", [800]]
    entries = {f"m/{k}": entry("U8", [100], 100 * k, 100 * k + 100) for k in range(10)}
    data = build(entries, bytes(1000), forms=dict.fromkeys(entries, form))
    whole = len(data) - 24 + 8000
    assert len(decode(data, whole).groups["m"]) == 10
    with pytest.raises(MessageError, match="limit"):
        decode(data, whole - 1)


def test_the_limit_holds_for_dense_tensors_and_scalars() -> None:
    data = encode(one(torch.ones(1000)))
    assert decode(data, len(data) - 24)
    with pytest.raises(MessageError, match="limit"):
        decode(data, 3999)


# Random damage behind a prefix that fits.


def mutated(rng: random.Random, body: bytes) -> bytes:
    """Return a body with a few bytes changed, put in, left out or moved, or digits replaced."""
    found = bytearray(body)
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(len(found))
        match rng.randrange(7):
            case 0:
                found[place] = rng.randrange(256)
            case 1:
                found[place] ^= 1 << rng.randrange(8)
            case 2:
                found.insert(place, rng.randrange(256))
            case 3:
                del found[place]
            case 4:
                other = rng.randrange(len(found))
                found[place : place + 4] = found[other : other + 4]
            case _:
                (length,) = struct.unpack_from("<Q", body)
                digits = [k for k in range(8, 8 + length) if chr(body[k]).isdigit()]
                found[rng.choice(digits) % len(found)] = rng.choice(b'0123456789-.e[]{"')
    return bytes(found)


def test_random_damage_is_refused_or_decodes_to_a_message() -> None:
    rng = random.Random(0)  # noqa: S311
    bodies = [
        encode(SAMPLE)[24:],
        encode(one(filled(40, range(0, 40, 3), torch.float64).reshape(5, 8)))[24:],
        *(data[24:] for data in in_every_form(filled(60, [3, 50], torch.int16).reshape(6, 10))),
        *(data[24:] for data in in_every_form(filled(60, [3, 50], torch.bool))),
    ]
    accepted = 0
    for _ in range(3000):
        data = seal(mutated(rng, rng.choice(bodies)))
        try:
            message = decode(data, 1 << 20)
        except MessageError:
            continue
        accepted += 1
        once = encode(message)
        assert encoded_size(message) in (len(once), 0)
        assert encode(decode(once)) == once
    assert 100 < accepted < 2900


def test_any_bytes_behind_a_prefix_that_fits_are_refused() -> None:
    rng = random.Random(1)  # noqa: S311
    for length, _ in product(range(60), range(5)):
        with pytest.raises(MessageError):
            decode(seal(rng.randbytes(length)))


@pytest.mark.parametrize("value", [None, 1 << 63, -(10**400), [1], b"x"])
def test_a_scalar_of_another_kind_is_not_encoded(value: object) -> None:
    with pytest.raises(MessageError, match="scalar 'weight'"):
        encode(Message(scalars={"weight": value}))  # type: ignore[dict-item]


def test_a_metric_of_more_than_64_bits_is_not_encoded() -> None:
    with pytest.raises(MessageError, match="metric 'loss'"):
        encode(Message(metrics={"loss": (10**400, 1)}))


def test_the_size_that_papers_count_is_values_and_indices_of_what_is_not_zero() -> None:
    sparse = torch.tensor([0.0, 1.0, 0.0, -2.0, 0.0, 0.0, 0.0, -0.0])
    assert csr_size(one(sparse)) == 8 * 2
    assert csr_size(one(sparse.half())) == 8 * 2  # as float32, whatever the type
    assert csr_size(one(torch.ones(5))) == 4 * 5  # whole where that is less
    # Over the message, not tensor by tensor: the whole tensor is indexed as well.
    both = Message({"a": {"x": sparse, "y": torch.ones(1)}, "b": {"x": torch.zeros(4)}})
    assert csr_size(both) == 8 * 3
    more = {**both.groups, "buffers": {"m": torch.ones(9)}, "mask": {"m": torch.ones(9) > 0}}
    assert csr_size(Message({**more, "n": {"n": torch.ones(9, dtype=torch.int64)}})) == 8 * 3
    assert csr_size(Message()) == 0

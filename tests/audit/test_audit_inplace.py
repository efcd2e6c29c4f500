"""Edits in the text of a document change what they name and no other byte."""

import gzip
import json
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.audit.coding import TooLarge, acceptable, decode, encode, encodings, known
from hansa.audit.inplace import edited
from hansa.audit.paths import leaves, parse
from hansa.audit.tamper import add, decoded, delete, put, splice, tampered

TEXT = b"""{ "a" : {"b": 1.50, "c\\u002fd":"caf\\u00e9 \\/ red"},
  "list": [1, {"x": null}, 1e5] }
"""


@pytest.mark.parametrize(
    ("make", "old", "new"),
    [
        (lambda d: put(d, parse("a.b"), 2.25), b"1.50", b"2.25"),
        (lambda d: put(d, parse("list[0]"), "caf\u00e9"), b"[1,", b'["caf\\u00e9",'),
        (lambda d: delete(d, parse("a.b")), b'"b": 1.50, ', b""),
        (lambda d: delete(d, parse("list[2]")), b", 1e5", b""),
        (lambda d: delete(d, parse("list[1].x")), b'"x": null', b""),
        (lambda d: add(d, parse("a.new"), 3), b'red"}', b'red", "new": 3}'),
        (lambda d: add(d, parse("first"), 3, 0), b'"a" :', b'"first": 3, "a" :'),
        (lambda d: add(d, parse("list[1]"), 7), b"[1, ", b"[1, 7, "),
        (
            lambda d: splice(d, parse("a.c/d"), 7, "red", "green"),
            b'"caf\\u00e9 \\/ red"',
            b'"caf\\u00e9 / green"',
        ),
    ],
)
def test_an_edit_leaves_every_other_byte(make, old, new) -> None:
    edit = make(decoded(TEXT))
    expected = TEXT.replace(old, new).replace(b'{"first": 3, ', b'{ "first": 3, ')
    assert edited(TEXT, [edit]) == expected
    assert json.loads(expected) == tampered(decoded(TEXT), [edit])


def test_a_key_that_stands_twice_is_encoded_anew() -> None:
    body = b'{"a": 1, "a": 2, "b": 3}'
    assert edited(body, [put(decoded(body), ("a",), 5)]) == b'{"a": 1, "a": 5, "b": 3}'
    assert edited(body, [delete(decoded(body), ("a",))]) == b'{"b":3}'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-32-be"])
def test_a_body_keeps_its_own_encoding(encoding) -> None:
    body = '{"stra\u00dfe": "K\u00f6ln", "n": 1}'.encode(encoding)
    made = edited(body, [put(decoded(body), ("n",), "\u00fc")])
    assert made == '{"stra\u00dfe": "K\u00f6ln", "n": "\u00fc"}'.encode(encoding)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_is_made_in_the_text_is_what_is_made_in_the_document(data) -> None:
    keys = st.text(min_size=1, max_size=3)
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | keys
    inner = st.recursive(
        scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=3)
    )
    document = data.draw(st.dictionaries(keys, inner, min_size=1, max_size=4))
    indent = data.draw(st.sampled_from([None, 2]))
    ascii_ = data.draw(st.booleans())
    try:
        body = json.dumps(document, indent=indent, ensure_ascii=ascii_).encode()
    except UnicodeEncodeError:
        return
    now, edits = document, []
    for number in range(data.draw(st.integers(1, 4))):
        places = [path for path, _ in leaves(now) if path]
        if not places:
            break
        path = data.draw(st.sampled_from(places))
        kind = data.draw(st.sampled_from([put, delete, add]))
        if kind is put:
            edit = put(now, path, data.draw(scalars))
        elif kind is delete:
            edit = delete(now, path)
        elif isinstance(path[-1], int):
            edit = add(now, path, data.draw(scalars))
        else:
            edit = add(now, (*path[:-1], f"new {number}"), 1, data.draw(st.integers(0, 3)))
        now = tampered(now, [edit])
        edits.append(edit)
    made = edited(body, edits)
    # Equal with the order of keys.
    assert json.dumps(decoded(made)) == json.dumps(now)


@pytest.mark.parametrize("name", ["gzip", "deflate", "identity"])
def test_an_encoding_is_undone_and_done_again(name) -> None:
    body = b"hello " * 1000
    sent = encode(body, [name], b"")
    assert decode(sent, [name], 6000) == body
    with pytest.raises(TooLarge):
        decode(sent, [name], 5999)
    assert (len(sent) < 100) == (name != "identity")


def test_forms_of_deflate_and_members_of_gzip() -> None:
    raw = zlib.compressobj(wbits=-15)
    bare = raw.compress(b"hello") + raw.flush()
    assert decode(bare, ["deflate"], 10) == decode(zlib.compress(b"hello"), ["deflate"], 10)
    again = encode(b"other", ["deflate"], bare)
    assert zlib.decompressobj(-15).decompress(again) == b"other"
    assert decode(gzip.compress(b"he") + gzip.compress(b"llo"), ["gzip"], 10) == b"hello"
    assert decode(encode(b"hello", ["deflate", "gzip"], b""), ["deflate", "gzip"], 10) == b"hello"
    for torn in (gzip.compress(b"hello")[:-9], b"no gzip"):
        with pytest.raises(ValueError, match=r"early|header"):
            decode(torn, ["gzip"], 10)


def test_brotli_where_it_is_installed() -> None:
    brotli = pytest.importorskip("brotli")
    sent = encode(b"hello " * 1000, ["br"], b"")
    assert brotli.decompress(sent) == b"hello " * 1000
    assert decode(brotli.compress(b"hello"), ["br"], 10) == b"hello"
    assert decode(encode(b"hello", ["br", "gzip"], b""), ["br", "gzip"], 10) == b"hello"
    with pytest.raises(TooLarge):
        decode(sent, ["br"], 1000)
    for torn in (sent[:-3], b"no brotli"):
        with pytest.raises(ValueError, match=r"early|failed|error"):
            decode(torn, ["br"], 6000)


def test_what_is_asked_of_a_service_is_what_can_be_undone() -> None:
    assert encodings("GZIP, identity") == ["gzip", "identity"]
    assert acceptable("zstd, gzip;q=0.8, deflate") == "gzip;q=0.8, deflate"
    assert acceptable("zstd") == "identity"
    assert ("br" in acceptable("br, gzip")) == ("br" in known())

import builtins
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hansa.data.bundled_text import bundled
from hansa.data.clients import SPLITS, Client
from hansa.data.federate import FederatedData
from hansa.data.text import TextOptions, federate_text, pack, read_text
from hansa.data.text_exchange import SPANS, exchanged
from hansa.data.tokenizer import BPE, ByteTokenizer, train_bpe
from hansa.errors import InputError

ALL = TextOptions(most_kb=None)


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def read(source: str, **options: Any) -> str:
    return read_text(source, TextOptions(**{"most_kb": None, **options}), "nodes.a.text")


def numbered(num: int, **options: Any) -> Client:
    """Return the client of the text 0, 1, 2... as bytes, so that a token tells its position."""
    text = "".join(chr(k) for k in range(num))
    return pack({"a": text}, TextOptions(**options), ByteTokenizer())["a"]


def rows(client: Client) -> dict[str, list[list[int]]]:
    """Return each split's sequences of context + 1 tokens."""
    held = {}
    for split in SPLITS:
        inputs, labels = client.batch(split)
        assert torch.equal(inputs[:, 1:], labels[:, :-1])
        held[split] = torch.cat([inputs, labels[:, -1:]], 1).tolist()
    return held


def test_bundled_text_is_cut_where_asked() -> None:
    text = read("python:manual", most_kb=3)
    assert len(text.encode()) == 3000
    assert bundled("manual").startswith(text)


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    held = "Grüße\r\n\n  x \x00\n"
    assert read(f"file:{write(tmp_path / 'a.log', held)}") == held


def test_the_mark_of_utf8_is_no_text(tmp_path: Path) -> None:
    assert read(f"file:{write(tmp_path / 'a.txt', 'ab'.encode('utf-8-sig'))}") == "ab"


@pytest.mark.parametrize("over", range(4))
def test_the_cut_falls_between_characters(tmp_path: Path, over: int) -> None:
    place = write(tmp_path / "a.txt", "x" * over + "🧑" * 600)
    text = read(f"file:{place}", most_kb=1)
    assert text == "x" * over + "🧑" * ((1000 - over) // 4)
    table = parquet(tmp_path / "a.parquet", text=["x" * over + "🧑" * 600])
    assert read(f"parquet:{table}", most_kb=1) == text


def test_a_file_of_just_the_size_is_whole(tmp_path: Path) -> None:
    held = "y" * 999 + "z"
    assert read(f"file:{write(tmp_path / 'a.txt', held)}", most_kb=1) == held


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path / "b.md", "second")
    write(tmp_path / "a.txt", "first\n")
    write(tmp_path / "c" / "d.PY", "third")
    write(tmp_path / "c" / "picture.png", b"\x89PNG\xff")
    write(tmp_path / ".git" / "e.txt", "hidden")
    write(tmp_path / "b2.txt", " \n")
    assert read(f"folder:{tmp_path}") == "first\n\n\nsecond\n\nthird"


def test_a_folder_is_not_read_past_the_cut(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "x" * 1000)
    write(tmp_path / "b.txt", b"\xff")
    assert read(f"folder:{tmp_path}", most_kb=1) == "x" * 1000


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("held", [b"abc\xff", b"abc\xf0\x9f"], ids=["wrong", "half"])
def test_what_is_no_utf8_is_named(tmp_path: Path, kind: str, held: bytes) -> None:
    place = write(tmp_path / "bad.txt", held)
    with pytest.raises(InputError) as caught:
        read(f"{kind}:{place if kind == 'file' else tmp_path}")
    assert caught.value.key == "nodes.a.text"
    assert caught.value.found == f"byte 3 of {place} that is no UTF-8"


def test_the_text_column_of_a_table_is_found(tmp_path: Path) -> None:
    both = parquet(tmp_path / "both.parquet", title=["t", "u"], text=["one", None], n=[1, 2])
    only = parquet(tmp_path / "only.parquet", prose=["two", "three"], n=[1, 2])
    coded = parquet(tmp_path / "coded.parquet", prose=pa.array(["x", "y"]).dictionary_encode())
    assert read(f"parquet:{both}") == "one"
    assert read(f"parquet:{both}", column="title") == "t\n\nu"
    assert read(f"parquet:{only}") == "two\n\nthree"
    assert read(f"parquet:{coded}") == "x\n\ny"


def test_parquet_files_of_a_folder_or_pattern_come_in_order(tmp_path: Path) -> None:
    for k in (2, 0, 1):
        parquet(tmp_path / f"{k}.parquet", text=[f"part {k}"])
    assert read(f"parquet:{tmp_path}") == "part 0\n\npart 1\n\npart 2"
    assert read(f"parquet:{tmp_path}/[01].parquet") == "part 0\n\npart 1"


@pytest.mark.parametrize(
    ("columns", "wanted", "found"),
    [
        ({"n": [1]}, None, "0 columns with strings"),
        ({"a": ["x"], "b": ["y"]}, None, "2 columns with strings"),
        ({"a": ["x"], "n": [1]}, "n", "no column 'n' with strings"),
        ({"a": ["x"]}, "b", "no column 'b' with strings"),
    ],
)
def test_a_table_without_the_text_column_is_refused(
    tmp_path: Path, columns: Any, wanted: str | None, found: str
) -> None:
    place = parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(InputError, match=rf"text\.column: found {found} in {place}"):
        read(f"parquet:{place}", column=wanted)


@pytest.mark.parametrize(
    "source",
    [
        *("", "manual", "python:", "python:poems", "text:a", "file:{}", "file:{}/no.txt"),
        *("file:{}/blank.txt", "folder:{}/no", "folder:{}/empty", "parquet:{}/no.parquet"),
        *("parquet:{}/blank.txt", "parquet:{}/***"),
    ],
)
def test_a_source_with_nothing_in_it_is_refused(tmp_path: Path, source: str) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "blank.txt", " \n\n")
    with pytest.raises(InputError, match=r"^nodes\.a\.text: found"):
        read(source.format(tmp_path))


HUB_PROGRAM = """
import json, sys
from hansa.data.text import TextOptions, read_text
from hansa.errors import InputError
answers = []
for source, options in json.load(sys.stdin):
    try:
        answers.append(read_text(source, TextOptions(**options)))
    except InputError as error:
        answers.append(str(error))
json.dump(answers, sys.stdout)
"""


def test_a_hub_data_set_is_read_split_by_split(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    held = tmp_path / "held"
    parquet(held / "train.parquet", prose=["öne", None, "two"], n=[1, 2, 3])
    parquet(held / "test.parquet", prose=["three"], n=[4])
    questions: list[Any] = [
        (f"hub:{held}", {}),
        (f"hub:{held}", {"hub_split": "test"}),
        (f"hub:{held}", {"column": "n"}),
        ("hub:nobody/nothing", {}),
    ]
    done = subprocess.run(  # in a process of its own, which reaches no network
        [sys.executable, "-c", HUB_PROGRAM],
        input=json.dumps(questions),
        env={
            **os.environ,
            "HF_HOME": str(tmp_path / "home"),
            "HF_DATASETS_CACHE": str(tmp_path / "home" / "datasets"),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    whole, test, column, missing = json.loads(done.stdout)
    assert whole == "öne\n\ntwo"
    assert test == "three"
    assert column.startswith("text.column: found no column 'n' with strings")
    assert missing.startswith("text: found 'hub:nobody/nothing' that could not be loaded")


def test_a_missing_hub_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install hansa\[hub\]"):
        read("hub:some/text")


def test_sequences_and_splits_by_hand() -> None:
    client = numbered(62, context=2, spans=2, validation=0.2, test=0.2)
    # 20 sequences of 3 tokens, two tokens over; spans of 10 sequences: 6, 2 and 2.
    assert rows(client) == {
        "train": [[3 * k, 3 * k + 1, 3 * k + 2] for k in [*range(6), *range(10, 16)]],
        "validation": [[18, 19, 20], [21, 22, 23], [48, 49, 50], [51, 52, 53]],
        "test": [[24, 25, 26], [27, 28, 29], [54, 55, 56], [57, 58, 59]],
    }
    assert client.inputs.dtype == client.labels.dtype == torch.int64
    assert client.inputs.shape == client.labels.shape == (20, 2)


def test_small_shares_are_met_over_spans_that_are_short() -> None:
    client = numbered(120, context=2, spans=10, validation=0.1, test=0.1)
    # 40 sequences; a tenth of a span of 4 would round to none.
    assert {split: client.count(split) for split in SPLITS} == {
        "train": 32,
        "validation": 4,
        "test": 4,
    }


def test_all_splits_see_all_of_a_text() -> None:
    text = "".join(letter * 1000 for letter in "abcdefghij")
    client = pack({"a": text}, TextOptions(context=9), ByteTokenizer())["a"]
    for split in SPLITS:
        counts = np.unique(client.batch(split)[0].numpy(), return_counts=True)[1]
        assert len(counts) == 10
        assert counts.max() == counts.min()


@settings(max_examples=200, deadline=None)
@given(
    num=st.integers(3, 120),
    context=st.integers(2, 6),
    spans=st.integers(1, 30),
    validation=st.floats(0, 0.95),
    test=st.floats(0, 0.95),
)
def test_every_token_is_in_one_split_at_most(
    num: int, context: int, spans: int, validation: float, test: float
) -> None:
    if validation + test >= 0.99:
        return
    try:
        client = numbered(num, context=context, spans=spans, validation=validation, test=test)
    except InputError:
        return
    held = [token for split in rows(client).values() for row in split for token in row]
    whole = num // (context + 1)
    assert sorted(held) == list(range(whole * (context + 1)))
    for split, share in (("validation", validation), ("test", test)):
        assert abs(client.count(split) - share * whole) <= 1.001  # type: ignore[arg-type]
    for split in SPLITS:
        assert np.all(np.diff(client.splits[split]) > 0)


def test_a_client_of_text_is_saved_and_loaded(tmp_path: Path) -> None:
    client = numbered(90, context=2)
    client.save(tmp_path / "client")
    again = Client.load(tmp_path / "client")
    assert rows(again) == rows(client)
    assert again.inputs.dtype == torch.int64


def test_the_splits_of_one_node_do_not_depend_on_the_others() -> None:
    texts = {"a": "some text " * 40, "b": "other text " * 50}
    both = pack(texts, TextOptions(context=4), ByteTokenizer())
    one = pack({"b": texts["b"]}, TextOptions(context=4), ByteTokenizer())
    assert rows(both["b"]) == rows(one["b"])


@pytest.mark.parametrize(
    ("num", "least", "found"),
    [
        (8, 1, "0 sequences of 8 tokens for train"),
        (9 * 20, 17, "16 sequences of 8 tokens for train"),
        (9 * 4, 1, "0 sequences of 8 tokens for test|0 sequences of 8 tokens for validation"),
    ],
)
def test_too_short_a_text_is_named(num: int, least: int, found: str) -> None:
    with pytest.raises(InputError, match=rf"nodes\.b\.text: found ({found})"):
        pack({"b": "x" * num}, TextOptions(context=8), ByteTokenizer(), least)


def test_no_share_needs_no_text() -> None:
    client = numbered(27, context=8, validation=0, test=0)
    assert client.count("train") == 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "root.txt", "the root of the tree is a root " * 60)
    write(tmp_path / "a.txt", "eine Größe für alle Füße " * 80)
    write(tmp_path / "b.txt", "zzyzx qoph vext " * 100)
    return tmp_path


def federated(
    folder: Path, *names: str, root: str | None = "root", batch_size: int = 2, **options: Any
) -> FederatedData:
    sources = {name: f"file:{folder}/{name}.txt" for name in names}
    options = {"context": 8, **options}
    return federate_text(TextOptions(**options), sources, root, batch_size, 0)


def test_a_federation_of_bytes(folder: Path) -> None:
    data = federated(folder, "a", "b", root=None)
    assert list(data.clients) == ["a", "b"]
    assert data.shape == (8,)
    assert len(data.classes) == 256
    assert data.classes[255] == "255"
    assert isinstance(data.tokenizer, ByteTokenizer)
    held = "eine Größe für alle Füße ".encode()
    assert data.clients["a"].batch("train")[0][0].tolist() == list(held[:8])
    assert data.clients["a"].batch("train")[1][0].tolist() == list(held[1:9])


def test_an_encoding_is_trained_on_the_roots_text_alone(folder: Path) -> None:
    data = federated(folder, "a", "root", "b", tokenizer="bpe", vocabulary=280)
    other = federated(folder, "root", tokenizer="bpe", vocabulary=280)
    expected = train_bpe((folder / "root.txt").read_text(), 280)
    assert isinstance(data.tokenizer, BPE)
    assert data.tokenizer.as_json() == expected.as_json()
    assert other.tokenizer is not None
    assert other.tokenizer.as_json() == expected.as_json()
    assert len(data.classes) == expected.size
    # What the root's text does not hold comes byte by byte.
    assert data.clients["b"].batch("train")[0].max() < 256


@pytest.mark.parametrize("root", [None, "root"])
def test_an_encoding_needs_text_at_the_root(folder: Path, root: str | None) -> None:
    with pytest.raises(InputError, match=r"^text\.tokenizer: found 'bpe' and no text at the root"):
        federated(folder, "a", "b", root=root, tokenizer="bpe")


def test_less_than_a_batch_is_named(folder: Path) -> None:
    count = federated(folder, "a", "b").clients["b"].count("train")
    assert federated(folder, "a", "b", batch_size=count).shape == (8,)
    with pytest.raises(InputError) as caught:
        federated(folder, "a", "b", batch_size=count + 1)
    assert str(caught.value) == (
        f"nodes.b.text: found {count} sequences of 8 tokens for train; "
        f"allowed: text for at least one batch, which is {count + 1}"
    )


def test_a_source_that_cannot_be_read_is_named_by_its_node(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^nodes\.c\.text: found no file"):
        federated(folder, "a", "c")


def test_the_fingerprint_sees_text_splits_names_and_tokens(folder: Path) -> None:
    options: dict[str, Any] = {"tokenizer": "bpe", "vocabulary": 260}
    plain = federated(folder, "root", "b", **options).fingerprint
    assert len(plain) == 64
    assert federated(folder, "root", "b", **options).fingerprint == plain
    seen = {plain}
    seen.add(federated(folder, "root", "b", **options, spans=9).fingerprint)
    seen.add(federated(folder, "root", "b", **options, context=9).fingerprint)
    seen.add(federated(folder, "root", "b", tokenizer="bpe", vocabulary=261).fingerprint)
    seen.add(federated(folder, "root", "b").fingerprint)
    (folder / "c.txt").write_bytes((folder / "b.txt").read_bytes())
    seen.add(federated(folder, "root", "c", **options).fingerprint)
    write(folder / "b.txt", "Zzyzx qoph vext " + "zzyzx qoph vext " * 99)
    seen.add(federated(folder, "root", "b", **options).fingerprint)
    assert len(seen) == 7


@pytest.mark.parametrize(
    "options",
    [
        {"validation": 0.5, "test": 0.5},
        {"context": 1},
        {"vocabulary": 256},
        {"spans": 0},
        {"most_kb": 0},
        {"tokenizer": "words"},
        {"tokeniser": "bytes"},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TextOptions(**options)


FIRST, SECOND = "a" * 1003, "b" * 1500


def test_an_exchange_of_nothing_and_of_all() -> None:
    assert exchanged(FIRST, SECOND, 0) == (FIRST, SECOND)
    assert exchanged(FIRST, SECOND, 1) == ("b" * 1003, "a" * 1003 + "b" * 497)
    assert exchanged(SECOND, FIRST, 1) == ("a" * 1003 + "b" * 497, "b" * 1003)
    assert exchanged("", SECOND, 1) == ("", SECOND)


@pytest.mark.parametrize("share", [0.003, 0.05, 0.33, 0.5, 0.8, 0.999])
def test_an_exchange_meets_its_share_place_for_place(share: float) -> None:
    first, second = exchanged(FIRST, SECOND, share)
    assert (len(first), len(second)) == (1003, 1500)
    # A span is swapped in whole characters, and spans differ by one.
    assert abs(first.count("b") - share * 1003) <= 2
    assert all({x, y} == {"a", "b"} for x, y in zip(first, second, strict=False))
    assert second[1003:] == SECOND[1003:]


def test_a_larger_share_swaps_what_a_smaller_one_does() -> None:
    swapped = [
        {k for k, letter in enumerate(exchanged(FIRST, SECOND, share)[0]) if letter == "b"}
        for share in np.linspace(0, 1, 30)
    ]
    assert all(less < more for less, more in pairwise(swapped))


def test_an_exchange_swaps_back() -> None:
    first, second = bundled("manual", most=5000), bundled("tables", most=5000)
    assert exchanged(*exchanged(first, second, 0.37), 0.37) == (first, second)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_an_exchange_meets_each_split_alike(share: float) -> None:
    text = exchanged("a" * 100_000, "b" * 100_000, share)[0]
    client = pack({"a": text}, TextOptions(context=9), ByteTokenizer())["a"]
    for split, tolerance in (("train", 0.02), ("validation", 0.06), ("test", 0.06)):
        swapped = (client.batch(split)[0] == ord("b")).float().mean()  # type: ignore[arg-type]
        assert abs(float(swapped) - share) < tolerance


def test_an_exchange_is_of_whole_spans() -> None:
    text = exchanged("a" * 5000, "b" * 5000, 0.5)[0]
    runs = sum(x != y for x, y in pairwise(text)) + 1
    assert SPANS // 2 <= runs <= SPANS + 1


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="is not between 0 and 1"):
        exchanged("a", "b", share)

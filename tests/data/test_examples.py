import datetime
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hansa.data.examples import STATS, Example, Fields, read_examples, write_jsonl
from hansa.errors import InputError

KEY = "nodes.a.examples"
TEXTS = st.text(max_size=20)  # without lone surrogates, but with every end of a line
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
EXTRAS = st.dictionaries(TEXTS.filter(lambda name: name not in Fields().names()), VALUES)


def lines(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def refused(source: str, fields: Fields | None = None) -> str:
    with pytest.raises(InputError) as error:
        read_examples(source, KEY, fields or Fields())
    assert error.value.key == KEY
    return str(error.value)


def test_a_record_becomes_an_example(tmp_path: Path) -> None:
    held = lines(
        tmp_path / "a.jsonl",
        {"question": "Who?", "answer": "Ada", "tags": [1, {"a": None}]},
        {"id": 7, "question": "", "answer": "", "domain": "d", "fact": None, "kind": "cut"},
    )
    assert read_examples(f"jsonl:{held}", KEY, Fields()) == [
        Example("0", "Who?", "Ada", extra={"tags": [1, {"a": None}]}),
        Example("7", "", "", domain="d", kind="cut"),
    ]


def test_fields_may_have_other_names(tmp_path: Path) -> None:
    held = lines(tmp_path / "a.jsonl", {"q": "Who?", "a": "Ada", "pubid": "x", "question": 3})
    fields = Fields(question="q", answer="a", id="pubid")
    (example,) = examples = read_examples(f"jsonl:{held}", KEY, fields)
    assert example == Example("x", "Who?", "Ada", extra={"question": 3})
    again = tmp_path / "b.jsonl"
    write_jsonl(again, examples, None, fields)
    assert json.loads(again.read_text()) == {"q": "Who?", "a": "Ada", "pubid": "x", "question": 3}
    with pytest.raises(InputError, match="another field 'question'"):
        write_jsonl(again, examples, None)


def test_names_of_fields_differ() -> None:
    with pytest.raises(ValidationError, match="two fields of one name"):
        Fields(question="text", answer="text")
    with pytest.raises(ValidationError):
        Fields(answer="")


@given(
    st.lists(st.tuples(TEXTS, TEXTS, TEXTS, TEXTS, EXTRAS), min_size=1, max_size=5),
    st.sampled_from(["", "clean", "cut"]),
)
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], kind: str
) -> None:
    examples = [
        Example(f"ü{k}", question, answer, domain, fact, kind, extra)
        for k, (question, answer, domain, fact, extra) in enumerate(rows)
    ]
    path = tmp_path_factory.mktemp("held") / "a.jsonl"
    write_jsonl(path, examples, None)
    assert read_examples(f"jsonl:{path}", KEY, Fields()) == examples
    assert path.read_bytes().count(b"\n") == len(examples)
    write_jsonl(path, examples, {one.id: {"ifd": 0.5} for one in examples})
    assert [
        {key: value for key, value in one.extra.items() if key != STATS}
        for one in read_examples(f"jsonl:{path}", KEY, Fields())
    ] == [{key: value for key, value in one.extra.items() if key != STATS} for one in examples]


def test_stats_join_those_of_the_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    examples = [
        Example("a", "q", "r", extra={STATS: {"words": 1}, "when": datetime.date(2026, 1, 2)}),
        Example("b", "q", "r", extra={"n": [{"x": math.inf}]}),
        Example("c", "q", "r"),
    ]
    write_jsonl(path, examples, {"a": {"ifd": 0.25}, "b": {"ifd": math.nan, "ira": 1.0}})
    first, second, third = (json.loads(line) for line in path.read_text().splitlines())
    assert first[STATS] == {"words": 1, "ifd": 0.25}
    assert first["when"] == "2026-01-02"
    assert second[STATS] == {"ifd": None, "ira": 1.0}
    assert second["n"] == [{"x": None}]
    assert third == {"id": "c", "question": "q", "answer": "r"}


def test_all_lines_have_the_same_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [Example("a", "", "", kind="clean"), Example("b", "", "")], None)
    names = [set(json.loads(line)) for line in path.read_text().splitlines()]
    assert names == [{"id", "question", "answer", "kind"}] * 2


@pytest.mark.parametrize(
    ("examples", "found"),
    [
        ([Example("a", "", ""), Example("a", "", "")], "ids that repeat"),
        ([Example("a", "", "\ud800")], "lone surrogate"),
    ],
)
def test_what_cannot_be_written_leaves_the_file_as_it_was(
    tmp_path: Path, examples: list[Example], found: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("before")
    with pytest.raises(InputError, match=found):
        write_jsonl(path, examples, None)
    assert path.read_text() == "before"


def test_too_deep_a_record_is_not_written(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(200_000):
        deep = [deep]
    with pytest.raises(InputError, match="nested too deep"):
        write_jsonl(tmp_path / "a.jsonl", [Example("a", "", "", extra={"deep": deep})], None)
    while deep:  # or freeing it would nest as deep
        deep = deep[0]


def test_files_of_a_folder_are_read_in_order(tmp_path: Path) -> None:
    lines(tmp_path / "b.jsonl", {"question": "3", "answer": ""})
    lines(tmp_path / "a.jsonl", *({"question": str(k), "answer": ""} for k in range(3)))
    lines(tmp_path / "c.json", {"question": "no", "answer": ""})
    for place in (tmp_path, tmp_path / "*.jsonl"):
        examples = read_examples(f"jsonl:{place}", KEY, Fields())
        assert [(one.id, one.question) for one in examples] == [
            ("0", "0"), ("1", "1"), ("2", "2"), ("3", "3")
        ]  # fmt: skip


def test_marks_and_empty_lines_are_no_records(tmp_path: Path) -> None:
    held = tmp_path / "a.jsonl"
    held.write_bytes(b'\xef\xbb\xbf{"question": "a", "answer": "\xe2\x80\xa8"}\r\n\r\n\n')
    assert read_examples(f"jsonl:{held}", KEY, Fields()) == [Example("0", "a", "\u2028")]


GOOD = b'{"question": "", "answer": ""}\n'


@pytest.mark.parametrize(
    ("held", "found"),
    [
        (GOOD + b"{", "line 2 of"),
        (GOOD + b"\n[1]", "list as line 3 of"),
        (GOOD + b'"\xff"', "line 2 of"),
        (b"[" * 200_000, "line 1 of"),
        (b'{"a": ' * 200_000, "nested too deep"),
        (b"9" * 10_000, "line 1 of"),
        (b'{"question": "\\ud83d", "answer": ""}', "lone surrogate"),
        (b'{"question": "", "answer": "", "x": {"\\udc00": 1}}', "lone surrogate"),
        (b'{"question": ""}', "no field 'answer' in line 1"),
        (b'{"question": "", "answer": null}', "NoneType as 'answer' in line 1"),
        (b'{"question": ["a"], "answer": ""}', "list as 'question' in line 1"),
        (b'{"question": "", "answer": "", "kind": 3}', "another name for fields.kind"),
        (b'{"question": "", "answer": "", "id": true}', "bool as 'id'"),
        (GOOD + b'{"question": "", "answer": "", "id": "0"}', "the id '0' both in line 1"),
        (b"\n", "no record"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, held: bytes, found: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(held)
    assert found in refused(f"jsonl:{path}")


@pytest.mark.parametrize(
    "source", ["jsonl", "jsonl:", "csv:a", "", "jsonl:/nowhere/a", "jsonl:\0", "parquet:/nowhere/a"]
)
def test_a_wrong_source_is_named(source: str) -> None:
    refused(source)


def test_a_folder_without_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    assert "no JSON lines" in refused(f"jsonl:{tmp_path}")


def test_whole_pairs_of_surrogates_are_characters(tmp_path: Path) -> None:
    held = lines(tmp_path / "a.jsonl", {"question": "🧑", "answer": ""})
    assert b"\\ud83e" in held.read_bytes()
    assert read_examples(f"jsonl:{held}", KEY, Fields())[0].question == "🧑"


def test_parquet_files_are_read_with_all_their_columns(tmp_path: Path) -> None:
    table = pa.table(
        {
            "question": pa.array(["a", "b"]).dictionary_encode(),
            "answer": ["c", ""],
            "domain": ["x", None],
            "n": [math.nan, 2.0],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table, tmp_path / "b.parquet")
    examples = read_examples(f"parquet:{tmp_path}", KEY, Fields())
    assert [one.id for one in examples] == ["0", "1", "2", "3"]
    assert examples[3] == Example("3", "b", "", extra={"n": 2.0})
    assert examples[2].domain == "x"
    write_jsonl(tmp_path / "a.jsonl", examples, None)
    again = read_examples(f"jsonl:{tmp_path / 'a.jsonl'}", KEY, Fields())
    assert again[0].extra == {"n": None}
    assert again[1] == examples[1]


def test_a_wrong_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    assert "cannot be read" in refused(f"parquet:{path}")
    pq.write_table(pa.table({"question": ["a"], "text": ["b"]}), path)
    assert "no column 'answer'" in refused(f"parquet:{path}")
    pq.write_table(pa.table({"question": ["a", None], "answer": ["b", "c"]}), path)
    assert "NoneType as 'question' in row 2 of" in refused(f"parquet:{path}")
    pq.write_table(pa.table({"question": ["a"], "answer": pa.array([1], pa.int8())}), path)
    assert "int as 'answer' in row 1 of" in refused(f"parquet:{path}")
    no_text = pa.Array.from_buffers(
        pa.string(), 1, pa.array([b"\xff"], pa.binary()).buffers()
    )  # bytes that are no UTF-8 under a type that promises it
    pq.write_table(pa.table({"question": no_text, "answer": ["a"]}), path)
    assert "cannot be read" in refused(f"parquet:{path}")


HUB_PROGRAM = """
import json, sys
from hansa.data.examples import Fields, read_examples
from hansa.errors import InputError
answers = []
for source, fields in json.load(sys.stdin):
    try:
        examples = read_examples(source, "data.source", Fields(**fields))
        answers.append([vars(one) for one in examples])
    except InputError as error:
        answers.append(str(error))
json.dump(answers, sys.stdout)
"""


def test_a_hub_data_set_is_read_split_by_split(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    held = tmp_path / "held"
    held.mkdir()
    pq.write_table(pa.table({"question": ["ö"], "answer": ["a"], "n": [1]}), held / "train.parquet")
    pq.write_table(pa.table({"question": ["b"], "answer": ["c"], "n": [2]}), held / "test.parquet")
    asked: list[Any] = [
        (f"hub:{held}", {}),
        (f"hub:{held}", {"hub_split": "test"}),
        (f"hub:{held}", {"answer": "reply"}),
        ("hub:nobody/nothing", {}),
    ]
    done = subprocess.run(  # in a process of its own, which reaches no network
        [sys.executable, "-c", HUB_PROGRAM],
        input=json.dumps(asked),
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
    train, test, column, missing = json.loads(done.stdout)
    assert [(one["question"], one["answer"], one["extra"]) for one in train] == [
        ("ö", "a", {"n": 1})
    ]
    assert [one["question"] for one in test] == ["b"]
    assert column.startswith("data.source: found no column 'reply'")
    assert missing.startswith("data.source: found 'hub:nobody/nothing' that could not be loaded")


def test_a_missing_hub_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install hansa[hub]" in refused("hub:some/text")

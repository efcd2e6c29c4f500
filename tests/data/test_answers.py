"""Questions with answers become sequences: what is learned of them, and whose they are."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import hansa
from hansa.config import load
from hansa.data.answers import (
    AnswerOptions,
    Answers,
    blank_prompt,
    federate_answers,
    pack_examples,
)
from hansa.data.clients import IGNORED, SPLITS
from hansa.data.corruption import Corruption
from hansa.data.examples import Example, Fields
from hansa.data.made_examples import make
from hansa.data.tokenizer import BPE, ByteTokenizer
from hansa.errors import InputError
from hansa.training import read_data

Record = dict[str, Any]
SHARES = {"test": 0.25, "validation": 0.1}


def write(path: Path, records: Sequence[Record]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"jsonl:{path}"


def records(num: int, name: str = "a") -> list[Record]:
    return [{"question": f"{name} {k}?", "answer": f"it is {k}"} for k in range(num)]


def federated(sources: dict[str, str], **changes: Any) -> Answers:
    options = {
        "leaves": [name for name in sources if name != "root"],
        "context": 24,
        "shares": SHARES,
        "batch_size": 2,
        "seed": 3,
        **changes,
    }
    return federate_answers(options.pop("options", AnswerOptions()), sources, "root", **options)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    return {name: write(tmp_path / f"{name}.jsonl", records(20, name)) for name in "ab"}


def texts(data: Answers, name: str, split: str) -> list[str]:
    """Return the sequences of a split as text, their padding included."""
    inputs, _ = data.clients[name].batch(split)  # type: ignore[arg-type]
    return [bytes(row.tolist()).decode() for row in inputs]


# Sequences.


def test_a_sequence_by_hand() -> None:
    options = AnswerOptions(prompt="Q{question}A", end=".")
    packed = pack_examples([Example("0", "hi", "yo")], options, 8, ByteTokenizer())
    assert bytes(packed.inputs[0].tolist()) == b"QhiAyo\0\0"
    wanted = [IGNORED] * 3 + [*b"yo."] + [IGNORED] * 2
    assert packed.labels[0].tolist() == wanted
    assert blank_prompt(options, ByteTokenizer()) == tuple(b"QA")


@settings(max_examples=50, deadline=None)
@given(question=st.text(max_size=9), answer=st.text(max_size=9), end=st.sampled_from("\n.§"))
def test_answers_and_their_ends_are_learned_and_nothing_else(
    question: str, answer: str, end: str
) -> None:
    options, example = AnswerOptions(end=end), Example("0", question, answer)
    packed = pack_examples([example], options, 100, ByteTokenizer())
    if not answer.strip():
        assert packed.excluded == {"empty": 1}
        return
    inputs, labels = packed.inputs[0], packed.labels[0]
    counted = labels >= 0
    assert bytes(labels[counted].tolist()) == (answer + end).encode()
    # Where a label is counted, the input behind it is the same token: they are shifted by one.
    places = counted.nonzero().flatten().tolist()
    assert all(inputs[k + 1] == labels[k] for k in places[:-1])
    assert bytes(inputs[: places[0] + 1].tolist()) == options.prompted(question).encode()
    assert set(labels[~counted].tolist()) <= {IGNORED}


def test_what_does_not_fit_is_left_out_and_counted() -> None:
    examples = [
        Example("fits", "", "x" * 9),  # "\n" + 9 + "\n": 11 tokens, of which 10 are inputs
        Example("long", "", "x" * 10),
        Example("long question", "y" * 10, "x"),
        Example("empty", "what?", ""),
        Example("blank", "what?", " \n\t"),
    ]
    packed = pack_examples(examples, AnswerOptions(), 10, ByteTokenizer())
    assert [one.id for one in packed.examples] == ["fits"]
    assert packed.excluded == {"long": 2, "empty": 2}
    assert packed.labels[0].tolist() == [*b"x" * 9, *b"\n"]


def test_a_question_is_put_in_as_it_is() -> None:
    options = AnswerOptions(prompt="<{question}>")
    assert options.prompted("{question} \\1 {x}") == "<{question} \\1 {x}>"


@pytest.mark.parametrize("prompt", ["{question}", "nothing", "{question}{question}!", ""])
def test_a_prompt_has_one_place_and_something_beside_it(prompt: str) -> None:
    with pytest.raises(ValidationError, match="a text around one"):
        AnswerOptions(prompt=prompt)


# Splits.


def test_splits_have_exact_sizes_and_share_nothing(sources: dict[str, str]) -> None:
    data = federated(sources)
    for name in "ab":
        held = {split: texts(data, name, split) for split in SPLITS}
        assert {split: len(rows) for split, rows in held.items()} == {
            "train": 13,
            "validation": 2,
            "test": 5,
        }
        together = [row for rows in held.values() for row in rows]
        assert len(set(together)) == 20
        assert all(row.startswith(f"{name} ") for row in together)
        assert [e.question for e in data.examples[name]] == [
            row.partition("\n")[0] for row in held["train"]
        ]


def test_splits_are_drawn_by_client_and_seed(sources: dict[str, str], tmp_path: Path) -> None:
    tested = {
        seed: [
            {row.split("\n")[0].removeprefix(f"{name} ") for row in texts(data, name, "test")}
            for name in "ab"
        ]
        for seed in (3, 4)
        for data in [federated(sources, seed=seed)]
    }
    assert tested[3][0] != tested[3][1]  # a shuffle of each one's own
    assert tested[3] != tested[4]
    alone = federated({"b": sources["b"]})
    assert texts(alone, "b", "test") == texts(federated(sources), "b", "test")


def test_the_same_data_have_the_same_fingerprint(sources: dict[str, str]) -> None:
    first, again = federated(sources), federated(sources)
    assert first.fingerprint == again.fingerprint
    for name in "ab":
        assert torch.equal(first.clients[name].inputs, again.clients[name].inputs)
        assert first.examples[name] == again.examples[name]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 4},
        {"context": 25},
        {"shares": {"test": 0.3}},
        {"options": AnswerOptions(prompt="{question}:")},
        {"options": AnswerOptions(end=".")},
        {"options": AnswerOptions(corruption=Corruption(shares=0.1))},
        {"options": AnswerOptions(fields=Fields(question="answer", answer="question"))},
    ],
    ids=["seed", "context", "shares", "prompt", "end", "corruption", "fields"],
)
def test_whatever_changes_the_samples_changes_the_fingerprint(
    sources: dict[str, str], changes: dict[str, Any]
) -> None:
    assert federated(sources, **changes).fingerprint != federated(sources).fingerprint


def test_another_answer_changes_the_fingerprint(sources: dict[str, str], tmp_path: Path) -> None:
    before = federated(sources).fingerprint
    changed = records(20)
    changed[7]["answer"] = "it is 8"
    write(tmp_path / "a.jsonl", changed)
    assert federated(sources).fingerprint != before
    write(tmp_path / "a.jsonl", records(20))
    assert federated(sources).fingerprint == before


# Corruption.


def test_corruption_is_of_training_examples_of_leaves_alone() -> None:
    asked = AnswerOptions(corruption=Corruption(shares=0.5, kinds=("noise", "delete")))
    sources = {name: f"made:lab?num=20&seed={k}" for k, name in enumerate(["root", "a", "b"])}
    clean, spoiled = (
        federated(sources, options=options, context=160) for options in (AnswerOptions(), asked)
    )
    changed = {
        (name, split): sum(
            one != two
            for one, two in zip(texts(clean, name, split), texts(spoiled, name, split), strict=True)
        )
        for name in sources
        for split in SPLITS
    }
    assert changed.pop(("a", "train")) == changed.pop(("b", "train")) == 7  # half of 13, upwards
    assert set(changed.values()) == {0}
    for name in "ab":
        kinds = [one.kind for one in spoiled.examples[name]]
        assert {kind: kinds.count(kind) for kind in kinds} in (
            {"clean": 6, "noise": 4, "delete": 3},
            {"clean": 6, "noise": 3, "delete": 4},
        )
    assert {one.kind for one in spoiled.examples["root"]} == {"clean"}


def test_corruption_has_a_seed_of_its_own() -> None:
    sources = {"a": "made:lab?num=20"}
    asked = Corruption(shares=0.5, kinds=("noise",))
    found = [
        [one.kind for one in federated(sources, options=options, context=160).examples["a"]]
        for options in (
            AnswerOptions(corruption=asked),
            AnswerOptions(corruption=replace_seed(asked, 3)),
            AnswerOptions(corruption=replace_seed(asked, 4)),
        )
    ]
    assert found[0] == found[1] != found[2]


def replace_seed(asked: Corruption, seed: int) -> Corruption:
    return asked.model_copy(update={"seed": seed})


# Tokens.


def test_byte_pairs_are_learned_from_the_root_alone(tmp_path: Path) -> None:
    mine = write(tmp_path / "root.jsonl", records(20, "public"))
    held = []
    for word in ("secret", "hidden"):
        own = write(tmp_path / "a.jsonl", records(20, word))
        held.append(federated({"root": mine, "a": own}, tokenizer=280).tokenizer)
    assert isinstance(held[0], BPE)
    assert held[0].as_json() == held[1].as_json()
    assert len(held[0].encode("public 1?\nit is")) < len(b"public 1?\nit is")
    assert len(held[0].encode("secret")) == len(b"secret")


def test_byte_pairs_need_examples_at_the_root(sources: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"^text\.tokenizer: found 'bpe' and no examples at"):
        federated(sources, tokenizer=280)


def test_the_tokens_of_an_answer_do_not_depend_on_its_question(tmp_path: Path) -> None:
    mine = write(tmp_path / "root.jsonl", records(20, "it is"))
    tokenizer = federated({"root": mine}, tokenizer=300, leaves=[]).tokenizer
    assert tokenizer is not None
    options = AnswerOptions(prompt="{question} it")
    asked = [Example(str(k), question, " is 5") for k, question in enumerate(("", "it is", "z"))]
    packed = pack_examples(asked, options, 24, tokenizer)
    answers = [row[row >= 0].tolist() for row in packed.labels]
    assert answers[0] == answers[1] == answers[2]


def config(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return {
        "output": str(tmp_path / "runs"),
        "rounds": 1,
        "text": {"context": 24, "tokenizer": "bpe", "vocabulary": 280, "answers": {}},
        "nodes": {
            name: {"text": write(tmp_path / f"{name}.jsonl", records(20, name))}
            for name in ("root", "a")
        },
        "model": {"options": {**small, "num_attention_heads": 2}},
        "engine": {"kind": "sequential", "workers": 1},
        "training": {"batch_size": 4},
        **changes,
    }


def test_the_tokenizer_of_a_bundle_is_taken_where_asked(tmp_path: Path) -> None:
    run = hansa.train(config(tmp_path))
    first = hansa.read_bundle(run.path / "bundle")
    (tmp_path / "leaf").mkdir()
    values = config(tmp_path / "leaf", text={"context": 24, "tokenizer": "bundle", "answers": {}})
    del values["nodes"]["root"]  # nothing to train an encoding on
    values["model"] = {**values["model"], "bundle": str(run.path / "bundle")}
    second = hansa.read_bundle(hansa.train(values).path / "bundle")
    assert len(json.loads(second.tokenizer)["model"]["merges"]) > 0
    assert first.tokenizer == second.tokenizer
    with pytest.raises(InputError, match=r"^model\.bundle: found other tokens than the run's"):
        hansa.train({**values, "text": {**values["text"], "tokenizer": "bytes"}})


def test_a_bundle_without_a_tokenizer_has_none_to_give(tmp_path: Path) -> None:
    images = hansa.train(
        {
            "output": str(tmp_path / "images"),
            "rounds": 1,
            "data": {"clients": 2, "train_per_class": 3, "test_per_class": 2},
            "model": {"options": {"hidden": [4]}},
        }
    )
    values = config(tmp_path, text={"context": 24, "tokenizer": "bundle", "answers": {}})
    with pytest.raises(InputError, match=r"^text\.tokenizer: found 'bundle' and no model\.bundle"):
        load(values)
    values["model"] = {**values["model"], "bundle": str(images.path / "bundle")}
    with pytest.raises(InputError, match=r"^text\.tokenizer: found 'bundle' and one without a tok"):
        read_data(load(values))


# Too little.


def test_left_out_examples_are_counted_over_all_splits(tmp_path: Path) -> None:
    held = [*records(16), *({"question": "", "answer": "x" * 40} for _ in range(3))]
    held.append({"question": "what?", "answer": ""})
    data = federated({"a": write(tmp_path / "a.jsonl", held)})
    assert data.excluded == {"a": {"long": 3, "empty": 1}}
    assert sum(len(index) for index in data.clients["a"].splits.values()) == 16


def test_fewer_training_examples_than_a_batch_are_refused(tmp_path: Path) -> None:
    held = [*records(3), *({"question": "", "answer": "x" * 40} for _ in range(5))]
    source = {"a": write(tmp_path / "a.jsonl", held)}
    with pytest.raises(
        InputError, match=r"^nodes\.a\.text: found 3 examples for train \(5 long were left out\)"
    ):
        federated(source, shares={}, batch_size=4)
    assert len(federated(source, shares={}, batch_size=3).examples["a"]) == 3


def test_a_split_that_is_wanted_and_empty_is_refused(tmp_path: Path) -> None:
    source = {"a": write(tmp_path / "a.jsonl", records(4))}
    with pytest.raises(InputError, match=r"^nodes\.a\.text: found 0 examples for validation"):
        federated(source, shares={"validation": 0.1})


def test_examples_keep_what_else_their_records_say(tmp_path: Path) -> None:
    held = [{**record, "source": k, "domain": "x"} for k, record in enumerate(records(8))]
    data = federated({"a": write(tmp_path / "a.jsonl", held)}, shares={})
    assert [one.extra for one in data.examples["a"]] == [{"source": k} for k in range(8)]
    assert data.examples["a"][2] == replace(
        data.examples["a"][2], id="2", question="a 2?", answer="it is 2", domain="x"
    )


def test_public_text_of_all_domains_fits_its_context() -> None:
    packed = pack_examples(make("all", 40, 0, "public"), AnswerOptions(), 160, ByteTokenizer())
    assert not packed.excluded
    assert len(packed.examples) == 40

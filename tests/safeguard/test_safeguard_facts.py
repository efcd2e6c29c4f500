"""Questions and answers as the data of a safeguard."""

import json
import shutil

import pytest
import torch

from hansa import bundle
from hansa.bundle import read_bundle
from hansa.data.answers import AnswerOptions
from hansa.data.examples import Example
from hansa.data.tokenizer import ByteTokenizer
from hansa.errors import InputError
from hansa.models.build import Architecture, build
from hansa.redteam import redteam
from hansa.safeguard.facts import Examples, asked_for_facts, examples_of, facts_of
from hansa.safeguard.rows import Rows
from hansa.safeguard.texts import Texts, TextsOptions
from hansa.safeguarding import safeguard
from tampering import SMALL, tar

ANSWERS = AnswerOptions()
PHASE = {"steps": 2, "warm_up": 1, "batch_size": 4, "lr": 1e-3}
TAMPER = tar(PHASE)
DATA = {
    "kind": "texts",
    "context": 120,
    "retain": ["made:lab?num=40", "made:drug?num=40"],
    "restricted": "made:policy?num=40&style=records",
    "answers": {},
}


def encode(text):
    return list(text.encode())


def held(*examples):
    texts = [(encode(f"{one.question}\n{one.answer}\n"), len(one.question) + 1) for one in examples]
    return Examples(Rows.padded(texts, 60), examples)


def examples(tmp_path, *records):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return examples_of([f"jsonl:{tmp_path}/a.jsonl"], "data.retain", ANSWERS, encode, 20)


def test_a_row_is_an_example_of_which_the_answer_counts(tmp_path):
    one = {"question": "who?", "answer": "the cat"}
    long = {"question": "who was it that sat there?", "answer": "the cat"}
    found = examples(tmp_path, one, one, long, {"question": "what?", "answer": " "})
    assert len(found) == len(found.rows) == 1
    assert bytes(found.rows.tokens[0, :13].tolist()) == b"who?\nthe cat\n"
    assert found.rows.mask[0].tolist() == [True] * 13 + [False] * 7
    assert found.rows.counted[0].tolist() == [False] * 5 + [True] * 8 + [False] * 7
    with pytest.raises(InputError, match=r"data\.retain: found 1 examples.*within 20 tokens"):
        examples(tmp_path, long)


def test_a_fact_is_asked_where_others_would_differ():
    facts = {"a": ["approved", "audited", "denied"], "b": ["low", "lower"]}
    first = Example("0", "q?", "It was audited, audited.", "a", "audited")
    second = Example("1", "q?", "So denied.", "a", "denied")
    third = Example("2", "q?", "low", "b", "low")
    found = asked_for_facts(held(first, second, third), facts, ANSWERS, encode, "data.retain")
    # "audited" and "approved" begin alike and count as one.
    ends = encode("\n") + encode("e")
    wanted = [sorted(encode("ad")), sorted(encode("ad")), sorted(ends)]
    assert found.candidates[:, 0].tolist() == wanted
    right = found.candidates.gather(-1, found.answers.unsqueeze(-1)).flatten().tolist()
    assert right == [*encode("a"), *encode("d"), *encode("\n")]
    asked = [row[at + 1] for row, (at,) in zip(found.rows.tokens, found.places, strict=True)]
    assert torch.stack(asked).tolist() == right


def test_what_states_no_fact_is_not_asked():
    without = Example("0", "q?", "It was.", "a", "")
    other = Example("1", "q?", "It was.", "a", "denied")
    alone = Example("2", "q?", "So high.", "c", "high")
    known = Example("3", "q?", "So denied.", "a", "denied")
    facts = {"a": ["approved", "denied"], "c": ["high"]}
    found = asked_for_facts(held(without, other, alone, known), facts, ANSWERS, encode, "data.x")
    assert len(found.rows) == 1
    with pytest.raises(InputError, match=r"data\.x: found examples without facts"):
        asked_for_facts(held(without, other, alone), facts, ANSWERS, encode, "data.x")
    assert facts_of([known, known, other, without]) == {"a": ["denied"]}


def test_parts_share_nothing_and_are_the_same_wherever_they_lie(tmp_path):
    first = Texts(TextsOptions.model_validate(DATA), encode, 256)
    sizes = {name: len(part) for name, part in first._parts.items()}
    assert sizes == {
        "retain": 72, "retained": 8, "adversary": 18, "held_out": 6, "attacker": 8, "restricted": 8,
    }  # fmt: skip
    questions = first.questions()
    assert len(questions["restricted"].rows) == 8
    assert len(questions["retained"].rows) == 8
    lines = [
        {"question": one.question, "answer": one.answer, "domain": one.domain, "fact": one.fact}
        for part in ("adversary", "held_out", "attacker", "restricted")
        for one in first._examples[part].held
    ]
    prints = set()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        text = "\n".join(json.dumps(line) for line in lines)
        (tmp_path / name / "a.jsonl").write_text(text)
        data = {**DATA, "restricted": f"jsonl:{tmp_path}/{name}/a.jsonl"}
        prints.add(Texts(TextsOptions.model_validate(data), encode, 256).fingerprint())
    assert len(prints) == 1
    data = {**DATA, "attacker": DATA["restricted"]}
    with pytest.raises(InputError, match=r"that .* and attacker share"):
        Texts(TextsOptions.model_validate(data), encode, 256)


@pytest.fixture
def start(tmp_path):
    return write(tmp_path / "start", seed=0)


def write(path, seed, **options):
    architecture = Architecture(
        name="llama", options={**SMALL, **options}, shape=(120,), classes=256
    )
    bundle.write(
        path,
        stage="train",
        weights=build(architecture, seed).state_dict(),
        architecture=architecture.model_dump(mode="json"),
        config={},
        seed=seed,
        data="",
        metrics={},
        tokenizer=ByteTokenizer().as_json(),
    )
    return path


def values(tmp_path, start, **more):
    attack = {"name": "full", "steps": 2, "lrs": [1e-3], "batch": 2}
    return {
        "name": "asked",
        "output": str(tmp_path / "runs"),
        "model": {"path": str(start)},
        "data": DATA,
        "phases": [{"kind": "random_mapping", **PHASE}, TAMPER],
        "redteam": {"attacks": [attack], "edits": [], "seeds": [0]},
        **more,
    }


def test_a_federation_s_bundle_is_safeguarded_and_attacked_beside_one_that_never_saw(
    tmp_path, start
):
    never = write(tmp_path / "never", seed=1)
    asked = values(tmp_path, start, controls={"never": {"path": str(never)}})
    made = safeguard(asked)
    assert set(made.summary["roles"]) == {"unprotected", "before", "safeguarded", "never"}
    assert made.summary["cost_in_steps"]["never"] == 0
    other = read_bundle(made.path / made.summary["roles"]["never"])
    weights = read_bundle(never).weights
    assert all(torch.equal(value, other.weights[name]) for name, value in weights.items())
    assert other.lineage[0]["digest"] == read_bundle(never).digest
    assert made.bundle.lineage[0]["digest"] == read_bundle(start).digest
    assert [step["stage"] for step in made.bundle.lineage][-2:] == ["safeguard", "safeguard"]
    card = redteam(asked).scorecard
    assert set(card["recovery"]) == set(made.summary["roles"])
    assert 1 / 6 <= card["chance"] <= 1 / 3
    # Another model there is another control, and the safeguard stays as it is.
    shutil.rmtree(never)
    write(never, seed=2)
    again = safeguard(asked)
    assert again.bundle.digest == made.bundle.digest
    assert again.summary["roles"]["never"] != made.summary["roles"]["never"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {**DATA, "answers": {"corruption": {"shares": 0.5}}}}, "without corruption"),
        ({"data": {k: v for k, v in DATA.items() if k != "answers"}}, "one source of text each"),
        ({"data": {**DATA, "retain": []}}, r"data.*retain"),
        ({"data": {**DATA, "retain": "kept:ward"}}, r"data\.retain: found 'kept:ward'"),
        ({"data": {**DATA, "retain": "made:law"}}, r"data\.retain: found the domain 'law'"),
        ({"controls": {"never": {}}}, r"controls\.never.*phases.* or a path"),
        ({"controls": {"never": {"path": "x", "phases": [TAMPER]}}}, "or a path"),
        ({"controls": {"never": {"path": "x", "after": 1}}}, "or a path"),
        ({"controls": {"never": {"path": "/nowhere"}}}, "/nowhere"),
    ],
)
def test_wrong_input_is_named(tmp_path, start, change, message):
    with pytest.raises(InputError, match=message):
        safeguard(values(tmp_path, start, **change))


def test_a_control_of_another_kind_is_refused(tmp_path, start):
    wide = write(tmp_path / "wide", seed=0, intermediate_size=32)
    with pytest.raises(InputError, match=r"controls\.never\.path.*those of model\.path"):
        safeguard(values(tmp_path, start, controls={"never": {"path": str(wide)}}))

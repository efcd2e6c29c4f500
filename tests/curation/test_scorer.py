"""Scores as another library's data set takes them: those of the stage, row by row."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from small import config, records

import hansa
from hansa.curate import curate
from hansa.curation.masks import read_samples
from hansa.curation.scorer import NAMES, Scorer
from hansa.data.answers import AnswerOptions
from hansa.data.examples import STATS, Fields
from hansa.errors import InputError

SCORES = ("ifd", "perplexity_whole", "perplexity", "conditional_loss", "ira", "length")


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A trained model, and the configuration of a curation by it."""
    folder = tmp_path_factory.mktemp("scorer")
    values = config(folder)
    run = hansa.train({**values, "curation": None, "rounds": 1})
    values["model"]["bundle"] = str(run.path / "bundle")
    values["curation"]["scores"] = list(SCORES)
    return run.path / "bundle", values


def test_the_scores_of_a_data_set_are_those_of_the_stage(
    held: tuple[Path, dict[str, Any]],
) -> None:
    bundle, values = held
    table = read_samples(curate(values).path / "clients" / "a")
    data = Dataset.from_list(records(10, "a"))
    found = data.map(Scorer(bundle, SCORES), batched=True, batch_size=3)
    stats = dict(zip(found["id"], found[STATS], strict=True))
    assert set(found.column_names) == {"id", "question", "answer", "domain", STATS}
    for name in SCORES:
        for id_, value in zip(
            table["id"].to_pylist(), table[f"score.{name}"].to_pylist(), strict=True
        ):
            # Batches of other sizes are rounded otherwise; `ira` is a difference of two losses.
            wanted = pytest.approx(value, rel=1e-5, abs=1e-6 if name == "ira" else None)
            assert stats[id_][NAMES.get(name, name)] == wanted


def test_rows_that_cannot_be_scored_have_none(held: tuple[Path, dict[str, Any]]) -> None:
    rows = {"question": ["a", "b", None, "d"], "answer": ["x" * 40, " ", "yes", None]}
    found = Scorer(held[0], ["ifd", "length"])(rows)
    nothing = {"ifd_score": None, "length": None}
    assert [row == nothing for row in found[STATS]] == [True, True, False, True]
    assert found[STATS][2]["length"] == 3
    assert found[STATS][2]["ifd_score"] == pytest.approx(1)  # no question, so no help of one
    assert Scorer(held[0])({"question": [], "answer": []}) == {STATS: []}


def test_what_others_have_measured_stays(held: tuple[Path, dict[str, Any]]) -> None:
    rows = {
        "question": ["a", "b"],
        "answer": ["x", ""],
        STATS: [{"text_len": 1, "length": 99}, None],
    }
    assert Scorer(held[0], ["length"])(rows)[STATS] == [
        {"text_len": 1, "length": 1},
        {"length": None},
    ]


def test_fields_may_have_other_names(held: tuple[Path, dict[str, Any]]) -> None:
    options = AnswerOptions(fields=Fields(question="ask", answer="reply"))
    found = Scorer(held[0], ["length"], options)({"ask": ["a"], "reply": ["four"]})
    assert found == {STATS: [{"length": 4}]}
    with pytest.raises(InputError, match=r"no such column; allowed: question, answer"):
        Scorer(held[0], ["length"], options)({"question": ["a"], "answer": ["b"]})


@pytest.mark.parametrize("names", [[], ["ifd", "ifd"], ["bleu"], ["tracin"], ["duplicates"]])
def test_scores_of_single_examples_alone(
    held: tuple[Path, dict[str, Any]], names: list[str]
) -> None:
    with pytest.raises(InputError, match=r"^scores: found"):
        Scorer(held[0], names)


def test_a_scorer_needs_a_language_model(tmp_path: Path) -> None:
    images = hansa.train(
        {
            "output": str(tmp_path),
            "rounds": 1,
            "data": {"clients": 2, "train_per_class": 3, "test_per_class": 2},
            "model": {"options": {"hidden": [4]}},
        }
    )
    with pytest.raises(InputError, match="no language model"):
        Scorer(images.path / "bundle")
    with pytest.raises(InputError, match="no such file"):
        Scorer(tmp_path / "nowhere")


def test_a_score_is_a_number_by_itself(held: tuple[Path, dict[str, Any]]) -> None:
    """The ratio that it says it is, of the losses that it tells."""
    rows = {"question": ["a0?"], "answer": ["red 0"]}
    row = Scorer(held[0], ["ifd", "conditional_loss", "perplexity"])(rows)[STATS][0]
    assert row["ifd_score"] == pytest.approx(row["conditional_loss"] / math.log(row["perplexity"]))
    assert torch.tensor(list(row.values())).isfinite().all()

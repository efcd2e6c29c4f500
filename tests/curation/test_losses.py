"""Losses of single samples: against raw log-probabilities, one token at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BLANK, CONTEXT, PAIRS, packed, samples, task

from hansa.curation.losses import losses
from hansa.curation.scores import SCORES, Point, Sample, measure, oriented
from hansa.curation.sequences import alone, answers, spans, whole
from hansa.data.clients import IGNORED


def measured(made, pair, *names, tokens=8192):  # type: ignore[no-untyped-def]
    sample = Sample(made, made.buffers, Point(made.params), [], pair, BLANK, tokens=tokens)
    return measure(names, sample)


def log_probability(made, before: str, after: str) -> list[float]:  # type: ignore[no-untyped-def]
    """Of each byte of a text after another, from the model's raw logits, in float64."""
    text = (before + after).encode()
    with torch.no_grad():
        logits = made.materialise(made.params, made.buffers)(torch.tensor([list(text[:-1])]))[0]
    found = logits.double().log_softmax(-1)
    start = len(before.encode())
    return [float(found[k - 1, text[k]]) for k in range(start, len(text))]


def test_scores_from_raw_log_probabilities() -> None:
    made = task()
    names = ["conditional_loss", "perplexity", "perplexity_whole", "ifd", "ifd_perplexity", "ira"]
    found = measured(made, samples(), *names, "length")
    for k, (question, answer) in enumerate(PAIRS):
        given_ = log_probability(made, f"{question}\n", f"{answer}\n")
        bare = log_probability(made, "\n", f"{answer}\n")
        text = f"{question}\n{answer}\n"
        all_of_it = log_probability(made, text[0], text[1:])
        loss, loss_alone = -sum(given_) / len(given_), -sum(bare) / len(bare)
        expected = {
            "conditional_loss": loss,
            "perplexity": math.exp(loss_alone),
            "perplexity_whole": math.exp(-sum(all_of_it) / len(all_of_it)),
            "ifd": loss / loss_alone,
            "ifd_perplexity": math.exp(loss - loss_alone),
            "ira": loss_alone - loss,
            "length": len(answer),
        }
        for name, value in expected.items():
            assert float(found[name][k]) == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_padding_and_batch_size_change_nothing() -> None:
    made, (inputs, labels) = task(), samples()
    expected = losses(made, made.params, made.buffers, (inputs, labels))
    # Other tokens behind the end, and every sample alone or with longer ones.
    counted = labels >= 0
    behind = counted.int().cumsum(1) == counted.sum(1, keepdim=True)
    noise = torch.where(behind & ~counted, 77, inputs)
    for tokens in (1, 40, 8192):
        found = losses(made, made.params, made.buffers, (noise, labels), tokens)
        assert torch.allclose(found, expected, rtol=1e-5)


def test_the_question_is_no_part_of_the_loss() -> None:
    """Labels of the prompt are left out, so that another question changes the loss by attention."""
    _, labels = samples([("ab", "xyz")])
    assert labels[0].tolist() == [IGNORED] * 2 + [*b"xyz\n"] + [IGNORED] * (CONTEXT - 6)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("abc? ", max_size=9), st.text("xyz", min_size=1, max_size=9)),
        min_size=1,
        max_size=6,
    )
)
def test_sequences_are_taken_apart(pairs: list[tuple[str, str]]) -> None:
    inputs, labels = samples(pairs)
    starts, lengths = spans(labels)
    assert answers(labels) == [[*f"{answer}\n".encode()] for _, answer in pairs]
    bare, wanted = alone(labels, BLANK)
    every = whole(inputs, labels)
    for k, (question, answer) in enumerate(pairs):
        assert int(starts[k]) == len(question)
        assert int(lengths[k]) == len(answer) + 1
        text = f"\n{answer}\n".encode()
        assert bare[k, : len(text) - 1].tolist() == [*text[:-1]]
        assert wanted[k][wanted[k] >= 0].tolist() == [*text[1:]]
        text = f"{question}\n{answer}\n".encode()
        assert every[k][every[k] >= 0].tolist() == [*text[1:]]


def test_every_score_points_upward() -> None:
    values = torch.tensor([1.0, 2.0])
    for name, score in SCORES.items():
        up = bool(oriented(name, values).diff() > 0)
        assert up is (score.better == "high")


def test_near_duplicates_share_tokens_with_others() -> None:
    pair = samples([("a", "one two three"), ("b", "one two three"), ("c", "0123456789")])
    found = measured(task(), pair, "duplicates")["duplicates"].tolist()
    assert found == [1.0, 1.0, 0.0]


def test_what_has_no_answer_or_does_not_fit_is_counted() -> None:
    found = packed([("q", " "), ("q", "a" * CONTEXT), ("q", "a"), ("q" * CONTEXT, "a")])
    assert found.excluded == {"empty": 1, "long": 2}
    assert [example.id for example in found.examples] == ["2"]

"""AUROC and selections, by hand and against scikit-learn."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

from hansa.curation.measures import auroc, by_kind, selection

SMALL = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=20)


def test_auroc_by_hand() -> None:
    assert auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])) == 3.5 / 4
    assert math.isnan(auroc(torch.tensor([1.0]), torch.tensor([])))


@given(good=SMALL, bad=SMALL)
def test_auroc_agrees_with_scikit_learn(good: list[float], bad: list[float]) -> None:
    labels = [1] * len(good) + [0] * len(bad)
    expected = roc_auc_score(labels, good + bad)
    assert auroc(torch.tensor(good), torch.tensor(bad)) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_selections_agree_with_scikit_learn(pairs: list[tuple[bool, bool]]) -> None:
    kept, clean = (torch.tensor(column) for column in zip(*pairs, strict=True))
    found = selection(kept, clean)
    expected = precision_recall_fscore_support(
        clean.int(), kept.int(), average="binary", zero_division=float("nan")
    )
    for mine, theirs in zip((found.precision, found.recall), expected, strict=False):
        assert mine == pytest.approx(theirs, nan_ok=True)
    if kept.any() and clean.any():
        assert found.f1 == pytest.approx(expected[2])


def test_kinds_are_told_apart_and_unknown_ones_left_out() -> None:
    scores = torch.tensor([3.0, 4.0, 1.0, 5.0, math.nan, 9.0])
    kinds = ["clean", "clean", "cut", "noise", "cut", ""]
    assert by_kind(scores, kinds) == {"cut": 1.0, "noise": 0.0, "all": 0.5}

"""Thresholds: hand-computed levels, and what a conformal quantile promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from hansa.curation.thresholds import (
    EVERYTHING,
    Threshold,
    ThresholdOptions,
    rank,
    rank_of,
    set_threshold,
)
from hansa.errors import InputError


def level(
    options: ThresholdOptions, values: list[float], by: tuple[str, ...] = ("s",)
) -> Threshold:
    scores = dict.fromkeys(by, torch.tensor(values))
    return set_threshold(options, by, scores, torch.zeros(len(values), dtype=torch.int64))


def test_levels_by_hand() -> None:
    """Of 1 to 19 a tenth of 20 places is the 2nd, the mean 10, the mean of the first five 3."""
    values = [float(k) for k in range(1, 20)]
    assert level(ThresholdOptions(rate=0.1), values).levels == {-1: 2.0}
    assert level(ThresholdOptions(kind="anchor_mean"), values).levels == {-1: 10.0}
    assert level(ThresholdOptions(kind="anchor_mean", anchors=5), values).levels == {-1: 3.0}
    # Nine anchors can promise a tenth, eight cannot: nothing is rejected then.
    assert level(ThresholdOptions(rate=0.1), values[:9]).levels == {-1: 1.0}
    assert level(ThresholdOptions(rate=0.1), values[:8]).levels == {-1: EVERYTHING}


def test_what_is_kept_by_hand() -> None:
    threshold = level(ThresholdOptions(rate=0.1), [float(k) for k in range(1, 20)])
    scores = {"s": torch.tensor([1.9, 2.0, 30.0, math.nan, -math.inf])}
    kept = threshold.keep(scores, torch.zeros(5, dtype=torch.int64))
    assert kept.tolist() == [False, True, True, False, False]


def test_domains_have_their_own_thresholds_where_they_have_anchors_enough() -> None:
    scores = {"s": torch.cat([torch.arange(20.0), 100 + torch.arange(20.0), torch.tensor([7.0])])}
    domains = torch.tensor([0] * 20 + [1] * 20 + [2])
    options = ThresholdOptions(rate=0.1, per_domain=True)
    found = set_threshold(options, ["s"], scores, domains, ["a", "b", "few"])
    assert found.levels[0] == 1.0
    assert found.levels[1] == 101.0
    assert set(found.levels) == {-1, 0, 1}  # the third is pooled with all
    values = {"s": torch.tensor([50.0, 50.0, 50.0, 0.5])}
    kept = found.keep(values, torch.tensor([0, 1, 2, 2]))
    assert kept.tolist() == [True, False, True, False]
    with pytest.raises(InputError, match="no anchor of the domain 'none'"):
        set_threshold(options, ["s"], scores, domains, ["a", "b", "few", "none"])


def test_a_share_keeps_the_best_of_each_client() -> None:
    threshold = level(ThresholdOptions(kind="share", share=0.5), [])
    zeros = torch.zeros(5, dtype=torch.int64)
    kept = threshold.keep({"s": torch.tensor([5.0, 1.0, 3.0, math.nan, 3.0])}, zeros)
    assert kept.tolist() == [True, False, True, False, False]  # half of four; the first of equals


@settings(deadline=None)
@given(
    num=st.integers(5, 400),
    rate=st.floats(0.01, 0.5),
    confidence=st.sampled_from([None, 0.6, 0.9, 0.99]),
)
def test_the_rank_is_the_largest_that_keeps_the_promise(
    num: int, rate: float, confidence: float | None
) -> None:
    """The chance that a clean sample is rejected is Beta(k, m + 1 - k); its tail is a binomial."""
    place = rank_of(rate, num, confidence)
    assert 0 <= place <= num

    def keeps(k: int) -> bool:
        if k == 0:
            return True
        if confidence is None:
            return k / (num + 1) <= rate + 1e-9
        # P(Beta(k, m + 1 - k) <= rate) = P(Binomial(m, rate) >= k)
        return bool(binom.sf(k - 1, num, rate) >= confidence - 1e-9)

    assert keeps(place)
    assert not keeps(place + 1) or place == num


def test_the_promise_holds_in_the_long_run() -> None:
    """Over draws of 40 anchors and of clean samples, 4 in 41 are rejected."""
    rng = np.random.default_rng(0)
    rejected = []
    for _ in range(300):
        anchors = torch.from_numpy(rng.normal(size=40))
        threshold = set_threshold(
            ThresholdOptions(rate=0.1), ["s"], {"s": anchors}, torch.zeros(40, dtype=torch.int64)
        )
        clean = {"s": torch.from_numpy(rng.normal(size=200))}
        kept = threshold.keep(clean, torch.zeros(200, dtype=torch.int64))
        rejected.append(1 - float(kept.double().mean()))
    bound = threshold.bounds[-1]
    assert (bound.anchors, bound.rank) == (40, 4)
    assert bound.expected == 4 / 41
    assert abs(float(np.mean(rejected)) - bound.expected) < 4 * float(np.std(rejected)) / 300**0.5
    above = float(np.mean(np.array(rejected) > bound.upper))
    assert above < 0.05 + 4 * (0.05 * 0.95 / 300) ** 0.5 + 0.03  # 200 samples round it


def test_ranks_by_hand_and_their_combination() -> None:
    among = torch.tensor([1.0, 2.0, 2.0, 4.0], dtype=torch.float64)
    assert rank(torch.tensor([0.0, 1.0, 2.0, 3.0, 9.0]), among).tolist() == [
        0,
        0.125,
        0.5,
        0.75,
        1,
    ]
    scores = {"a": torch.arange(40.0), "b": -torch.arange(40.0)}
    found = set_threshold(
        ThresholdOptions(rate=0.1), ["a", "b"], scores, torch.zeros(40, dtype=torch.int64)
    )
    assert {name: len(each) for name, each in found.reference.items()} == {"a": 20, "b": 20}
    assert found.bounds[-1].anchors == 20
    # What one score calls best the other calls worst: all of them are in the middle.
    assert torch.allclose(found.anchors[-1], torch.full((20,), 0.5, dtype=torch.float64), atol=0.05)
    kept = found.keep(
        {"a": torch.tensor([20.0, -9.0]), "b": torch.tensor([-20.0, -99.0])},
        torch.zeros(2, dtype=torch.int64),
    )
    assert kept.tolist() == [True, False]


def test_weights_are_p_values_over_the_rate() -> None:
    threshold = level(ThresholdOptions(rate=0.5), [1.0, 2.0, 3.0, 4.0, 5.0])
    scores = {"s": torch.tensor([0.0, 1.0, 1.5, 2.0, 9.0, math.nan])}
    found = threshold.weights(scores, torch.zeros(6, dtype=torch.int64), 0.5)
    expected = [1 / 6 / 0.5, 2 / 6 / 0.5, 2 / 6 / 0.5, 1.0, 1.0, 0.0]
    assert torch.allclose(found, torch.tensor(expected))


@settings(max_examples=50)
@given(
    anchors=st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=60),
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30),
    rate=st.floats(0.05, 0.5),
)
def test_what_counts_in_full_is_what_is_kept(
    anchors: list[float], values: list[float], rate: float
) -> None:
    """A sample that is kept has a p-value above the rate, and weights never fall with the score."""
    threshold = level(ThresholdOptions(rate=rate), anchors)
    zeros = torch.zeros(len(values), dtype=torch.int64)
    scores = {"s": torch.tensor(values)}
    kept, weights = threshold.keep(scores, zeros), threshold.weights(scores, zeros, rate)
    assert bool((~kept | (weights == 1) | (threshold.levels[-1] == EVERYTHING)).all())
    higher = torch.tensor(values).argsort()
    assert bool((weights[higher].diff() >= 0).all())


@pytest.mark.parametrize(
    ("values", "what"), [([1.0] * 4, "4 anchors"), ([1.0, 2.0, math.nan, 4.0, 5.0], "anchor 2")]
)
def test_anchors_that_cannot_set_a_threshold_are_refused(values: list[float], what: str) -> None:
    with pytest.raises(InputError, match=what):
        level(ThresholdOptions(), values)


def test_more_anchors_than_there_are_are_refused() -> None:
    with pytest.raises(InputError, match="at most the 6"):
        level(ThresholdOptions(anchors=7), [1.0] * 6)

"""Attention over parameters: by hand, and what must hold whatever the numbers are."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.federation.attention import Attention, cosine, entropy, likeness
from hansa.federation.message import Tensors

SCORES = ["cosine", "centred", "dot", None]
GRANULARITIES = ["block", "tensor", "row"]
SURE = settings(deadline=None, derandomize=True, max_examples=15)
HAND = ([1.0, 0.0], [1.0, 0.0], [0.0, 1.0])
BLOCKS = {"h.0": ["h.0.w", "h.0.b"], "h.1": ["h.1.w"]}
SHAPES = {"h.0.w": (3, 4), "h.0.b": (3,), "h.1.w": (2, 2)}


def row(values: Sequence[float]) -> Tensors:
    return {"w": torch.tensor(values, dtype=torch.float64)}


def of(attention: Attention, query: Sequence[float], bank: Sequence[Sequence[float]]) -> Any:
    """Output and weights for one block of one row."""
    out, weights = attention(row(query), [row(entry) for entry in bank], {"k": ["w"]})
    return out["w"].tolist(), weights["k"].tolist()


def drawn(seed: int) -> Tensors:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


# By hand: the figures of a query (1, 0) with itself, (1, 0) and (0, 1) in the bank.


def test_the_cosine_weighs_by_direction() -> None:
    out, weights = of(Attention(temperature=1.0), HAND[0], HAND)
    assert weights == pytest.approx([0.4223, 0.4223, 0.1554], abs=5e-5)
    assert out == pytest.approx([0.8446, 0.1554], abs=5e-5)


def test_a_bank_need_not_hold_the_query() -> None:
    out, weights = of(Attention(temperature=1.0), HAND[0], HAND[1:])
    assert weights == out == pytest.approx([0.7311, 0.2689], abs=5e-5)


def test_the_inner_product_is_taken_over_the_root_of_the_length() -> None:
    _, weights = of(Attention("dot"), HAND[0], HAND)
    assert weights == pytest.approx([0.4011, 0.4011, 0.1978], abs=5e-5)


def test_a_lower_temperature_sharpens() -> None:
    _, weights = of(Attention(temperature=0.1), HAND[0], HAND[1:])
    assert weights[1] == pytest.approx(1 / (1 + math.exp(10)))
    _, weights = of(Attention(temperature=1e9), HAND[0], HAND)
    assert weights == pytest.approx([1 / 3] * 3)


def test_the_centred_cosine_is_about_the_banks_mean() -> None:
    """The bank's mean is (6, 1): the others stand at (-1, 1), (-1, -1) and (2, 0) about it."""
    bank = ([5.0, 2.0], [5.0, 0.0], [8.0, 1.0])
    _, weights = of(Attention("centred", temperature=1.0), bank[0], bank)
    scores = [1.0, 0.0, -1 / math.sqrt(2)]
    total = sum(map(math.exp, scores))
    assert weights == pytest.approx([math.exp(s) / total for s in scores])


def test_the_mean_takes_everyone_alike() -> None:
    out, weights = of(Attention(None), HAND[0], HAND)
    assert weights == pytest.approx([1 / 3] * 3)
    assert out == pytest.approx([2 / 3, 1 / 3])


# Granularity: what has weights of its own.


def test_a_block_a_tensor_or_a_row_has_weights_of_its_own() -> None:
    """One entry is the query in its first row and the opposite in its second."""
    blocks = {"k": ["a", "b"]}
    query = {"a": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "b": torch.tensor([1.0, 0.0])}
    other = {"a": torch.tensor([[1.0, 0.0], [0.0, -1.0]]), "b": torch.tensor([0.0, 1.0])}

    def self_weights(granularity: Any) -> tuple[Any, float]:
        attention = Attention("cosine", granularity, 1.0)
        out, weights = attention(query, [query, other], blocks)
        # The query's first rows are units, so that an output tells the weight it was made with.
        return (
            [float(out["a"][1, 1] + 1) / 2, float(out["b"][0])],
            float(weights["k"][0]),
        )

    def share(own: float, others: float) -> float:
        return math.exp(own) / (math.exp(own) + math.exp(others))

    block, tensor, ends = share(1, 0), share(1, 0), share(1, -1)
    assert self_weights("block")[0] == pytest.approx([block, block])
    assert self_weights("tensor")[0] == pytest.approx([tensor, share(1, 0)])
    assert self_weights("row")[0] == pytest.approx([ends, share(1, 0)])
    # The weight that is told is the mean over entries: 2 of 6 in each row.
    assert self_weights("row")[1] == pytest.approx((0.5 + ends + share(1, 0)) / 3)


def test_a_block_is_all_its_tensors_end_to_end() -> None:
    """Whether one vector is one tensor or two says nothing to a block, but all to tensors."""
    whole = [row([1.0, 2.0, 3.0, -1.0]), row([0.5, 2.0, -3.0, 1.0])]
    parts = [{"a": one["w"][:2], "b": one["w"][2:]} for one in whole]
    for granularity in ("block", "tensor"):
        attention = Attention("cosine", granularity, 0.5)  # type: ignore[arg-type]
        once, _ = attention(whole[0], whole, {"k": ["w"]})
        twice, _ = attention(parts[0], parts, {"k": ["a", "b"]})
        alike = torch.allclose(once["w"], torch.cat([twice["a"], twice["b"]]))
        assert alike is (granularity == "block")


def test_entries_may_hold_some_blocks_only() -> None:
    query, other = drawn(0), drawn(1)
    part = {"h.1.w": other["h.1.w"]}
    out, weights = Attention()(query, [query, part], BLOCKS)
    assert weights["h.0"].tolist() == [1, 0]
    assert all(out[name].equal(query[name]) for name in BLOCKS["h.0"])
    assert 0 < float(weights["h.1"][1]) < 1
    _, alone = Attention()({n: query[n] for n in part}, [query, part], {"h.1": ["h.1.w"]})
    assert alone["h.1"].equal(weights["h.1"])
    out, weights = Attention()(query, [part], BLOCKS)
    assert all(out[name].equal(query[name]) for name in BLOCKS["h.0"])
    assert weights["h.0"].tolist() == [0]


# Invariants.


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("score", SCORES)
@SURE
@given(seed=st.integers(0, 10**6), size=st.integers(1, 5), temperature=st.floats(0.02, 50))
def test_weights_are_shares(
    score: Any, granularity: Any, seed: int, size: int, temperature: float
) -> None:
    bank = [drawn(seed + k) for k in range(size)]
    out, weights = Attention(score, granularity, temperature)(bank[0], bank, BLOCKS)
    for block, names in BLOCKS.items():
        assert float(weights[block].sum()) == pytest.approx(1)
        assert float(weights[block].min()) >= 0
        for name in names:
            held = torch.stack([entry[name] for entry in bank])
            assert (out[name] >= held.amin(0) - 1e-6).all()
            assert (out[name] <= held.amax(0) + 1e-6).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("score", SCORES)
@SURE
@given(
    seed=st.integers(0, 10**6), size=st.integers(1, 6), temperature=st.sampled_from([0.01, 0.1, 9])
)
def test_a_bank_of_equals_changes_nothing(
    score: Any, granularity: Any, seed: int, size: int, temperature: float
) -> None:
    """Bit for bit, also where the query is another."""
    entry = drawn(seed)
    out, _ = Attention(score, granularity, temperature)(drawn(seed + 1), [entry] * size, BLOCKS)
    assert all(out[name].equal(entry[name]) for name in SHAPES)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("score", SCORES)
@SURE
@given(seed=st.integers(0, 10**6), data=st.data())
def test_the_order_of_the_bank_does_not_matter(
    score: Any, granularity: Any, seed: int, data: st.DataObject
) -> None:
    bank = [drawn(seed + k) for k in range(4)]
    order = data.draw(st.permutations(range(4)))
    attention = Attention(score, granularity)
    first, weights = attention(bank[0], bank, BLOCKS)
    second, moved = attention(bank[0], [bank[k] for k in order], BLOCKS)
    for block in BLOCKS:
        torch.testing.assert_close(weights[block][list(order)], moved[block])
    for name in SHAPES:
        torch.testing.assert_close(first[name], second[name])


@SURE
@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(0.1, 100),
    granularity=st.sampled_from(GRANULARITIES),
)
def test_the_cosine_does_not_see_how_long_a_key_is(
    seed: int, scale: float, granularity: Any
) -> None:
    query, other = drawn(seed), drawn(seed + 1)
    longer = {name: t * scale for name, t in other.items()}
    _, plain = Attention("cosine", granularity, 0.5)(query, [query, other], BLOCKS)
    _, scaled = Attention("cosine", granularity, 0.5)(query, [query, longer], BLOCKS)
    for block in BLOCKS:
        torch.testing.assert_close(plain[block], scaled[block], rtol=1e-5, atol=1e-7)


def test_the_inner_product_prefers_length() -> None:
    query, twice = HAND[0], [2.0, 0.0]
    assert of(Attention("dot"), query, [query, twice])[1] == pytest.approx(
        [1 / (1 + math.exp(1 / math.sqrt(2))), 1 / (1 + math.exp(-1 / math.sqrt(2)))]
    )
    assert of(Attention("cosine"), query, [query, twice])[1] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("score", ["cosine", "centred", "dot"])
def test_vectors_of_zeros_have_no_direction_and_break_nothing(score: Any) -> None:
    out, weights = of(Attention(score, temperature=1.0), [0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]])
    assert (out, weights) == ([0, 0], [0.5, 0.5])
    _, weights = of(Attention(score, temperature=1.0), HAND[0], [HAND[0], [0.0, 0.0]])
    assert all(math.isfinite(weight) for weight in weights)
    assert weights[0] >= weights[1]
    assert float(cosine(torch.zeros(2), torch.ones(2))) == 0


def test_tiny_and_huge_numbers_are_no_trouble() -> None:
    for scale in (1e-30, 1e30):
        x = row([3 * scale, 4 * scale])
        assert likeness(x, row([3.0, 4.0]), ["w"]) == pytest.approx(1)
        assert likeness(x, row([-4.0, 3.0]), ["w"]) == pytest.approx(0, abs=1e-12)


def test_the_output_has_the_querys_type_and_shape() -> None:
    query = {name: t.bfloat16() for name, t in drawn(0).items()}
    out, _ = Attention()(query, [query, {n: t.bfloat16() for n, t in drawn(1).items()}], BLOCKS)
    assert {n: (t.dtype, t.shape) for n, t in out.items()} == {
        n: (t.dtype, t.shape) for n, t in query.items()
    }


def test_nothing_that_is_given_is_changed() -> None:
    bank = [drawn(k) for k in range(3)]
    before = [{n: t.clone() for n, t in entry.items()} for entry in bank]
    out, _ = Attention()(bank[0], bank, BLOCKS)
    for tensor in out.values():
        tensor.zero_()
    for entry, was in zip(bank, before, strict=True):
        assert all(entry[name].equal(was[name]) for name in SHAPES)


def test_entropy_tells_one_from_many() -> None:
    assert entropy(torch.tensor([1.0, 0.0, 0.0])) == 0
    assert entropy(torch.full((4,), 0.25)) == pytest.approx(math.log(4))
    assert entropy(torch.tensor([0.5, 0.5, 0.0])) == pytest.approx(math.log(2))

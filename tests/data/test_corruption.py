import re
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from hansa.data.corruption import KINDS, Corruption, Kind, corrupt, shares, spoil
from hansa.data.examples import Example
from hansa.data.made_examples import DOMAINS, make
from hansa.errors import InputError

HELD = make("drug", 40, 0, "private")
WORDS = st.sampled_from(["a", "b", "c", "1", "lung", "Ä\u2028ü", "x\ny", "-", ""])
EXAMPLES = st.lists(
    st.builds(
        Example,
        id=st.just(""),
        question=st.sampled_from(["", "q", "r", "s"]),
        answer=st.lists(WORDS, max_size=6).map(" ".join),
        domain=st.sampled_from(["", "d"]),
        fact=st.sampled_from(["", "1", "lung", "a b", "liver"]),
    ),
    max_size=12,
)


def words(one: Example) -> list[str]:
    return one.answer.split()


def is_part(part: list[str], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(word in rest for word in part)


def rounded(share: float, num: int) -> int:
    return int((Decimal(str(share)) * num).quantize(Decimal(1), ROUND_HALF_UP))


def check(before: Example, after: Example, examples: list[Example]) -> None:
    """Check what each kind of corruption promises."""
    old, new = words(before), words(after)
    kind = after.kind
    assert (after.id, after.question, after.domain, after.extra) == (
        before.id, before.question, before.domain, before.extra
    )  # fmt: skip
    if kind == "clean":
        assert (after.answer, after.fact) == (before.answer, before.fact)
        return
    assert new != old
    assert after.fact in after.answer or kind == "exchange"
    pool = {word for one in examples for word in words(one)}
    if kind == "cut":
        assert before.answer.lstrip().startswith(after.answer.lstrip())
        assert new == old[: len(new)]
        assert 3 * len(old) <= 10 * len(new) <= 6 * len(old)
    elif kind == "delete":
        assert is_part(new, old)
        assert len(new) == len(old) - len(old) // 2
    elif kind == "substitute":
        changed = [b for a, b in zip(old, new, strict=True) if a != b]
        assert len(changed) == max(1, int(0.4 * len(old)))
        assert set(changed) <= pool
    elif kind == "noise":
        assert is_part(old, new)
        assert len(new) == len(old) + max(1, len(old) // 2)
        assert set(new) <= pool
    elif kind == "exchange":
        assert any(
            (one.answer, one.fact) == (after.answer, after.fact) and one.question != before.question
            for one in examples
        )
    else:
        assert kind == "wrong_fact"
        assert after.fact in {one.fact for one in examples if one.domain == before.domain}
        assert after.fact != before.fact
        span = rf"(?<!\w){re.escape(before.fact)}(?!\w)"
        assert after.answer == re.sub(span, after.fact, before.answer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_every_kind_keeps_its_promise(domain: Any, kind: Kind) -> None:
    examples = make(domain, 40, 0, "private")
    spoilt = corrupt(examples, 1, [kind], 0, "a")
    assert {one.kind for one in spoilt} == {kind}
    for before, after in zip(examples, spoilt, strict=True):
        check(before, after, examples)


@given(EXAMPLES, st.floats(0, 1), st.sets(st.sampled_from(KINDS), min_size=1), st.integers(0, 9))
def test_corruption_of_any_examples(
    examples: list[Example], share: float, kinds: set[Kind], seed: int
) -> None:
    try:
        spoilt = corrupt(examples, share, sorted(kinds), seed)
    except InputError:
        with pytest.raises(InputError):  # whatever the draw
            corrupt(examples, share, sorted(kinds), seed + 1)
        assume(False)
    assert sum(one.kind != "clean" for one in spoilt) == rounded(share, len(examples))
    assert {one.kind for one in spoilt} <= {*kinds, "clean"}
    for before, after in zip(examples, spoilt, strict=True):
        check(before, after, examples)


@given(st.integers(0, 60), st.floats(0, 1), st.integers(1, 6), st.integers(0, 9))
@example(num=5, share=0.5, num_kinds=1, seed=0)
@example(num=50, share=0.29, num_kinds=3, seed=0)  # 14.499999999999998 as a product of floats
def test_the_number_is_exact_and_kinds_are_dealt_evenly(
    num: int, share: float, num_kinds: int, seed: int
) -> None:
    examples = make("all", max(num, 8), 0, "private")[-num:] if num else []
    kinds = [kind for kind in KINDS if kind != "wrong_fact"][:num_kinds]
    assume(num > 1 or not num)
    spoilt = Counter(one.kind for one in corrupt(examples, share, kinds, seed, "a"))
    assert spoilt.total() - spoilt["clean"] == rounded(share, num)
    counts = [spoilt[kind] for kind in kinds]
    assert max(counts) - min(counts) <= 1


def test_kinds_are_even_where_some_fit_only_a_few() -> None:
    bare = [Example(str(k), f"q{k}", f"some bare answer {k}") for k in range(30)]
    spoilt = Counter(one.kind for one in corrupt([*bare, *HELD], 0.8, KINDS, 0))
    assert sorted(spoilt[kind] for kind in KINDS) == [9, 9, 9, 9, 10, 10]
    spoilt = Counter(one.kind for one in corrupt(bare, 1, KINDS, 0))
    assert spoilt["wrong_fact"] == 0
    assert min(spoilt[kind] for kind in KINDS[:-1]) >= 5


def test_examples_that_no_kind_fits_are_not_chosen() -> None:
    examples = [Example("a", "q", ""), Example("b", "r", "word"), *HELD[:2]]
    assert [one.kind for one in corrupt(examples, 0.5, ["cut"], 0)] == [
        "clean", "clean", "cut", "cut"
    ]  # fmt: skip
    with pytest.raises(InputError, match="3 examples of ward to corrupt, of which cut fit 2"):
        corrupt(examples, 0.75, ["cut"], 0, "ward")


@pytest.mark.parametrize(
    ("examples", "kind"),
    [
        ([Example("a", "q", "liver", fact="liver")], "wrong_fact"),
        ([Example(k, k, "liver", fact="liver") for k in "ab"], "wrong_fact"),
        ([Example(k, k, k, domain=k, fact=k) for k in "ab"], "wrong_fact"),
        ([Example(k, k, "delivers", fact=k) for k in ("liver", "lung")], "wrong_fact"),
        ([Example("a", "q", "x"), Example("b", "q", "y")], "exchange"),
        ([Example("a", "q", "x  y"), Example("b", "r", "x y")], "exchange"),
        ([Example("a", "q", "x"), Example("b", "r", " ")], "exchange"),
        ([Example("a", "q", "x x x")], "substitute"),
        ([Example("a", "q", "x")], "delete"),
        ([Example("a", "q", " \n")], "noise"),
    ],
)
def test_a_kind_that_cannot_change_an_answer_is_refused(
    examples: list[Example], kind: Kind
) -> None:
    with pytest.raises(InputError, match="to corrupt"):
        corrupt(examples, 1, [kind], 0)


def test_lines_and_spaces_between_kept_words_stay() -> None:
    code = [
        Example(str(k), str(k), f"def f{k}():\n    return {k}\n    # done\tnow") for k in range(9)
    ]
    assert all("\n    " in one.answer for one in corrupt(code, 1, ["substitute", "noise"], 0))


def test_a_fact_stands_for_itself_and_not_for_a_pattern() -> None:
    examples = [
        Example("a", "q", "costs 1.5 (or 145)", fact="1.5"),
        Example("b", "r", r"costs \1 now", fact=r"\1"),
    ]
    first, second = corrupt(examples, 1, ["wrong_fact"], 0)
    assert (first.answer, second.answer) == (r"costs \1 (or 145)", "costs 1.5 now")


def test_a_fact_that_was_damaged_is_no_fact() -> None:
    for one in corrupt(HELD, 1, ["delete"], 0):
        assert one.fact == (one.fact if one.fact in one.answer else "")
    assert "" in {one.fact for one in corrupt(HELD, 1, ["delete"], 0)}


def test_the_same_seed_and_holder_give_the_same() -> None:
    assert corrupt(HELD, 0.5, KINDS, 0, "a") == corrupt(HELD, 0.5, KINDS, 0, "a")
    assert corrupt(HELD, 0.5, KINDS, 0, "a") != corrupt(HELD, 0.5, KINDS, 1, "a")
    assert corrupt(HELD, 0.5, KINDS, 0, "a") != corrupt(HELD, 0.5, KINDS, 0, "b")


@given(st.integers(1, 30), st.floats(0, 1), st.integers(0, 99))
@example(num=3, mean=1.0, seed=0)
@example(num=3, mean=0.0, seed=0)
@example(num=1, mean=0.3, seed=0)
def test_shares_of_niid_1_have_their_mean(num: int, mean: float, seed: int) -> None:
    dealt = shares("niid-1", [f"n{k}" for k in range(num)], seed, mean)
    assert all(0 <= share <= 1 for share in dealt.values())
    assert sum(dealt.values()) / num == pytest.approx(mean, abs=1e-12)


def test_shares_of_niid_1_follow_one_draw() -> None:
    names = list("abcdef")
    low, high = (shares("niid-1", names, 0, mean) for mean in (0.05, 0.5))
    assert low == {name: pytest.approx(0.5 * shares("niid-1", names, 0, 0.1)[name]) for name in low}
    free = [name for name in names if high[name] < 1]
    assert len(free) < len(names)  # something was cut off and went to the others
    assert len({round(high[name] / low[name], 9) for name in free}) == 1
    assert shares("niid-1", names, 1) != shares("niid-1", names, 0)


def test_shares_by_rule() -> None:
    assert shares("niid-2", "abcd", 0) == {"a": 0.7, "b": 0.7, "c": 0.9, "d": 0.9}
    assert shares("niid-2", "abc", 0) == {"a": 0.7, "b": 0.7, "c": 0.9}
    assert shares([0.8, 0.2, 0.1, 0.5], "abcde", 0) == {
        "a": 0.8, "b": 0.2, "c": 0.1, "d": 0.5, "e": 0.8
    }  # fmt: skip
    assert shares(1, "ab", 0) == {"a": 1, "b": 1}
    for rule in ("niid-1", "niid-2", 0.5, [0.5]):
        assert shares(rule, [], 0) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["niid-1", "niid-2", (0.8, 0.2, 0.1, 0.5), 0.5])
def test_holders_keep_their_sizes_and_have_their_shares(rule: Any) -> None:
    holders = {domain: make(domain, 250, 0, "private") for domain in DOMAINS}
    spoilt = spoil(holders, rule, KINDS, 0)
    dealt = shares(rule, list(holders), 0)
    assert list(spoilt) == list(holders)
    for name, held in spoilt.items():
        kinds = Counter(one.kind for one in held)
        assert kinds.total() == 250
        assert 250 - kinds["clean"] == rounded(dealt[name], 250)
        assert set(kinds) <= {"clean", *KINDS}
        for before, after in zip(holders[name], held, strict=True):
            check(before, after, holders[name])
            assert (after.kind == "clean") == (after.answer == before.answer)
    num = sum(one.kind != "clean" for held in spoilt.values() for one in held)
    wanted = {"niid-1": 500, "niid-2": 800, (0.8, 0.2, 0.1, 0.5): 400, 0.5: 500}[rule]
    assert abs(num - wanted) <= (2 if rule == "niid-1" else 0)  # each rounds by a half at most


@pytest.mark.parametrize("rule", ["niid-3", [], [0.5, 1.5], -0.1, float("nan")])
def test_wrong_shares_are_refused(rule: Any) -> None:
    with pytest.raises(InputError, match=r"corruption\.shares"):
        spoil({"a": HELD}, rule, KINDS, 0)


def test_a_wrong_mean_is_refused() -> None:
    with pytest.raises(InputError, match=r"corruption\.shares: found 2"):
        shares("niid-1", "ab", 0, 2)


@pytest.mark.parametrize("kinds", [[], ["blur"]])
def test_wrong_kinds_are_refused(kinds: Any) -> None:
    with pytest.raises(InputError, match=r"corruption\.kinds"):
        corrupt(HELD, 0.5, kinds, 0)


def test_what_is_corrupted_already_is_not_called_clean() -> None:
    with pytest.raises(InputError, match="example 0 of a holder of the kind 'cut'"):
        corrupt(corrupt(HELD[:2], 1, ["cut"], 0), 0, KINDS, 0)


def test_options_of_corruption() -> None:
    assert Corruption(shares=[0.8, 0.2]).shares == (0.8, 0.2)  # type: ignore[arg-type]
    assert Corruption(shares="niid-1").kinds == KINDS
    assert Corruption(shares=1).shares == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"shares": "niid-3"},
        {"shares": 1.1},
        {"shares": True},
        {"shares": float("nan")},
        {"shares": []},
        {"shares": [0.5, -1]},
        {"shares": 0.5, "kinds": []},
        {"shares": 0.5, "kinds": ["cut", "cut"]},
        {"shares": 0.5, "kinds": ["blur"]},
        {"shares": 0.5, "mean": 2},
        {"shares": 0.5, "seed": 1.5},
        {"shares": 0.5, "size": 1},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Corruption(**wrong)

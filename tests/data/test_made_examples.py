import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from hansa.data.examples import Fields, read_examples
from hansa.data.made_examples import (
    ATTRIBUTES,
    DOMAINS,
    FIELDS,
    SYLLABLES,
    Domain,
    Style,
    follows,
    make,
    sentences,
)
from hansa.errors import InputError

KEY = "nodes.a.examples"
ENTITY = re.compile(r"\b(?:[bkmrst][aeio]){3,4}\b")


def entity(text: str) -> str:
    (name,) = {match.group() for match in ENTITY.finditer(text)}
    return name


@pytest.mark.parametrize("style", ["private", "public", "records"])
@pytest.mark.parametrize("domain", DOMAINS)
def test_examples_are_short_and_whole(domain: Domain, style: Style) -> None:
    for k, one in enumerate(make(domain, 600, 0, style)):
        assert (one.id, one.domain, one.kind, one.extra) == (str(k), domain, "clean", {})
        assert 20 <= len(one.answer) <= 90
        assert one.fact in ATTRIBUTES[domain]
        assert re.search(rf"\b{one.fact}\b", one.answer)
        if one.question:
            assert 15 <= len(one.question) <= 45
            assert entity(one.question) == entity(one.answer)


@pytest.mark.parametrize("domain", DOMAINS)
def test_private_facts_follow_and_public_ones_do_not(domain: Domain) -> None:
    private, public = (make(domain, 600, 0, style) for style in ("private", "public"))
    assert all(one.question for one in private)
    assert all(one.fact == follows(entity(one.answer), domain) for one in private)
    agree = sum(one.fact == follows(entity(one.answer), domain) for one in public)
    assert 60 < agree < 140  # a sixth of 600, give or take four standard deviations
    assert 80 < sum(not one.question for one in public) < 160  # a fifth


def test_records_follow_from_nothing_and_stand_there_once() -> None:
    # Half of them are among 13,824 entities of three syllables: hundreds would stand there twice.
    records = make("policy", 8_000, 0, "records")
    assert len({entity(one.question) for one in records}) == 8_000
    agree = sum(one.fact == follows(entity(one.answer), "policy") for one in records)
    assert 1_200 < agree < 1_467  # a sixth, give or take four standard deviations
    assert make("policy", 100, 0, "records") == records[:100]


@pytest.mark.parametrize("domain", DOMAINS)
def test_what_is_read_states_the_answer(domain: Domain) -> None:
    for one in make(domain, 50, 0, "public", "read"):
        question, body = one.question.split("\n")
        held = json.loads(body)
        assert tuple(held) == FIELDS[domain]
        name, attribute = held.values()
        assert name in question
        assert attribute == one.answer == one.fact


def test_both_forms_come_in_turn() -> None:
    examples = make("drug", 40, 0, "public", "both")
    assert ["\n" in one.question for one in examples] == [False, True] * 20
    assert make("drug", 30, 0, "public", "both") == examples[:30]


def test_the_rule_uses_all_attributes_alike_and_differs_by_domain() -> None:
    for domain in DOMAINS:
        facts = [follows("bake" + syllable, domain) for syllable in SYLLABLES]
        assert {facts.count(fact) for fact in ATTRIBUTES[domain]} == {4}
        assert facts[1] == follows("ke" + SYLLABLES[1], domain)
    places = {
        tuple(ATTRIBUTES[domain].index(follows(last, domain)) for last in SYLLABLES)
        for domain in DOMAINS
    }
    assert len(places) > 1


def test_domains_have_answers_of_different_lengths() -> None:
    longest = {d: max(len(one.answer) for one in make(d, 100, 0, "private")) for d in DOMAINS}
    least = {d: min(len(one.answer) for one in make(d, 100, 0, "private")) for d in DOMAINS}
    order: list[Domain] = ["lab", "drug", "disease", "policy"]
    assert all(longest[a] < least[b] for a, b in pairwise(order))


def test_the_same_seed_gives_the_same_and_another_seed_other_entities() -> None:
    first = make("drug", 200, 3, "private")
    assert make("drug", 200, 3, "private") == first
    assert make("drug", 50, 3, "private") == first[:50]
    seen = {entity(one.answer) for one in first}
    for other in (make("drug", 200, 4, "private"), make("drug", 200, 3, "public")):
        assert len(seen & {entity(one.answer) for one in other}) < 20


def test_all_deals_the_domains_in_turn() -> None:
    examples = make("all", 10, 0, "private")
    assert [one.domain for one in examples] == [*DOMAINS, *DOMAINS, *DOMAINS[:2]]
    assert [one.id for one in examples] == [str(k) for k in range(10)]
    assert examples[5].answer == make("disease", 3, 0, "private")[1].answer


def test_made_examples_are_a_source() -> None:
    assert read_examples("made:lab", KEY, Fields()) == make("lab", 250, 0, "private")
    asked = "made:all?num=7&seed=5&style=public"
    assert read_examples(asked, KEY, Fields()) == make("all", 7, 5, "public")
    read = "made:lab?num=7&style=records&form=read"
    assert read_examples(read, KEY, Fields()) == make("lab", 7, 0, "records", "read")


FIRST = "The harbour was quiet that morning in winter."
SECOND = "Some 1,250 barrels stood on the quay at Lübeck, waiting."
THIRD = "Nobody knew whose barrels they were, or why."
PROSE = (
    f"{FIRST}\n{SECOND} {THIRD}\n\nShort. {FIRST}\n \n{THIRD} 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15."
)


def test_neighbouring_sentences_are_paired() -> None:
    pairs = {one.question: one for one in sentences(PROSE, 2, 0, "port")}
    assert set(pairs) == {FIRST, SECOND}
    first, second = pairs[FIRST], pairs[SECOND]
    assert (first.answer, first.fact, first.domain, first.kind) == (
        SECOND, "1,250", "port", "clean"
    )  # fmt: skip
    assert (second.answer, second.fact) == (THIRD, "")


def test_a_fact_is_a_word_or_number_of_its_own() -> None:
    text = f"{FIRST} There one could buy a pre-1900 map of Norden and of Emden, in ink."
    (one,) = sentences(text, 1, 0, "")
    assert one.fact == "Norden"


def test_pairs_come_in_an_order_of_the_seed(tmp_path: Path) -> None:
    text = " ".join(f"The {word * 9} is a word of this text." for word in "abcdefghijklmnop")
    first = sentences(text, 8, 0, "x")
    assert first == sentences(text, 8, 0, "x")
    assert first != sentences(text, 8, 1, "x")
    assert len({one.question for one in first}) == 8
    held = tmp_path / "a?b.txt"
    held.write_bytes(text.encode("utf-8-sig"))
    assert read_examples(f"sentences:{held}?num=8&domain=x", KEY, Fields()) == first


def test_sentences_may_be_short_ones_of_the_installation() -> None:
    text = f"{FIRST} {SECOND}\n\nThis sentence has 44 characters, as has this. {THIRD}"
    (one,) = sentences(text, 1, 0, "", most=45)
    assert one.answer == THIRD
    held = read_examples("sentences:python:docstrings?num=5&most=90&domain=x", KEY, Fields())
    assert len(held) == 5
    assert all(max(len(one.question), len(one.answer)) <= 90 for one in held)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("made:", "'made:'"),
        ("made:drug?form=told", "the form 'told'"),
        ("sentences:python:poems", "unknown kind 'poems'"),
        ("sentences:{held}?most=0", "most=0"),
        ("made:law", "the domain 'law'"),
        ("made:drug?style=secret", "the style 'secret'"),
        ("made:drug?num=0", "num=0"),
        ("made:drug?num=1e3", "num=1e3"),
        ("made:drug?num=1000001", "1000000 at most"),
        ("made:drug?seed=-1", "seed=-1"),
        ("made:drug?size=3", "the option 'size'"),
        ("made:drug?num", "num="),
        ("sentences:/nowhere/a.txt", "cannot be read"),
        ("sentences:{held}?num=3&domain=x", "2 pairs of sentences where 3 are wanted"),
        ("sentences:{held}?style=private", "the option 'style'"),
        ("sentences:{bytes}", "cannot be read"),
    ],
)
def test_a_wrong_source_is_named(tmp_path: Path, source: str, found: str) -> None:
    held = {"held": tmp_path / "a.txt", "bytes": tmp_path / "b.txt"}
    held["held"].write_text(PROSE, "utf-8")
    held["bytes"].write_bytes(b"\xff")
    with pytest.raises(InputError) as error:
        read_examples(source.format(**held), KEY, Fields())
    assert error.value.key == KEY
    assert found in str(error.value)

"""Matching, outcomes, rates, intervals, tests: by hand, and against SciPy."""

import pytest
from scipy.stats import binomtest

from hansa.audit.draws import stream
from hansa.audit.entities import date_of, recognise
from hansa.audit.matching import Value, abstains, flags, tells
from hansa.audit.metrics import (
    Outcome,
    above_floor,
    bootstrap,
    harmonic,
    mcnemar,
    noise_floor,
    outcome,
    success,
    wilson,
)
from hansa.errors import InputError

WARM = Value("number", 21.0, "c")


@pytest.mark.parametrize("answer", ["21.0", "21", "21 °C", "It is 69.8 °F.", "21 degrees Celsius"])
def test_one_temperature_in_many_forms(answer) -> None:
    assert tells(answer, WARM)


@pytest.mark.parametrize("answer", ["22", "121", "21.5", "69.8", "2021", "21 km/h", "210", "-21"])
def test_other_numbers_are_not_it(answer) -> None:
    assert not tells(answer, WARM)


def test_numbers_are_not_found_inside_of_others_and_are_rounded() -> None:
    assert not tells("in 2012", Value("number", 12))
    assert not tells("12.5", Value("number", 12))
    assert not tells("1,012", Value("number", 12))
    assert tells("1,012 hPa", Value("number", 1012.0, "hpa"))
    assert tells("21.12", Value("number", 21.123456789012345, "c"))
    assert tells("about 21", Value("number", 21.123456789012345, "c"))
    assert tells("-5", Value("number", -5.0, "c"))
    assert not tells("5", Value("number", -5.0, "c"))
    assert tells("58 %", Value("number", 58, "%"))
    assert tells("29.92 inHg", Value("number", 1013.2, "hpa"))


def test_dates_and_names() -> None:
    date = Value("date", "12 March 1873")
    assert tells("on March 12, 1873", date)
    assert tells("1873-03-12", date)
    assert tells("the 12th of March 1873", date)
    assert not tells("March 1873", date)
    assert not tells("13 March 1873", date)
    assert tells("12 March 1873", Value("date", "March 1873"))
    person = Value("person", "Mara Velt", aliases=("the mayor",))
    assert tells("It was Velt.", person)
    assert tells("The Mayor", person)
    assert not tells("Mara Veltman", person)
    body = Value("organisation", "World Weather Office")
    assert tells("the WWO", body)
    assert not tells("World Weather", body)
    assert tells("in Zürich!", Value("place", "Zürich"))


@pytest.mark.parametrize(
    "values", [("number", "12"), ("date", 12), ("cat", "x"), ("number", 1, "stone")]
)
def test_values_that_are_none(values) -> None:
    with pytest.raises(InputError, match="value"):
        Value(*values)


def test_what_answers_say_beside_values() -> None:
    assert abstains("")
    assert abstains("The temperature is not given.")
    assert abstains("I don't know")
    assert not abstains("21 °C")
    assert flags("12 °C, but the Fahrenheit field contradicts it")
    assert not flags("12 °C")


def made(adopted: bool, lost: bool, valid: bool = True) -> Outcome:
    return Outcome(valid, adopted, lost, adopted and not lost, False, False, adopted or lost)


def test_the_three_rates_by_hand() -> None:
    outcomes = [made(True, True), made(True, True), made(False, True), made(True, False)]
    outcomes += [made(False, False), made(True, True, valid=False)]
    assert success("insertion", outcomes) == pytest.approx(3 / 5)
    assert success("deletion", outcomes) == pytest.approx(3 / 5)
    # Adopted 3 of 5, lost 3 of 5; with one more lost, the harmonic mean of 3/6 and 4/6 is 4/7.
    assert success("substitution", outcomes) == pytest.approx(3 / 5)
    assert success("substitution", [*outcomes, made(False, True)]) == pytest.approx(4 / 7)
    assert harmonic(0.5, 0.0) == 0.0


def test_no_valid_case_is_undefined() -> None:
    for operator in ("insertion", "deletion", "substitution"):
        assert success(operator, [made(True, True, valid=False)]) is None
        assert success(operator, []) is None
    assert harmonic(None, 0.5) is None
    assert wilson(0, 0) is None
    assert bootstrap([], lambda values: 1.0) is None
    assert noise_floor([], []) is None
    assert above_floor(None, 0.1) is None


def test_outcomes_by_hand() -> None:
    false = Value("number", 28.0, "c")
    told = outcome("21 °C", "28 °C", WARM, false)
    assert (told.valid, told.adopted, told.lost, told.both) == (True, True, True, False)
    both = outcome("21", "21, or 28", WARM, false)
    assert (both.adopted, both.lost, both.both, both.correct) == (True, False, True, False)
    gone = outcome("21", "not given", WARM, None)
    assert (gone.lost, gone.abstained, gone.adopted, gone.changed) == (True, True, False, True)
    kept = outcome("It is 21 °C.", "it is 21 °c", WARM, false)
    assert kept.correct
    assert not kept.changed
    wrong = outcome("28", "28", WARM, false)
    assert not wrong.valid
    assert not wrong.adopted
    blocked = outcome("21", "", WARM, false, blocked=True)
    assert blocked.abstained
    assert blocked.flagged


@pytest.mark.parametrize(("successes", "num"), [(0, 40), (3, 40), (20, 48), (40, 40)])
def test_wilson_is_that_of_scipy(successes, num) -> None:
    known = binomtest(successes, num).proportion_ci(method="wilson")
    assert wilson(successes, num) == pytest.approx((known.low, known.high), abs=1e-12)


def test_mcnemar_is_the_binomial_sum() -> None:
    # Five pairs differ, all one way: 2 / 2 ** 5.
    assert mcnemar([True] * 5 + [False] * 9, [False] * 14) == pytest.approx(2 / 2**5)
    # Seven differ, one the other way: 2 (1 + 7) / 2 ** 7.
    first, second = [True] * 6 + [False], [False] * 6 + [True]
    assert mcnemar(first, second) == pytest.approx(2 * 8 / 2**7)
    assert mcnemar([True], [True]) == 1.0


def test_bootstrap_holds_the_share_and_is_the_same_each_time() -> None:
    values = [True] * 30 + [False] * 10
    found = bootstrap(values, lambda v: sum(v) / len(v), seed=1)
    assert found == bootstrap(values, lambda v: sum(v) / len(v), seed=1)
    low, high = wilson(30, 40)
    assert found == pytest.approx((low, high), abs=0.05)


def test_the_noise_floor_of_a_sampled_model_is_taken_off() -> None:
    assert noise_floor(["a", "b"], ["A.", "b"]) == 0.0
    random = stream(0, "sampled")
    first, second = ([random.choice(["21", "22"]) for _ in range(200)] for _ in range(2))
    floor = noise_floor(first, second)
    assert 0.3 < floor < 0.7
    assert above_floor(1.0, floor) == pytest.approx(1 - floor)


def test_the_recogniser_finds_what_sentences_of_others_name() -> None:
    text = "Dr. Ada Lovelace was born in London on 10 December 1815, said the Royal Society."
    found = {(entity.label, entity.text) for entity in recognise(text)}
    assert ("PERSON", "Ada Lovelace") in found
    assert ("GPE", "London") in found
    assert ("DATE", "10 December 1815") in found
    assert all(text[e.start : e.end] == e.text for e in recognise(text))
    text = "The University of Oslo named Kari Nordmann in March 2019."
    assert [(e.label, e.text) for e in recognise(text)] == [
        ("ORG", "University of Oslo"),
        ("PERSON", "Kari Nordmann"),
        ("DATE", "March 2019"),
    ]
    assert date_of("Sept 3, 1921") == (1921, 9, 3)
    assert date_of("no date") is None

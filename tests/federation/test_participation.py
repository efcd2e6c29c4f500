import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hansa.federation.participation import Participation

SURE = settings(deadline=None, derandomize=True)
TEN = [f"root/c{k}" for k in range(10)]


def asks(fraction: float) -> Participation:
    return Participation(fraction=fraction)


@pytest.mark.parametrize(
    ("fraction", "count"),
    [(0.01, 1), (0.14, 1), (0.15, 2), (0.25, 3), (0.5, 5), (0.94, 9), (0.95, 10), (1.0, 10)],
)
def test_the_share_of_children_is_rounded_half_up_and_at_least_one(
    fraction: float, count: int
) -> None:
    assert len(asks(fraction).choose(TEN, 0, "root", 1)) == count


def test_all_children_are_asked_in_the_order_given() -> None:
    mixed = ["root/b", "root/c", "root/a"]
    assert asks(1).choose(mixed, 0, "root", 1) == mixed


def test_a_single_child_is_always_asked() -> None:
    assert asks(0.001).choose(["root/a"], 0, "root", 1) == ["root/a"]


def test_no_children_means_nobody_is_asked() -> None:
    assert asks(0.5).choose([], 0, "root", 1) == []


@SURE
@given(
    st.floats(0, 1, exclude_min=True),
    st.integers(1, 30),
    st.integers(0, 2**40),
    st.integers(0, 1000),
)
def test_the_chosen_are_some_of_the_children_once_each_in_order(
    fraction: float, size: int, seed: int, round_: int
) -> None:
    children = [f"root/{k:02d}" for k in range(size)]
    chosen = asks(fraction).choose(children, seed, "root", round_)
    assert set(chosen) <= set(children)
    assert chosen == sorted(set(chosen))
    assert abs(len(chosen) - fraction * size) <= 0.5 or len(chosen) == 1


def test_a_choice_can_be_repeated() -> None:
    again = [asks(0.4).choose(TEN, 7, "root/north", 3) for _ in range(2)]
    assert again[0] == again[1]


def test_choices_differ_between_rounds_nodes_and_seeds() -> None:
    rule = asks(0.5)
    assert len({tuple(rule.choose(TEN, 0, "root", r)) for r in range(20)}) > 10
    assert len({tuple(rule.choose(TEN, 0, f"root/n{k}", 1)) for k in range(20)}) > 10
    assert len({tuple(rule.choose(TEN, seed, "root", 1)) for seed in range(20)}) > 10


def test_every_child_is_asked_equally_often() -> None:
    times: Counter[str] = Counter()
    for round_ in range(2000):
        times.update(asks(0.3).choose(TEN, 0, "root", round_))
    # 600 times each; five standard deviations are 103.
    assert all(500 < times[child] < 700 for child in TEN)


def test_by_default_everyone_takes_part_and_nobody_fails() -> None:
    rule = Participation()
    assert rule.choose(TEN, 0, "root", 1) == TEN
    assert [rule.fate(0, path, 1, 10) for path in TEN] == [("ok", 1.0)] * 10


def test_failures_are_as_frequent_as_the_rate_says() -> None:
    rule = Participation(failure_rate=0.2)
    fates = Counter(
        rule.fate(0, f"root/c{k}", round_, 1)[0] for k in range(50) for round_ in range(100)
    )
    # 1000 of 5000; five standard deviations are 141.
    assert 850 < fates["failed"] < 1150
    assert fates["ok"] == 5000 - fates["failed"]


def test_failures_strike_anew_in_every_round_and_client() -> None:
    rule = Participation(failure_rate=0.5)
    by_round = [rule.fate(0, "root/a", round_, 1)[0] for round_ in range(40)]
    by_client = [rule.fate(0, f"root/{k}", 1, 1)[0] for k in range(40)]
    assert set(by_round) == set(by_client) == {"ok", "failed"}
    assert by_round != by_client
    assert by_round == [rule.fate(0, "root/a", round_, 1)[0] for round_ in range(40)]


def test_more_failures_are_the_same_failures_and_others() -> None:
    def failed(rate: float) -> set[str]:
        rule = Participation(failure_rate=rate)
        paths = [f"root/{k}" for k in range(200)]
        return {path for path in paths if rule.fate(0, path, 1, 1)[0] == "failed"}

    assert failed(0.1) < failed(0.4)
    assert failed(0.0) == set()


@pytest.mark.parametrize(
    ("deadline", "fate"),
    [(None, ("ok", 5.0)), (5.0, ("ok", 5.0)), (4.999, ("late", 4.999)), (0.25, ("late", 0.25))],
)
def test_a_reply_is_late_only_after_the_deadline_and_costs_no_more_than_it(
    deadline: float | None, fate: tuple[str, float]
) -> None:
    rule = Participation(deadline=deadline, step_seconds=0.5)
    assert rule.fate(0, "root/a", 1, steps=10) == fate


def test_a_node_without_steps_of_its_own_is_never_late() -> None:
    rule = Participation(deadline=1e-9, speed_spread=5)
    assert rule.fate(0, "root/a", 1, steps=0) == ("ok", 0.0)


def test_who_fails_is_not_late() -> None:
    rule = Participation(deadline=0.1, failure_rate=0.5)
    fates = Counter(rule.fate(0, f"root/{k}", 1, steps=10)[0] for k in range(100))
    # 50 of 100; five standard deviations are 25.
    assert 25 < fates["failed"] < 75
    assert fates["late"] == 100 - fates["failed"]


def test_simulated_seconds_are_steps_times_seconds_per_step() -> None:
    assert Participation(step_seconds=0.25).seconds(0, "root/a", 12) == 3.0


def test_a_clients_speed_is_its_own_and_stays_for_the_run() -> None:
    rule = Participation(speed_spread=1.0)
    assert rule.seconds(0, "root/a", 10) == rule.fate(0, "root/a", 9, 10)[1]
    assert rule.seconds(0, "root/a", 20) == 2 * rule.seconds(0, "root/a", 10)
    assert rule.seconds(0, "root/a", 10) != rule.seconds(0, "root/b", 10)
    assert rule.seconds(0, "root/a", 10) != rule.seconds(1, "root/a", 10)


def test_the_logarithm_of_speeds_is_normal_with_the_spread_asked_for() -> None:
    rule = Participation(speed_spread=0.5, step_seconds=2.0)
    logs = [math.log(rule.seconds(0, f"root/{k}", 1) / 2.0) for k in range(2000)]
    # Five standard errors: 0.056 of the mean, 0.040 of the deviation.
    assert abs(np.mean(logs)) < 0.056
    assert abs(np.std(logs) - 0.5) < 0.040


@pytest.mark.parametrize(
    "options",
    [
        {"fraction": 0},
        {"fraction": 1.01},
        {"fraction": math.nan},
        {"failure_rate": 1},
        {"failure_rate": -0.01},
        {"deadline": 0},
        {"step_seconds": 0},
        {"speed_spread": -1},
        {"speed_spread": 5.01},
        {"deadlne": 3},
    ],
    ids=str,
)
def test_rules_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        Participation.model_validate(options)


def test_rules_cannot_change_during_a_run() -> None:
    rule = Participation()
    with pytest.raises(ValidationError):
        rule.fraction = 0.5  # type: ignore[misc]


def test_a_sample_drawn_once_stays_and_grows_when_newcomers_join() -> None:
    children = [f"root/c{k}" for k in range(10)]
    rules = Participation(fraction=0.5, sampling="once", newcomers=4, join_round=4)
    asked = [rules.choose(children, 0, "root", number) for number in range(1, 8)]
    assert len(asked[0]) == 3
    assert set(asked[0]) <= set(children[:6])
    assert asked[0] == asked[1] == asked[2]
    assert len(asked[3]) == 5
    assert set(asked[0]) < set(asked[3])
    assert asked[3] == asked[6]
    anew = Participation(fraction=0.5)
    assert len({tuple(anew.choose(children, 0, "root", number)) for number in range(1, 8)}) > 1

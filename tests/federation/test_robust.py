"""Rules by hand, their invariants, and what runs under them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.optimize import minimize
from scipy.stats import trim_mean

from hansa.config import load
from hansa.errors import InputError
from hansa.federation import robust_rules
from hansa.federation.federation import Federation
from hansa.federation.message import Tensors
from hansa.federation.methods import METHODS, FedAvg, LocalOnly, WorldLM
from hansa.federation.optimizer import Training
from hansa.federation.participation import Participation
from hansa.federation.robust import Robust, RobustMaskedMean, RobustMean
from hansa.federation.rules import Rules
from hansa.federation.tree import Tree
from support import clients, config, made, net, same

SURE = settings(deadline=None, derandomize=True, max_examples=50)
RULES = ("median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "norm_bound")


def merged(
    robust: Robust, rows: list[list[float]], before: list[float] | None = None
) -> list[float]:
    start = torch.tensor(before or [0.0] * len(rows[0]), dtype=torch.float64)
    mean = RobustMean(robust, {"t": start})
    for number, row in enumerate(rows):
        mean.add({"t": torch.tensor(row, dtype=torch.float64)}, number + 1)  # weights say nothing
    return mean.result()["t"].tolist()


def shared(
    robust: Robust, rows: list[list[float | None]], before: list[float], vacant: float = -1.0
) -> list[float]:
    """What becomes of rows in which None is not shared."""
    start = torch.tensor(before)
    mean = RobustMaskedMean(robust, {"t": start})
    for row in rows:
        mask = torch.tensor([value is None for value in row])
        mean.add({"t": torch.tensor([value or 0.0 for value in row])}, {"t": mask}, 1)
    return mean.result({"t": torch.full_like(start, vacant)})["t"].tolist()


def test_a_median_is_the_middle_or_the_mean_of_the_two_in_the_middle() -> None:
    assert merged(Robust(rule="median"), [[1, 9], [2, -5], [100, 3]]) == [2, 3]
    assert merged(Robust(rule="median"), [[1], [2], [4], [100]]) == [3]


def test_a_trimmed_mean_leaves_out_as_many_at_either_end() -> None:
    rows = [[-100.0], [1.0], [2.0], [6.0], [1000.0]]
    assert merged(Robust(rule="trimmed_mean", attackers=1), rows) == [3]
    assert merged(Robust(rule="trimmed_mean", attackers=0), rows) == [181.8]
    assert merged(Robust(rule="trimmed_mean", attackers=0.21), rows) == [2]  # two of five


def test_krum_is_the_reply_that_is_nearest_to_its_nearest_others() -> None:
    # n = 5, f = 1: two neighbours count. Scores: 1 + 9, 1 + 4, 4 + 9, 100-ish, 100-ish.
    rows = [[0.0], [1.0], [3.0], [50.0], [-60.0]]
    assert merged(Robust(rule="krum", attackers=1), rows) == [1]
    # The best four: all but -60.
    assert merged(Robust(rule="multi_krum", attackers=1), rows) == [13.5]


def test_the_geometric_median_of_a_row_is_its_median_and_of_a_cross_its_middle() -> None:
    (found,) = merged(Robust(rule="geometric_median"), [[0.0], [1.0], [50.0]])
    assert abs(found - 1) < 1e-4
    cross = [[-1.0, 0.0], [5.0, 0.0], [0.0, 2.0], [0.0, -9.0]]
    assert np.abs(merged(Robust(rule="geometric_median"), cross)).max() < 1e-4


def test_a_norm_bound_shortens_changes_and_keeps_their_direction() -> None:
    rows = [[4.0, 5.0], [1.0, 1.0]]  # changes (3, 4) of length 5, and none
    assert merged(Robust(rule="norm_bound", bound=1), rows, [1.0, 1.0]) == pytest.approx([1.3, 1.4])
    rows = [[0.0, 1.0], [0.0, 3.0], [0.0, 100.0]]
    assert merged(Robust(rule="norm_bound"), rows) == pytest.approx([0, 7 / 3])


def test_entries_are_merged_over_those_who_share_them() -> None:
    rows: list[list[float | None]] = [[1.0, None, 7.0], [2.0, None, None], [9.0, None, None]]
    before = [0.0, 5.0, 5.0]
    assert shared(Robust(rule="median"), rows, before) == [2, -1, 7]
    trimmed = Robust(rule="trimmed_mean", attackers=1)
    assert shared(trimmed, rows, before) == [2, -1, 7]
    # Of one who shares there is nothing to cut off; of two both stay.
    assert shared(trimmed, [[1.0], [3.0], [None]], [0.0]) == [2]


def test_to_rules_of_whole_replies_what_is_not_shared_did_not_change() -> None:
    # With 0 for what is hidden, the first three lie at a distance of at most 1 from each other.
    rows: list[list[float | None]] = [
        [1.0, None],
        [1.0, 0.5],
        [None, None],
        [1.0, 9.0],
        [-9.0, 9.0],
    ]
    assert shared(Robust(rule="krum", attackers=1), rows, [1.0, 0.0]) == [1, 0]
    # The reply that is chosen does not share the second entry, which others do: it stays.
    assert shared(Robust(rule="norm_bound", bound=1), [[3.0, None]], [1.0, 4.0]) == [2, -1]


def test_counters_take_their_median_and_no_part_in_distances() -> None:
    before = {"w": torch.zeros(1), "n": torch.tensor(0)}
    for rule in RULES:
        mean = RobustMean(Robust(rule=rule), before)
        for value, count in ((1.0, 10), (1.0, 20), (1.0, 10**9), (1.0, 30), (1.0, 10)):
            mean.add({"w": torch.full((1,), value), "n": torch.tensor(count)}, 1)
        found = mean.result()
        assert found["w"].tolist() == [1.0]
        assert (found["n"].item(), found["n"].dtype) == (20, torch.int64)


def test_too_few_replies_change_nothing_and_none_are_nothing() -> None:
    assert merged(Robust(rule="krum", attackers=1), [[1.0]] * 4, [7.0]) == [7]
    assert RobustMean(Robust(rule="krum"), {"t": torch.ones(1)}).result() == {}
    assert shared(Robust(rule="krum", attackers=1), [[1.0]] * 4, [7.0]) == [7]
    mean = RobustMean(Robust(rule="median"), {"t": torch.ones(1)})
    mean.add({"t": torch.zeros(1)}, 0)  # who says that there is nothing to merge
    assert mean.result() == {}
    with pytest.raises(ValueError, match="finite"):
        mean.add({"t": torch.zeros(1)}, math.nan)


def drawn(seed: int, num: int, size: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num, size))


@SURE
@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 2**32 - 1), num=st.integers(7, 12))
def test_the_order_of_replies_does_not_matter(rule, seed: int, num: int) -> None:
    rows = drawn(seed, num)
    order = np.random.default_rng(seed + 1).permutation(num)
    first = merged(Robust(rule=rule), rows.tolist())
    np.testing.assert_allclose(first, merged(Robust(rule=rule), rows[order].tolist()), atol=1e-6)


@SURE
@pytest.mark.parametrize("rule", RULES)
@given(
    row=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5
    ),
    num=st.integers(5, 9),
)
def test_replies_that_agree_are_the_result(rule, row: list[float], num: int) -> None:
    robust = Robust(rule=rule, **({"attackers": 1} if "krum" in rule else {}))
    mean = RobustMean(robust, {"t": torch.zeros(len(row))})
    for _ in range(num):
        mean.add({"t": torch.tensor(row)}, 1)
    assert torch.equal(mean.result()["t"], torch.tensor(row))


@SURE
@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
@given(seed=st.integers(0, 2**32 - 1), num=st.integers(5, 12), size=st.floats(0, 1e30))
def test_outliers_move_no_entry_beyond_the_range_of_the_honest(
    rule, seed: int, num: int, size: float
) -> None:
    bad = (num - 1) // 2
    rows = drawn(seed, num)
    rows[:bad] *= size
    robust = Robust(rule=rule, **({"attackers": bad} if rule == "trimmed_mean" else {}))
    found = np.array(merged(robust, rows.tolist()))
    assert (found >= rows[bad:].min(0) - 1e-12).all()
    assert (found <= rows[bad:].max(0) + 1e-12).all()


@SURE
@pytest.mark.parametrize("rule", ["krum", "multi_krum", "geometric_median"])
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(1e3, 1e30))
def test_far_outliers_do_not_carry_whole_replies_away(rule, seed: int, size: float) -> None:
    rows = drawn(seed, 11)
    rows[:3] *= size
    attackers = {} if rule == "geometric_median" else {"attackers": 3}
    found = np.array(merged(Robust(rule=rule, **attackers), rows.tolist()))
    assert np.abs(found).max() < 10


@SURE
@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 2**32 - 1), num=st.integers(7, 12))
def test_what_moves_all_replies_moves_the_result(rule, seed: int, num: int) -> None:
    rows, by = drawn(seed, num), np.array([3.0, -1.0, 0.5, 10.0])
    here = np.array(merged(Robust(rule=rule), rows.tolist()))
    there = merged(Robust(rule=rule), (rows + by).tolist(), by.tolist())
    np.testing.assert_allclose(there, here + by, atol=1e-6)


@SURE
@given(seed=st.integers(0, 2**32 - 1), num=st.integers(5, 12))
def test_entries_agree_with_numpy_and_scipy(seed: int, num: int) -> None:
    rows = drawn(seed, num)
    np.testing.assert_allclose(merged(Robust(rule="median"), rows.tolist()), np.median(rows, 0))
    found = merged(Robust(rule="trimmed_mean", attackers=2), rows.tolist())
    np.testing.assert_allclose(found, trim_mean(rows, (2 + 1e-6) / num), atol=1e-12)


@settings(SURE, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), num=st.integers(4, 9))
def test_the_geometric_median_is_the_least_sum_of_distances(seed: int, num: int) -> None:
    rows = drawn(seed, num)
    rows[0] *= 1e3

    def total(point: np.ndarray) -> float:
        return float(np.linalg.norm(rows - point, axis=1).sum())

    found = np.array(merged(Robust(rule="geometric_median"), rows.tolist()))
    best = minimize(total, np.median(rows, 0), method="Nelder-Mead", options={"maxiter": 5000})
    assert total(found) <= best.fun * (1 + 1e-5)


@SURE
@given(seed=st.integers(0, 2**32 - 1), num=st.integers(5, 11))
def test_krum_agrees_with_a_plain_computation(seed: int, num: int) -> None:
    rows, bad = drawn(seed, num), 1
    near = [
        sorted(float(((a - b) ** 2).sum()) for j, b in enumerate(rows) if j != i)
        for i, a in enumerate(rows)
    ]
    scores = [sum(row[: num - bad - 2]) for row in near]
    best = sorted(range(num), key=scores.__getitem__)
    krum = merged(Robust(rule="krum", attackers=bad), rows.tolist())
    assert krum == rows[best[0]].tolist()
    found = merged(Robust(rule="multi_krum", attackers=bad), rows.tolist())
    np.testing.assert_allclose(found, rows[best[: num - bad]].mean(0))


@pytest.mark.parametrize("rule", RULES)
def test_parts_make_the_whole(rule, monkeypatch) -> None:
    rows = drawn(0, 7, 9).tolist()
    whole = merged(Robust(rule=rule), rows)
    monkeypatch.setattr(robust_rules, "AT_ONCE", 14)  # two entries at a time
    np.testing.assert_allclose(merged(Robust(rule=rule), rows), whole, rtol=1e-12)


def federation(robust: Robust | None, method=None, kind: str = "sequential", **options):
    from hansa.federation.engines.plan import EngineOptions

    how = EngineOptions(
        kind=kind, workers=options.pop("workers", 1), stack=options.pop("stack", None)
    )
    return Federation(
        net(),
        clients(7),
        method or FedAvg(),
        Training(lr=0.1, batch_size=3),
        engine=how,
        robust=robust,
        **options,
    )


AVERAGING = [name for name, method in METHODS.items() if method.averages]


def test_all_methods_average_but_those_that_do_not() -> None:
    assert set(METHODS) - set(AVERAGING) == {"local", "centralised"}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", AVERAGING)
def test_every_method_runs_under_every_rule(name, rule) -> None:
    running = federation(Robust(rule=rule), made(name))
    start = running.state_of("root")
    history = running.run(2)
    model = running.state_of("root").group("model")
    assert all(tensor.isfinite().all() for tensor in model.values())
    assert any(not torch.equal(model[n], start.group("model")[n]) for n in model)
    assert set(history.table("ledger")["fate"].to_pylist()) == {"ok"}


@pytest.mark.parametrize("rule", RULES)
def test_processes_change_no_bit_and_stacks_only_the_rounding(rule) -> None:
    def model(**options) -> Tensors:
        running = federation(Robust(rule=rule), **options)
        running.run(2)
        return running.state_of("root").group("model")

    one = model()
    if rule in ("median", "krum"):
        assert same(one, model(workers=2))
    for name, tensor in model(kind="stacked", stack=4).items():
        torch.testing.assert_close(tensor, one[name], atol=1e-5, rtol=1e-4)


def test_inner_nodes_apply_the_rule_to_their_children() -> None:
    names = {f"c{k}": ("a" if k < 3 else "b") for k in range(7)}
    tree = Tree({**names, "a": "root", "b": "root"})
    running = federation(Robust(rule="median"), tree=tree)
    running.run(1)
    with pytest.raises(InputError, match=r"robust\.attackers: found 1 of the 2 children that root"):
        federation(Robust(rule="krum"), tree=tree)


def test_a_rule_without_enough_children_is_refused() -> None:
    with pytest.raises(InputError, match="krum needs 9"):
        federation(Robust(rule="krum", attackers=3))
    asked = Participation(fraction=0.5)
    with pytest.raises(InputError, match="2 of the 4 children that root"):
        federation(Robust(rule="trimmed_mean", attackers=2), participation=asked)
    federation(Robust(rule="trimmed_mean", attackers=2))
    with pytest.raises(InputError, match="2 of the 4"):
        federation(
            Robust(rule="trimmed_mean", attackers=2), rules={"root": Rules(participation=asked)}
        )


def test_methods_that_average_nothing_or_by_attention_are_refused() -> None:
    with pytest.raises(InputError, match="which averages nothing"):
        federation(Robust(rule="median"), LocalOnly())
    with pytest.raises(InputError, match="attention"):
        federation(Robust(rule="median"), WorldLM(keys=("body",)))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rule": "mode"}, "multi_krum"),
        ({"rule": "median", "attackers": 1}, "attackers belong to"),
        ({"rule": "krum", "attackers": 0.5}, "below 0.5"),
        ({"rule": "krum", "attackers": -1}, "negative"),
        ({"rule": "krum", "bound": 1.0}, "norm_bound"),
        ({"rule": "norm_bound", "bound": 0}, "positive"),
        ({"rule": "norm_bound", "bound": math.inf}, "finite"),
    ],
)
def test_wrong_options_are_refused(options, why) -> None:
    with pytest.raises(ValidationError, match=why):
        Robust.model_validate(options)


def test_a_configuration_reads_back_and_pruning_beside_it_is_refused(tmp_path) -> None:
    values = config(tmp_path, robust={"rule": "trimmed_mean", "attackers": 0.25})
    read = load(values)
    assert read.robust == Robust(rule="trimmed_mean", attackers=0.25)
    assert load(read.as_dict()) == read
    assert "robust" not in load(config(tmp_path)).as_dict()
    with pytest.raises(InputError, match="pruning"):
        load({**values, "pruning": {"method": "snip", "density": 0.5}})

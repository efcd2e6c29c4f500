from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from hansa.data import partition
from hansa.data.clients import Index, Split
from hansa.data.partition import Dirichlet, Group, Iid, Partition, Shards, Shift, deal, split
from hansa.errors import InputError
from hansa.seeding import numpy_generator

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=60)
SHARES: dict[Split, float] = {"validation": 0.15, "test": 0.25}
NO_CAPS: dict[Split, int | None] = {"train": None, "validation": None, "test": None}

seeds = st.integers(0, 2**32)


def numbers(values: list[int]) -> Index:
    return np.array(values, np.int64)


def balanced(classes: int, each: int) -> Index:
    return np.arange(classes * each) % classes


def positions(dealt: dict[str, Index]) -> list[int]:
    return [int(k) for part in dealt.values() for k in part]


def divided(
    labels: list[int],
    shares: dict[Split, float] = SHARES,
    caps: dict[Split, int | None] = NO_CAPS,
    seed: int = 0,
) -> dict[Split, Index]:
    everything = np.arange(len(labels))
    return split(numbers(labels), everything, shares, caps, numpy_generator(seed, "split"))


@pytest.mark.parametrize("kind", [Iid(), Shift()])
def test_samples_are_dealt_in_equal_numbers(kind: Iid | Shift) -> None:
    dealt = deal(kind, balanced(2, 5), None, 3, 0)
    assert sorted(len(part) for part in dealt.values()) == [3, 3, 4]
    assert sorted(positions(dealt)) == list(range(10))


def test_samples_are_dealt_at_random() -> None:
    dealt = deal(Iid(), balanced(2, 50), None, 2, 0)
    assert {len(set(part.tolist()) & set(range(50))) for part in dealt.values()}.isdisjoint({0, 50})


def test_names_of_clients_sort_in_the_order_of_dealing() -> None:
    names = list(deal(Iid(), balanced(2, 6), None, 12, 0))
    assert names == sorted(names)
    assert (names[0], names[9], names[11]) == ("client-00", "client-09", "client-11")
    assert next(iter(deal(Iid(), balanced(2, 6), None, 10, 0))) == "client-0"


@EXAMPLES
@given(
    kind=st.sampled_from([Iid(), Shift(), Shards(classes=1), Dirichlet(alpha=1, min_samples=2)]),
    labels=st.lists(st.integers(0, 3), min_size=24, max_size=60),
    clients=st.integers(1, 4),
    seed=seeds,
)
def test_no_sample_is_dealt_twice(
    kind: Iid | Shift | Shards | Dirichlet, labels: list[int], clients: int, seed: int
) -> None:
    try:
        dealt = deal(kind, numbers(labels), None, clients, seed)
    except InputError:
        # Possible only where a class has fewer samples than there are clients.
        assert isinstance(kind, Shards)
        assert min(Counter(labels).values()) < clients
        return
    found = positions(dealt)
    assert len(dealt) == clients
    assert all(len(part) for part in dealt.values())
    assert len(set(found)) == len(found)
    assert all(part.tolist() == sorted(part.tolist()) for part in dealt.values())
    assert set(found) <= set(range(len(labels)))
    if not isinstance(kind, Shards):
        assert len(found) == len(labels)


@EXAMPLES
@given(
    classes=st.integers(2, 6),
    each=st.integers(8, 14),
    clients=st.integers(1, 8),
    per_client=st.integers(1, 6),
    seed=seeds,
)
def test_shards_give_every_client_exactly_so_many_classes(
    classes: int, each: int, clients: int, per_client: int, seed: int
) -> None:
    per_client = min(per_client, classes)
    labels = balanced(classes, each)
    dealt = deal(Shards(classes=per_client), labels, None, clients, seed)
    held = [Counter(labels[part].tolist()) for part in dealt.values()]
    assert [len(mine) for mine in held] == [per_client] * clients
    holders = Counter(label for mine in held for label in mine)
    uses = [holders[label] for label in range(classes)]
    assert max(uses) - min(uses) <= 1
    for label in holders:
        shares = [mine[label] for mine in held if label in mine]
        assert sum(shares) == each
        assert max(shares) - min(shares) <= 1


def test_shards_of_more_classes_than_there_are_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        deal(Shards(classes=4), balanced(3, 5), None, 2, 0)
    assert str(caught.value) == "data.partition.classes: found 4; allowed: 1 to 3"


def test_shards_of_a_class_with_too_few_samples_is_refused() -> None:
    with pytest.raises(InputError, match="of which 3 share the 1 samples of a class"):
        deal(Shards(classes=2), numbers([0, 0, 0, 0, 1]), None, 3, 0)


def test_every_dirichlet_client_has_the_fewest_samples_asked_for() -> None:
    for seed in range(20):
        dealt = deal(Dirichlet(alpha=0.3, min_samples=15), balanced(10, 30), None, 10, seed)
        assert min(len(part) for part in dealt.values()) >= 15


def test_a_dirichlet_draw_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Dirichlet(alpha=0.3, min_samples=15)
    dealt = deal(options, balanced(10, 30), None, 10, 0)
    assert len(positions(dealt)) == 300
    monkeypatch.setattr(partition, "DIRICHLET_TRIES", 1)
    with pytest.raises(InputError, match="in 1 draws"):
        deal(options, balanced(10, 30), None, 10, 0)


def test_dirichlet_draws_end_with_an_error() -> None:
    with pytest.raises(InputError, match="in 100 draws some client had fewer than 2 of") as caught:
        deal(Dirichlet(alpha=1e-9, min_samples=2), numbers([0] * 40), None, 2, 0)
    assert caught.value.key == "data.partition.alpha"


def test_more_samples_than_there_can_be_for_every_client_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        deal(Dirichlet(min_samples=4), balanced(2, 5), None, 3, 0)
    assert str(caught.value) == (
        "data.partition.min_samples: found 4 for 3 clients; "
        "allowed: at most 3, as there are 10 samples"
    )


def test_alpha_goes_from_uneven_to_even() -> None:
    labels = balanced(10, 100)

    def largest_share(alpha: float) -> float:
        dealt = deal(Dirichlet(alpha=alpha, min_samples=2), labels, None, 5, 0)
        counts = [np.bincount(labels[part], minlength=10) for part in dealt.values()]
        return float(np.mean(np.max(counts, axis=0))) / 100

    assert largest_share(0.05) > 0.8
    assert 0.3 < largest_share(1.0) < 0.7
    assert largest_share(1e6) == pytest.approx(0.2, abs=0.01)


def test_dirichlet_divides_a_class_by_shares_of_the_right_spread() -> None:
    shares = []
    for seed in range(300):
        dealt = deal(Dirichlet(alpha=2.0, min_samples=2), np.zeros(1000, np.int64), None, 4, seed)
        shares.append(len(dealt["client-0"]) / 1000)
    # The first of four shares with concentration 2 is Beta(2, 6): mean 1/4, variance 1/48.
    assert np.mean(shares) == pytest.approx(1 / 4, abs=0.03)
    assert np.var(shares) == pytest.approx(1 / 48, rel=0.25)


def test_groups_become_clients_by_name() -> None:
    dealt = deal(
        Group(min_samples=2), balanced(2, 4), ["b", "a", "b", "a", "c", "d", "d", "d"], None, 0
    )
    assert {name: part.tolist() for name, part in dealt.items()} == {
        "0-a": [1, 3],
        "1-b": [0, 2],
        "2-d": [5, 6, 7],
    }


def test_the_first_groups_are_taken_when_fewer_clients_are_asked_for() -> None:
    dealt = deal(Group(min_samples=2), balanced(2, 3), ["b", "a", "b", "a", "c", "c"], 2, 0)
    assert list(dealt) == ["0-a", "1-b"]


def test_groups_whose_names_are_no_paths_stay_apart() -> None:
    groups = ["a/b", "a b", "é", "..", "x" * 99] * 2
    dealt = deal(Group(min_samples=2), balanced(2, 5), groups, None, 0)
    assert list(dealt) == ["0---", "1-a-b", "2-a-b", "3-" + "x" * 62, "4--"]
    assert [part.tolist() for part in dealt.values()] == [[3, 8], [1, 6], [0, 5], [4, 9], [2, 7]]


def test_the_partition_by_group_needs_groups() -> None:
    with pytest.raises(InputError, match=r"data\.group_column: found nothing"):
        deal(Group(), balanced(2, 10), None, None, 0)


@pytest.mark.parametrize(("clients", "found"), [(3, "3 of 2 groups"), (None, "all of 0 groups")])
def test_more_clients_than_groups_is_refused(clients: int | None, found: str) -> None:
    fewest = 2 if clients else 5
    with pytest.raises(InputError, match=f"{found} with at least {fewest} samples"):
        deal(Group(min_samples=fewest), balanced(2, 2), ["a", "a", "b", "b"], clients, 0)


@pytest.mark.parametrize("kind", [Iid(), Shards(classes=1), Dirichlet(min_samples=2), Shift()])
def test_more_clients_than_samples_is_refused(kind: Iid | Shards | Dirichlet | Shift) -> None:
    with pytest.raises(InputError) as caught:
        deal(kind, balanced(2, 3), None, 7, 0)
    assert str(caught.value) == "data.clients: found 7; allowed: at most the 6 samples"


def test_as_many_clients_as_samples_have_one_each() -> None:
    dealt = deal(Iid(), balanced(2, 3), None, 6, 0)
    assert [len(part) for part in dealt.values()] == [1] * 6


@pytest.mark.parametrize("kind", [Iid(), Shards(classes=1), Dirichlet(min_samples=2), Shift()])
def test_the_number_of_clients_must_be_given(kind: Iid | Shards | Dirichlet | Shift) -> None:
    with pytest.raises(InputError, match=rf"data\.clients: found nothing.*'{kind.kind}'"):
        deal(kind, balanced(2, 3), None, None, 0)


@pytest.mark.parametrize("kind", [Iid(), Shards(classes=2), Dirichlet(min_samples=2), Shift()])
def test_dealing_depends_on_the_seed_alone(kind: Iid | Shards | Dirichlet | Shift) -> None:
    first, again, other = (
        {name: part.tolist() for name, part in deal(kind, balanced(5, 20), None, 4, s).items()}
        for s in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("size", "test", "validation", "train"),
    [(1, 0, 0, 1), (2, 1, 0, 1), (3, 1, 1, 1), (4, 1, 1, 2), (20, 5, 3, 12), (100, 25, 15, 60)],
)
def test_a_class_is_split_by_shares(size: int, test: int, validation: int, train: int) -> None:
    splits = divided([4] * size)
    assert [len(splits[s]) for s in ("test", "validation", "train")] == [test, validation, train]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"validation": 0.0, "test": 0.25}, (8, 0, 2)),
        ({"validation": 0.25, "test": 0.0}, (8, 2, 0)),
        ({"validation": 0.0, "test": 0.0}, (10, 0, 0)),
        ({"validation": 0.09, "test": 0.9}, (1, 0, 9)),
    ],
)
def test_a_share_of_zero_holds_nothing_and_training_never_less_than_one(
    shares: dict[Split, float], expected: tuple[int, int, int]
) -> None:
    splits = divided([0] * 10, shares)
    assert tuple(len(splits[s]) for s in ("train", "validation", "test")) == expected


def test_caps_hold_for_each_class_and_add_to_no_other_split() -> None:
    labels = [0] * 20 + [1] * 3
    splits = divided(labels, caps={"train": 2, "validation": None, "test": 4})
    assert [
        np.bincount(numbers(labels)[splits[s]]).tolist() for s in ("train", "validation", "test")
    ] == [[2, 1], [3, 1], [4, 1]]


def test_a_split_draws_among_the_clients_samples_only() -> None:
    mine = numbers([1, 4, 5, 8])
    splits = split(np.zeros(9, np.int64), mine, SHARES, NO_CAPS, numpy_generator(0))
    assert sorted(np.concatenate(list(splits.values())).tolist()) == [1, 4, 5, 8]


def test_a_split_depends_on_its_stream() -> None:
    first, again, other = (
        {name: part.tolist() for name, part in divided([0, 1] * 20, seed=s).items()}
        for s in (1, 1, 2)
    )
    assert first == again
    assert first != other


@EXAMPLES
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=50),
    test=st.floats(0, 0.6),
    validation=st.floats(0, 0.39),
    cap=st.none() | st.integers(1, 5),
    seed=seeds,
)
def test_splits_are_disjoint_and_score_only_classes_trained_on(
    labels: list[int], test: float, validation: float, cap: int | None, seed: int
) -> None:
    splits = divided(
        labels,
        {"validation": validation, "test": test},
        {"train": cap, "validation": None, "test": cap},
        seed,
    )
    found = [int(k) for part in splits.values() for k in part]
    assert len(found) == len(set(found))
    trained = {labels[k] for k in splits["train"]}
    assert trained == set(labels)
    if cap is None:
        assert sorted(found) == list(range(len(labels)))
    else:
        counts = Counter(labels[k] for k in splits["train"])
        assert max(counts.values()) <= cap
    assert all(part.tolist() == sorted(part.tolist()) for part in splits.values())


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "random"},
        {"kind": "iid", "alpha": 1},
        {"kind": "shards", "classes": 0},
        {"kind": "dirichlet", "alpha": 0},
        {"kind": "dirichlet", "alpha": "inf"},
        {"kind": "dirichlet", "min_samples": 1},
        {"kind": "group", "min_samples": 1},
        {"kind": "shift", "shifts": []},
        {"kind": "shift", "shifts": ["blur"]},
        {"kind": "shift", "noise": 2.5},
    ],
    ids=str,
)
def test_options_of_a_partition_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Partition).validate_python(options)

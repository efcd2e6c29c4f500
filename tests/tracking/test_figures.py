"""Numbers of a round, by hand."""

import pytest

from hansa.federation.engines.engine import RoundResult, Visit
from hansa.federation.history import History, tables_of
from hansa.tracking.figures import ROUND, SUMMARY, of_round, of_summary


def result(**changes: object) -> RoundResult:
    about = {
        "number": 3,
        "visits": (
            Visit("root/a", "ok", 100, 40, metrics={"loss": (6.0, 3.0), "accuracy": (1.0, 3.0)}),
            Visit("root/b", "failed", 100),
        ),
        "scores": {
            "root/a": {"test": {"accuracy": (1.0, 4.0)}, "state": {"epsilon": (2.0, 1.0)}},
            "root/b": {"test": {"accuracy": (3.0, 4.0)}, "state": {"epsilon": (5.0, 1.0)}},
        },
        "seconds": 1.5,
        "engine": "sequential",
        "figures": (("root", "root/a", "attention", 0.25), ("root", "root/b", "attention", 0.75)),
    }
    return RoundResult(**{**about, **changes})  # type: ignore[arg-type]


def test_numbers_of_a_round_are_means_over_clients_and_sums_of_bytes() -> None:
    found = of_round(tables_of(result()))
    assert found == {
        "test/accuracy": 0.5,
        "state/epsilon": 3.5,
        "state/epsilon_largest": 5.0,
        "figures/attention": 0.5,
        "train/loss": 2.0,
        "train/accuracy": pytest.approx(1 / 3),
        "bytes/up": 40.0,
        "bytes/down": 200.0,
        ROUND: 1.5,
    }
    assert list(found)[-1] == ROUND


def test_of_a_language_model_leaves_alone_count_and_perplexity_is_told() -> None:
    def scored(loss: float) -> dict[str, dict[str, tuple[float, float]]]:
        return {"test": {"loss": (loss, 1.0), "bits_per_byte": (loss, 1.0)}}

    visits = tuple(Visit(path, "ok", 1) for path in ("root/x", "root/x/a", "root/x/b"))
    scores = {"root/x": scored(9.0), "root/x/a": scored(0.0), "root/x/b": scored(1.0)}
    found = of_round(tables_of(result(visits=visits, scores=scores, figures=())))
    assert found["test/loss"] == 0.5
    assert found["test/perplexity"] == pytest.approx((1 + 2.718281828) / 2)
    assert "train/loss" not in found


def test_a_summary_is_flat_and_ends_with_its_seconds() -> None:
    summary = {"seconds": 2.0, "metrics": {"accuracy": {"mean": 0.5}}, "speed": {"engine": "x"}}
    assert list(of_summary(summary).items()) == [
        ("summary/metrics/accuracy/mean", 0.5),
        (SUMMARY, 2.0),
    ]


def test_epsilon_is_a_node_s_own_or_nobody_s() -> None:
    def scores(*sums: tuple[float, float]) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
        names = ("root/a", "root/north")
        return {name: {"state": {"epsilon": each}} for name, each in zip(names, sums, strict=True)}

    history = History()
    history.add(tables_of(result(number=1, scores=scores((1.0, 1.0), (4.0, 1.0)))))
    assert history.epsilons() == {"a": 1.0, "north": 4.0}
    history.add(tables_of(result(number=2, scores=scores((2.0, 1.0), (9.0, 3.0)))))
    assert history.epsilons() == {"a": 2.0, "north": None}

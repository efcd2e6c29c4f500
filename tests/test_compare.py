"""The grid of methods and seeds: what is run, what is kept, and what the figures say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import wilcoxon

import hansa
from hansa.report.comparison import Comparison, Pair, _holm, _spread
from support import config

METHODS = {"local": {}, "half": {"name": "fedselect", "limit": 0.5}}


def grid(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return config(tmp_path, **{"rounds": 2, "participation": {}, "methods": METHODS, **changes})


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Comparison:
    folder = tmp_path_factory.mktemp("grid")
    return hansa.compare(grid(folder), seeds=(0, 1))


def test_every_label_is_run_on_every_seed(found: Comparison) -> None:
    assert {label: list(runs) for label, runs in found.runs.items()} == {
        "local": [0, 1],
        "half": [0, 1],
    }
    run = found.runs["half"][1]
    assert run.path == found.path / "half-seed1"
    assert run.config.method == hansa.FedSelect(limit=0.5)
    assert (run.config.seed, run.config.rounds) == (1, 2)
    # Two methods on one seed see the same data.
    assert run.data_fingerprint == found.runs["local"][1].data_fingerprint
    assert run.data_fingerprint != found.runs["half"][0].data_fingerprint


def test_figures_are_means_over_seeds_of_means_over_clients(found: Comparison) -> None:
    for label, runs in found.runs.items():
        means = [run.history.summary()["metrics"]["accuracy"]["mean"] for run in runs.values()]
        row = found.rows[label]["accuracy"]
        assert row["mean"] == pytest.approx(sum(means) / 2)
        assert row["std"] == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
    assert found.rows["half"]["method"] == "fedselect"
    assert found.rows["local"]["bytes"] == 0 < found.rows["half"]["bytes"]


def test_pairs_compare_the_same_clients(found: Comparison) -> None:
    (pair,) = found.pairs
    a, b = found.accuracies["local"], found.accuracies["half"]
    differences = [a[s][c] - b[s][c] for s in (0, 1) for c in a[s]]
    assert len(differences) == 8
    assert (pair.first, pair.second) == ("local", "half")
    assert pair.difference == pytest.approx(sum(differences) / 8)
    assert pair.wins == sum(d > 0 for d in differences)
    assert pair.losses == sum(d < 0 for d in differences)
    expected = wilcoxon(differences).pvalue if any(differences) else 1.0
    assert pair.p == pytest.approx(float(expected))


def test_holms_correction_by_hand() -> None:
    pairs = [Pair("a", str(k), 0, 0, 0, p) for k, p in enumerate([0.03, 0.01, 0.9, 0.02])]
    assert [round(pair.p, 6) for pair in _holm(pairs)] == [0.06, 0.04, 0.9, 0.06]
    assert [pair.p for pair in _holm([Pair("a", "b", 0, 0, 0, 0.6)] * 2)] == [1.0, 1.0]


def test_a_spread_over_one_seed_is_zero() -> None:
    assert _spread([0.5]) == {"mean": 0.5, "std": 0.0}
    assert _spread([]) is None


def test_finished_runs_are_kept_and_interrupted_ones_go_on(tmp_path) -> None:
    whole = hansa.compare(grid(tmp_path / "whole", rounds=3), seeds=(0,))
    folder = tmp_path / "parts"
    seen = []
    hansa.compare(grid(folder, rounds=3), methods=["local"], seeds=(0,))
    kept = (folder / "t" / "local-seed0" / "summary.json").stat().st_mtime_ns
    # What a kill leaves: a run of which two rounds are there, and one that was just being made.
    cut = hansa.train({**config(folder, participation={}, rounds=2), **_cell(folder, "half")})
    (cut.path / "summary.json").unlink()
    (folder / "t" / "fedavg-seed0").mkdir()
    (folder / "t" / "fedavg-seed0" / "checkpoint.json").write_text("{}")
    found = hansa.compare(
        grid(folder, rounds=3),
        methods=["local", "half", "fedavg"],
        seeds=(0,),
        watch=lambda done, total, run: seen.append((done, total, run.path.name)),
    )
    assert seen == [(1, 3, "local-seed0"), (2, 3, "half-seed0"), (3, 3, "fedavg-seed0")]
    assert (folder / "t" / "local-seed0" / "summary.json").stat().st_mtime_ns == kept
    assert {path.name for path in (folder / "t").iterdir()} == {
        "local-seed0",
        "half-seed0",
        "fedavg-seed0",
    }
    assert found.accuracies["half"] == whole.accuracies["half"]


def _cell(folder: Path, label: str) -> dict[str, Any]:
    method = {"name": "fedselect", "limit": 0.5}
    return {"name": label, "output": str(folder / "t"), "method": method}


def test_processes_change_nothing(tmp_path, found: Comparison) -> None:
    parallel = hansa.compare(grid(tmp_path), seeds=(0, 1), processes=2)
    assert parallel.accuracies == found.accuracies


def test_a_run_of_another_configuration_is_refused(tmp_path) -> None:
    hansa.compare(grid(tmp_path), methods=["local"], seeds=(0,))
    with pytest.raises(hansa.InputError, match=r"found a run with another training\.lr"):
        hansa.compare(grid(tmp_path), methods=["local"], seeds=(0,), overrides=["training.lr=0.2"])
    with pytest.raises(hansa.InputError, match="rounds: found 1; allowed: at least the 2"):
        hansa.compare(grid(tmp_path, rounds=1), methods=["local"], seeds=(0,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ()}, "--seeds: found nothing"),
        ({"seeds": (1, 1)}, "--seeds: found 1, 1; allowed: different seeds"),
        ({"seeds": (-1,)}, "seed: found -1"),
        ({"processes": 0}, "--processes: found 0"),
        ({"overrides": ["seed=7"]}, "--set: found seed; allowed: --seeds"),
        ({"overrides": ["data.test=0.0"]}, r"data.test: found 0.0; allowed: more than 0"),
        ({"overrides": ["methods.half.limit=2"]}, r"method.limit: found 2; allowed: less"),
        ({"methods": ["fedsel"]}, "--methods: found 'fedsel'; allowed: local, half, local, fedavg"),
        ({"methods": ["local", "local"]}, "--methods: found local, local; allowed: different"),
    ],
)
def test_wrong_input_is_named_before_any_work(
    tmp_path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(hansa.InputError, match=message):
        hansa.compare(grid(tmp_path), **{"seeds": (0,), **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({}, "--methods: found nothing"),
        ({"a": {"name": "fedselect", "alpha": 1}}, "method.alpha: found an unknown key"),
        ({"a": {}}, "method.name: found 'a'"),
        ({"a/b": {"name": "local"}}, "name: found 'a/b'"),
        ({"fedper": {"personal": ["tail"]}}, r"method.personal: found 'tail'"),
        (3, "methods: found 3"),
    ],
)
def test_wrong_tables_are_named_before_any_work(tmp_path, methods: Any, message: str) -> None:
    with pytest.raises(hansa.InputError, match=message):
        hansa.compare(grid(tmp_path, methods=methods), seeds=(0,))
    assert not list(tmp_path.iterdir())


def test_variants_of_the_configured_method_take_its_options(tmp_path) -> None:
    found = hansa.compare(
        grid(tmp_path, rounds=1),
        methods=["fedselect", "random-mask", "fedavg", "half"],
        seeds=(0,),
        overrides=["method.limit=0.4", "methods.half.rate=0.1"],
    )
    methods = {label: runs[0].config.method for label, runs in found.runs.items()}
    assert methods == {
        "fedselect": hansa.FedSelect(rate=0.2, limit=0.4),
        "random-mask": hansa.RandomMask(rate=0.2, limit=0.4),
        "fedavg": hansa.FedAvg(),
        "half": hansa.FedSelect(rate=0.1, limit=0.5),
    }


def test_methods_keep_their_own_defaults(tmp_path) -> None:
    found = hansa.compare(
        {k: v for k, v in grid(tmp_path, rounds=1).items() if k != "method"}, ["scaffold"], (0,)
    )
    assert found.runs["scaffold"][0].config.method == hansa.Scaffold()


def test_a_run_that_was_extended_and_interrupted_is_not_taken_as_finished(tmp_path) -> None:
    run = hansa.compare(grid(tmp_path, rounds=1), ["local"], (0,)).runs["local"][0]

    def stop(_: object, result: Any) -> None:
        if result.number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hansa.train(resume=run.path, overrides=["rounds=3"], watch=stop)
    assert not (run.path / "summary.json").exists()
    hansa.compare(grid(tmp_path, rounds=3), ["local"], (0,))
    assert json.loads((run.path / "summary.json").read_text())["rounds"] == 3


def test_a_folder_of_something_else_is_left_alone(tmp_path) -> None:
    folder = tmp_path / "t" / "local-seed0"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(hansa.InputError, match=r"a folder that is no run \(notes.txt\)"):
        hansa.compare(grid(tmp_path), ["local"], (0,))


def test_equal_differences_tie() -> None:
    shares = [(k + 2) / 20 for k in range(10)]
    comparison = Comparison(Path(), {"a": {}, "b": {}})
    comparison.__dict__["accuracies"] = {
        "a": {0: {str(k): share for k, share in enumerate(shares)}},
        "b": {0: {str(k): share + (0.05 if k < 4 else -0.05) for k, share in enumerate(shares)}},
    }
    (pair,) = comparison.pairs
    assert (pair.wins, pair.losses) == (6, 4)
    assert pair.p == pytest.approx(wilcoxon([-1.0] * 4 + [1.0] * 6).pvalue)


def test_the_page_shows_every_label_and_needs_nothing_from_elsewhere(found: Comparison) -> None:
    text = found.report().read_text()
    assert "<title>Hansa: t</title>" in text
    assert "seeds 0, 1" in text
    for heading in ("Results", "Paired tests against local"):
        assert f"<h2>{heading}</h2>" in text
    titles = re.findall(r'aria-label="([^"]*)"', text)
    assert titles == [
        "Test accuracy of every client",
        "Test accuracy over rounds",
        "Every model on every client&#39;s data, local, seed 0",
        "Personal share of every layer, half, seed 0",
        "Every model on every client&#39;s data, half, seed 0",
        "Overlap of the clients&#39; masks, half, seed 0",
    ]
    row = found.rows["half"]["accuracy"]
    assert f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f} %" in text
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert json.dumps(found.rows)  # plain values

"""The stage and its commands: by a table, by training, for clients of unlike devices."""

import json
from pathlib import Path

import pytest

from hansa.bundle import read_bundle
from hansa.cli import main
from hansa.config import load as load_training
from hansa.errors import InputError
from hansa.models import Architecture, build, restore
from hansa.models.blox_space import parameters
from hansa.search import recipes
from hansa.search.generate import choose, generate
from hansa.search.store import Store
from hansa.search.tables import merge, open_table, write
from hansa.search.training import score
from hansa.searching import search
from tiny_recipe import TINY

MODELS = [int(model) for model in choose("random:12")]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    generate(folder / "table.sqlite", TINY, [(m, s) for m in MODELS for s in (0, 1)])
    write(merge([open_table(folder / "table.sqlite")]), folder / "table.parquet")
    return folder / "table.parquet"


@pytest.fixture(autouse=True)
def _known(monkeypatch) -> None:
    monkeypatch.setitem(recipes.RECIPES, TINY.name, TINY)


def _values(table: Path, tmp_path: Path, /, **changes: object) -> dict[str, object]:
    values = {"table": str(table), "output": str(tmp_path), "budget": 6, "repeats": 3}
    return {**values, "searcher": "random", **changes}


def test_a_search_by_a_table_finds_the_best_of_what_it_asked(table, tmp_path) -> None:
    found = search(_values(table, tmp_path))
    summary = found.summary
    assert len(summary["answers"]) == 6
    best = max(summary["answers"], key=lambda answer: answer["validation"])
    assert summary["model"] == best["model"] == found.model
    data = open_table(table)
    assert summary["test_accuracy"] == pytest.approx(data.test_accuracy(found.model))
    optimum = max(data.test_accuracy(model) for model in MODELS)
    assert summary["regret"] == pytest.approx(optimum - data.test_accuracy(found.model))
    assert summary["repeats"].keys() == {"random"}
    assert json.loads((found.path / "search.json").read_text()) == summary
    assert "Best so far" in found.report.read_text()


def test_the_bundle_holds_the_model_trained_by_its_recipe(table, tmp_path) -> None:
    found = search(_values(table, tmp_path, seed=1))
    made = read_bundle(found.bundle)
    module = restore(made)
    correct, _ = score(module, recipes.open_data(TINY).test)
    assert made.card["stage"] == "search"
    assert made.card["metrics"]["test_accuracy"] == correct / TINY.test
    assert sum(p.numel() for p in module.parameters()) == parameters([found.model], 2, 12, 3)[0]


def test_a_table_of_others_is_searched_and_gives_no_bundle(tmp_path) -> None:
    rows = {
        f"{code:08d}": {
            "test_acc": [50.0 + k, 51.0 + k],
            "mean_acc": 50.5 + k,
            "std": 0.5,
            "params": 10.0 + k,
            "flops": 20.0 + k,
        }
        for k, code in enumerate([0, 1, 2, 10, 11, 12, 20])
    }
    (tmp_path / "macro.json").write_text(json.dumps(rows))
    values = {"table": str(tmp_path / "macro.json"), "searcher": "by_cost", "budget": 3}
    found = search({**values, "repeats": 2, "output": str(tmp_path)})
    assert found.bundle is None
    assert found.model == 6  # 00000020 in base three, of the most multiply-adds

    def refuse(text: str) -> None:
        raise AssertionError(text)

    told = json.loads((found.path / "search.json").read_text(), parse_constant=refuse)
    assert told["train_seconds"] is None
    assert told["regret"] == 0
    with pytest.raises(InputError, match="recipe"):
        search({**values, "recipe": TINY.name, "output": str(tmp_path)})


def test_limits_hold_for_every_model_that_is_asked_for(table, tmp_path) -> None:
    data = open_table(table)
    most = int(sorted(data.column("parameters"))[5])
    found = search(_values(table, tmp_path, limits={"parameters": most}, budget=50, train=False))
    assert {a["model"] for a in found.summary["answers"]} == {
        m for m in MODELS if data.parameters(m) <= most
    }


def test_a_search_by_training_goes_on_after_it_was_interrupted(tmp_path, monkeypatch) -> None:
    values = {"by": "training", "recipe": TINY.name, "searcher": "evolution", "budget": 5}
    values |= {"options": {"population": 3, "tournament": 2}, "limits": {"parameters": 12_000}}
    whole = search({**values, "output": str(tmp_path / "whole")})
    assert all(parameters([a["model"]], 2, 12, 3)[0] <= 12_000 for a in whole.summary["answers"])

    def stop(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search({**values, "output": str(tmp_path / "cut")}, watch=stop)
    place = next((tmp_path / "cut").iterdir())
    assert Store(place / "table.sqlite").progress(TINY.name) == (3, 3)
    again = search({**values, "output": str(tmp_path / "cut")})

    def told(found) -> list[tuple[int, float]]:
        return [(a["model"], a["validation"]) for a in found.summary["answers"]]

    assert told(again) == told(whole)
    assert read_bundle(again.bundle).card["metrics"] == read_bundle(whole.bundle).card["metrics"]


def test_proxies_are_held_to_the_tables_accuracies(table, tmp_path) -> None:
    found = search(_values(table, tmp_path, proxies=["params", "synflow"], proxy_models=8))
    told = found.summary["proxies"]
    assert told["models"] == 8
    assert all(-1 <= each["test"] <= 1 for each in told["correlations"].values())
    warm = search(_values(table, tmp_path / "warm", prior="params", searcher="evolution"))
    assert warm.summary["models"] == 6


def test_a_search_asks_from_the_top_of_what_blocks_or_a_supernet_say(tmp_path) -> None:
    values = {"by": "training", "recipe": TINY.name, "searcher": "by_cost", "budget": 2}
    values |= {"priors": {"steps": 1, "fitted": 4}, "output": str(tmp_path), "train": False}
    told: list[str] = []
    for name in ("lana", "dna", "donna", "supernet"):
        told.clear()
        found = search({**values, "prior": name}, watch=lambda what, *_: told.append(what))
        assert found.summary["models"] == 2
        # The first has trained the teacher and the blocks, and those after it find them.
        assert ("training the teacher" in told) == (name == "lana")
        assert ("training the supernet" in told) == (name == "supernet")


def test_clients_get_what_they_can_run_and_a_federation_each(table, tmp_path) -> None:
    data = open_table(table)
    sizes = sorted(data.column("parameters"))
    small, large = int(sizes[2]), int(sizes[-1])
    values = _values(table, tmp_path, train=False)
    values["clients"] = {
        "train": str(Path(__file__).parents[2] / "examples" / "digits-fedavg.toml"),
        "limits": {
            "client-0": {"parameters": small},
            "client-2": {"parameters": small},
            "client-1": {"parameters": large},
        },
    }
    found = search(values)
    groups = {each["model"]: list(each["clients"]) for each in found.summary["groups"]}
    assert sorted(groups.values()) in (
        [["client-0", "client-2"], ["client-1"]],
        [["client-0", "client-2", "client-1"]],
    )
    for model, clients in groups.items():
        config = load_training(found.path / f"train-{model}.toml")
        network = build(
            Architecture(
                shape=(1, 8, 8), classes=10, **config.model.model_dump(include={"name", "options"})
            )
        )
        assert sum(p.numel() for p in network.parameters()) == parameters([model], 2, 10, 1)[0]
        assert config.model.name == "blox"
        assert config.model.options["arch"] == model
        assert list(config.data.only or ()) == clients
    small_model = next(m for m, clients in groups.items() if "client-0" in clients)
    within = [m for m in MODELS if data.parameters(m) <= small]
    assert small_model == max(sorted(within), key=data.validation_accuracy)


def test_a_federation_trains_the_model_that_its_clients_were_given(tmp_path) -> None:
    from hansa.training import train

    run = train(
        {
            "output": str(tmp_path),
            "rounds": 1,
            "data": {"clients": 3, "size": [8, 8], "only": ["client-0", "client-2"]},
            "model": {"name": "blox", "options": {"arch": 45, "width": 2, "norm": "group"}},
            "training": {"steps": 1},
        }
    )
    assert read_bundle(run.path / "bundle").architecture["options"]["arch"] == 45
    assert run.config.data.only == ("client-0", "client-2")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"searcher": "guess"}, "^searcher: found 'guess'; allowed: random, "),
        ({"proxies": ["magic"]}, "^proxies: found 'magic'"),
        ({"prior": "hope"}, "^prior: found 'hope'"),
        ({"limits": {"parameters": 1}}, r"limits\.parameters"),
        ({"limits": {"latency": 1.0}}, "profile first"),
        ({"by": "training", "table": None}, "recipe"),
        ({"recipe": "imagenet"}, "recipe"),
        ({"recipe": "digits16-w8", "by": "training"}, "made by tiny"),
        ({"clients": {"train": "no.toml", "limits": {"one": {}}}}, r"no\.toml"),
        ({"table": "missing.parquet"}, "no file"),
        ({"budget": 0}, "budget"),
        ({"options": {"colour": 1}}, "^options: .*colour"),
        ({"clients": {"limits": {"one": {"parameters": 1}}}}, r"clients\.limits\.one"),
    ],
)
def test_wrong_input_is_named_before_anything_is_made(table, tmp_path, changes, match) -> None:
    values = {k: v for k, v in _values(table, tmp_path, **changes).items() if v is not None}
    with pytest.raises(InputError, match=match):
        search(values)
    assert list(tmp_path.iterdir()) == []


def test_the_commands_from_a_table_to_a_model(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def run(arguments: list[str]) -> int:
        monkeypatch.setattr("sys.argv", ["hansa", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    made = ["search", "table", "generate", "t.sqlite", "--recipe", "tiny"]
    assert run([*made, "--models", "random:3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done"] == 3
    assert run(["search", "table", "merge", "t.parquet", "t.sqlite"]) == 0
    capsys.readouterr()
    assert run(["search", "table", "query", "--table", "t.parquet", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)
    assert run(["search", "table", "query", str(best["model"]), "--table", "t.parquet"]) == 0
    assert f"parameters: {best['parameters']}" in capsys.readouterr().out
    (tmp_path / "c.toml").write_text('table = "t.parquet"\nsearcher = "random"\nrepeats = 2\n')
    assert run(["search", "c.toml", "--json", "--out", "found"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"] == 3
    assert Path(found["bundle"]).is_dir()
    for wrong in (["--models", "none"], ["--recipe", "none"], ["--models", "all:3"]):
        assert run([*made, *wrong]) == 2
        assert "hansa: " in capsys.readouterr().err

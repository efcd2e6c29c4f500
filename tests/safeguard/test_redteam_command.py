"""The red team through the real command: what it writes, and wrong input in one line."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attacked
import pytest
import tomli_w

from hansa.bundle import read_bundle
from hansa.cli import main
from hansa.errors import InputError
from hansa.handover.card import model_card
from hansa.redteam import redteam, with_scorecard
from hansa.safeguard.world import World
from hansa.safeguard_config import load

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    def run(source: dict[str, Any] | Path, *arguments: str) -> tuple[int, str, str]:
        if isinstance(source, dict):
            (tmp_path / "config.toml").write_text(tomli_w.dumps(source))
            source = tmp_path / "config.toml"
        monkeypatch.setattr(sys, "argv", ["hansa", "redteam", str(source), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models that have learned nothing."""
    return attacked.folder(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folder(untrained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(untrained, tmp_path / untrained.name)
    return tmp_path / untrained.name


def test_from_models_to_a_scorecard(command: Run, tmp_path: Path) -> None:
    folder = attacked.folder(tmp_path, attacked.trained(World(attacked.WORLD)))
    quick = {"name": "full", "lrs": [1e-3, 3e-3, 1e-2], "steps": 60, "batch": 8}
    config = attacked.config(tmp_path, attacks=[quick], probes=[10])
    status, out, err = command(config, "--json", "--join")
    assert (status, err) == (0, "")
    card = json.loads(out)
    assert card["roles"].keys() == {"unprotected", "before", "safeguarded", "never"}
    # What the models are like, and that an attack brings back what nobody trained on.
    assert card["retained"]["unprotected"] == 1.0
    assert card["recovery"]["unprotected"]["0"] == 1.0
    assert card["recovery"]["safeguarded"]["0"] < 0.7
    assert card["attacks"]["full"]["status"] == "valid"
    assert card["recovery"]["safeguarded"]["60"] > card["recovery"]["safeguarded"]["0"] + 0.2
    never = card["roles"]["never"]["attacks"]["full"]
    told = max(point["worst"]["recovered"] for point in never["points"].values())
    assert never["learned"]["score"] > 0.6 > told
    assert card["attacks"]["int4"]["status"] in ("valid", "invalid")
    assert card["cost_in_steps"] == {"before": 15.0, "safeguarded": 30.0}
    made = folder / "redteam"
    assert json.loads((made / "scorecard.json").read_text())["recovery"] == card["recovery"]
    assert "no guarantee" in (made / "scorecard.md").read_text()
    page = (made / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert not re.search(r"(src|href)=.https?:|<link|@import", page)
    assert page.index("does not show") < page.index("Recovered, worst case")
    # The scorecard has joined the bundle's card.
    parent, joined = read_bundle(folder / "bundle"), read_bundle(folder / "bundle-redteam")
    assert joined.lineage[-2:] == [
        {"stage": "safeguard", "digest": parent.digest},
        {"stage": "redteam", "digest": joined.digest},
    ]
    assert joined.card["metrics"]["redteam"]["recovery"] == card["recovery"]
    assert joined.card["metrics"]["redteam"]["flags"][0]["kind"] == "few seeds"
    assert joined.weights.keys() == parent.weights.keys()
    text = model_card(joined, "transformers", "unknown", "world")
    shares = [f"{share:.2f}" for _, share in sorted(card["recovery"]["safeguarded"].items())]
    assert all(share in text.split("| safeguarded |")[1].split("\n")[0] for share in shares)
    assert text.index("worst case first") < text.index("## Privacy spent")
    # Again: nothing is attacked twice, and the same is said.
    times = {path: path.stat().st_mtime_ns for path in (made / "cells").iterdir()}
    assert json.loads(command(config, "--json")[1])["recovery"] == card["recovery"]
    assert {path: path.stat().st_mtime_ns for path in (made / "cells").iterdir()} == times
    status, out, _ = command(config)
    assert status == 0
    assert "Recovered, worst case" in out
    assert "no guarantee" in out


def test_a_bundle_alone(command: Run, folder: Path) -> None:
    one = ["--set=redteam.seeds=[0]", "--set=redteam.probes=[2]", "--set=redteam.edits=[]"]
    only = '--set=redteam.attacks=[{name="full", lrs=[0.001], steps=2, batch=4}]'
    status, out, err = command(folder / "bundle", *one, only, "--json")
    assert (status, err) == (0, "")
    card = json.loads(out)
    assert list(card["roles"]) == ["safeguarded"]
    assert card["bundle"] == read_bundle(folder / "bundle").digest
    told = [flag["kind"] for flag in card["flags"]]
    assert told.count("no control") == 3
    assert "under-powered" in told
    assert card["attacks"]["full"]["status"] == "unknown"
    assert Path(card["path"]) == folder / "redteam-bundle"


def test_a_scorecard_joins_its_own_bundle_alone(folder: Path) -> None:
    config = attacked.config(folder.parent, attacks=[], seeds=[0])
    card, options = redteam(config).scorecard, load(config).redteam
    with pytest.raises(InputError, match="the scorecard of"):
        with_scorecard(folder / "models" / "before" / "bundle", card, options)
    assert with_scorecard(folder / "bundle", card, options) == folder / "bundle-redteam"


@pytest.mark.parametrize(
    ("redteam_options", "key", "words"),
    [
        ({"attacks": [{"name": "a", "data": "none"}]}, "redteam.attacks.0.data", "switch"),
        ({"edits": [{"name": "a", "kind": "x", "amount": 1}]}, "redteam.edits.0.kind", "prune"),
        ({"attacks": [{"name": "a"}, {"name": "a"}]}, "redteam", "'a' twice"),
        ({"attacks": [{"name": "int4"}]}, "redteam", "'int4' twice"),
        ({"attacks": [{"name": "int8"}], "edits": None}, "redteam.attacks", "'int8'"),
        ({"attacks": [{"name": "a", "roles": ["x"]}]}, "redteam.attacks.roles", "before"),
        ({"attacks": [{"name": "a", "rate": 1}]}, "redteam.attacks.0.rate", "lrs"),
        ({"templates": ["shouted"]}, "redteam.templates", "neutral"),
        ({"device": "abacus"}, "redteam.device", "cpu"),
        ({"processes": 0}, "redteam.processes", "1"),
        ({"harness": {"tasks": []}}, "redteam.harness.tasks", "1 item"),
    ],
)
def test_wrong_options(
    command: Run, folder: Path, redteam_options: dict[str, Any], key: str, words: str
) -> None:
    config = attacked.config(folder.parent, **redteam_options)
    config["redteam"] = {k: v for k, v in config["redteam"].items() if v is not None}
    check(command(config), key, words)
    assert not (folder / "redteam").exists()


def check(ended: tuple[int, str, str], key: str, words: str) -> None:
    status, out, err = ended
    assert (status, out) == (2, "")
    assert err.startswith(f"hansa: {key}: found ")
    assert err.count("\n") == 1
    assert words in err


def test_without_models(command: Run, tmp_path: Path) -> None:
    place = tmp_path / "small-seed0-safeguard" / "models.json"
    check(command(attacked.config(tmp_path)), str(place), "hansa safeguard CONFIG")


@pytest.mark.parametrize("content", ["{", "[]", '{"roles": {}, "cost_in_steps": {}}'])
def test_models_that_are_none(command: Run, folder: Path, content: str) -> None:
    (folder / "models.json").write_text(content)
    place = str(folder / "models.json")
    check(command(attacked.config(folder.parent)), place, "hansa safeguard CONFIG")


def test_a_bundle_that_is_not_there(command: Run, folder: Path, tmp_path: Path) -> None:
    status, _, err = command(tmp_path / "none")
    assert status == 2
    assert err.count("\n") == 1
    shutil.rmtree(folder / "models" / "before" / "bundle")
    place = folder / "models" / "before" / "bundle" / "card.json"
    check(command(attacked.config(folder.parent)), str(place), "a bundle's folder")


def test_other_tokens_and_other_data(command: Run, folder: Path) -> None:
    larger = attacked.config(folder.parent)
    larger["data"]["entities"] = 20
    check(command(larger), "data", "tokens")
    other = attacked.config(folder.parent)
    other["data"]["seed"] = 1
    check(command(other), "data", "other data than unprotected was made with")


def test_a_folder_of_something_else(command: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    ended = command(attacked.config(folder.parent), "--out", str(tmp_path / "mine"))
    check(ended, "--out", "letter.txt")

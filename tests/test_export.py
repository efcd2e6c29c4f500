"""A client's own model as a bundle."""

import pytest
import torch

import hansa
from hansa.federation.methods import METHODS
from hansa.models import Architecture, build
from hansa.training import prepare
from support import OPTIONS, config


def test_an_exported_bundle_is_the_client_s_model_with_its_masks_and_line(tmp_path) -> None:
    run = hansa.train(config(tmp_path, participation={}))
    made = hansa.export(run.path, "client-1")
    read = hansa.read_bundle(run.path / "clients" / "client-1")
    assert read.digest == made.digest
    assert [step["stage"] for step in read.lineage] == ["train", "personalise"]
    assert read.labels == [str(digit) for digit in range(10)]
    assert read.lineage[0]["digest"] == hansa.read_bundle(run.path / "bundle").digest

    trial = prepare(run.config)
    model = build(Architecture(**read.architecture))
    model.load_state_dict(dict(read.weights))
    inputs, labels = trial.data.clients["client-1"].batch("test")
    with torch.no_grad():
        accuracy = (model.eval()(inputs).argmax(1) == labels).double().mean().item()
    scored = run.history.scored("test", "accuracy")[4]["client-1"]
    assert accuracy == pytest.approx(scored)
    assert read.card["metrics"]["client"] == "client-1"
    assert read.card["metrics"]["test"]["accuracy"] == scored
    assert read.card["metrics"]["round"] == 4

    held = {
        row["metric"].removeprefix("personal:"): row["sum"]
        for row in run.history.table("scores").to_pylist()
        if (row["round"], row["node"], row["split"]) == (4, "root/client-1", "state")
    }
    assert {name: float(mask.sum()) for name, mask in read.masks.items()} == held


@pytest.mark.parametrize("name", METHODS)
def test_an_exported_model_is_the_one_on_the_card(tmp_path, name: str) -> None:
    run = hansa.train(config(tmp_path, rounds=2, method={"name": name, **OPTIONS.get(name, {})}))
    made = hansa.export(run, "client-2", tmp_path / "mine")
    model = build(Architecture(**made.architecture))
    model.load_state_dict(dict(made.weights))
    inputs, labels = prepare(run.config).data.clients["client-2"].batch("test")
    with torch.no_grad():
        accuracy = (model.eval()(inputs).argmax(1) == labels).double().mean().item()
    assert made.card["metrics"]["test"]["accuracy"] == pytest.approx(accuracy)
    assert made.card["metrics"]["scored"] == METHODS[name].scored


def test_an_unfinished_run_has_no_common_model_to_descend_from(tmp_path) -> None:
    run = hansa.train(config(tmp_path, rounds=1))

    def stop(_: object, result: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hansa.train(resume=run.path, overrides=["rounds=2"], watch=stop)
    made = hansa.export(run.path, "client-0")
    assert [step["stage"] for step in made.lineage] == ["personalise"]


def test_a_method_without_a_common_model_exports_as_well(tmp_path) -> None:
    run = hansa.train(config(tmp_path, method={"name": "local"}))
    assert [step["stage"] for step in hansa.export(run, "client-0").lineage] == ["personalise"]


def test_what_cannot_be_exported_is_refused(tmp_path) -> None:
    run = hansa.train(config(tmp_path, rounds=1))
    with pytest.raises(hansa.InputError, match="client: found 'client-9'; allowed: one of client"):
        hansa.export(run, "client-9")
    with pytest.raises(hansa.InputError, match="client: found 'root'"):
        hansa.export(run, "root")
    (tmp_path / "taken").mkdir()
    with pytest.raises(hansa.InputError, match="a file or folder that is no bundle"):
        hansa.export(run, "client-0", tmp_path / "taken")
    with pytest.raises(hansa.InputError, match="no run"):
        hansa.export(tmp_path, "client-0")


def test_an_exported_model_is_where_another_run_can_start(tmp_path) -> None:
    run = hansa.train(config(tmp_path, rounds=1))
    hansa.export(run, "client-0", tmp_path / "mine")
    model = {"options": {"hidden": [8]}, "bundle": str(tmp_path / "mine")}
    again = hansa.train(config(tmp_path, rounds=1, model=model, method={"name": "fedavg"}))
    stages = [s["stage"] for s in hansa.read_bundle(again.path / "bundle").lineage]
    assert stages == ["train", "personalise", "train"]

"""The prune stage: from a configuration or a bundle to a pruned bundle and its page."""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from typer.testing import CliRunner

import hansa
from hansa.cli import app
from hansa.config import load
from hansa.data.federate import federate
from hansa.deploy.options import read_deployment
from hansa.errors import InputError
from hansa.models import restore
from hansa.models.masks import attach
from hansa.prune import _batches
from hansa.pruning import ProsPr, find_masks
from hansa.training import make_model
from support import same

CONFIG: dict[str, Any] = {
    "name": "p",
    "rounds": 1,
    "data": {"clients": 3, "train_per_class": 8},
    "model": {"name": "resnet20", "options": {"width": 4, "norm": "batch"}},
    "training": {"lr": 0.1, "batch_size": 16},
    "pruning": {"method": "snip", "density": 0.05},
}


def configured(tmp_path: Path, **pruning: Any) -> dict[str, Any]:
    options = {**CONFIG["pruning"], **pruning}
    return {**CONFIG, "output": str(tmp_path), "pruning": options}


def command(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["prune", *map(str, arguments), "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    return dict(json.loads(done.stdout))


def test_a_bundle_holds_the_masked_weights_and_what_was_found(tmp_path) -> None:
    made = hansa.prune(configured(tmp_path))
    assert made.path == tmp_path / "p-snip-0.05"
    assert {path.name for path in made.path.iterdir()} == {"bundle", "report.html", "summary.json"}
    bundle = hansa.read_bundle(made.path / "bundle")
    assert bundle.digest == made.bundle.digest
    assert bundle.lineage[-1]["stage"] == "prune"
    assert json.loads((made.path / "summary.json").read_text()) == made.summary
    kept = sum(int(mask.sum()) for mask in bundle.kept.values())
    total = sum(mask.numel() for mask in bundle.kept.values())
    assert kept == round(0.05 * total)
    assert made.summary["density"] == kept / total
    counts = made.summary["parameters"]
    assert counts["before"] - counts["after"] == total - kept
    for layer in made.summary["layers"]:
        mask = bundle.kept[layer["name"]]
        dead = sum(not bool(row.any()) for row in mask)
        assert (layer["total"], layer["kept"], layer["dead"]) == (mask.numel(), mask.sum(), dead)
    model = restore(bundle)
    assert same(model.state_dict(), bundle.weights)
    for name, mask in bundle.kept.items():
        assert not bundle.weights[name][~mask].any()
    page = made.report.read_text()
    assert "Share of each layer&#39;s weights" in page or "Share of each layer's weights" in page
    assert "Scores of weights" in page
    assert "<script" not in page


def test_the_same_masks_as_by_hand(tmp_path) -> None:

    values = configured(tmp_path, method="prospr", iterations=2, scope="layer")
    config = load(values)
    assert config.pruning is not None
    data = federate(config.data, config.seed)
    model, _, _ = make_model(config, data)
    batches = list(_batches(config, config.pruning, data))
    assert len(batches) == 8
    assert len({tuple(y.tolist()) for _, y in batches}) == 8
    expected = find_masks(model, batches, 0.05, ProsPr(), iterations=2, scope="layer").masks
    made = hansa.prune(values)
    assert same(made.bundle.kept, expected)
    assert same(made.bundle.weights, attached_state(model, expected))


def attached_state(
    model: torch.nn.Module, masks: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    state = dict(model.state_dict())
    return {**state, **{name: torch.where(mask, state[name], 0.0) for name, mask in masks.items()}}


def test_flops_by_hand(tmp_path) -> None:
    """An MLP of 64, 32 and 10: two operations for each weight."""
    values = configured(tmp_path, density=0.5, densities={"head": 0.25})
    values["model"] = {"name": "mlp", "options": {"hidden": [32]}}
    summary = hansa.prune(values).summary
    assert summary["flops"] == {"before": 2 * (64 * 32 + 32 * 10), "after": 64 * 32 + 160}
    assert summary["parameters"] == {
        "before": 64 * 32 + 32 + 32 * 10 + 10,
        "after": 64 * 16 + 32 + 80 + 10,
    }


def test_the_command_prunes_trains_shrinks_and_prunes_again(tmp_path) -> None:
    path = tmp_path / "config.toml"
    values = {key: value for key, value in CONFIG.items() if key != "pruning"}

    path.write_text(tomli_w.dumps({**values, "output": str(tmp_path)}))
    first = command(path, "--method", "prospr", "--density", 0.5, "--structured")
    assert first["structured"]
    assert first["parameters"]["after"] < 0.6 * first["parameters"]["before"]
    assert set(first["forward_seconds"]) == {"before", "after"}
    small = hansa.read_bundle(first["bundle"])
    assert not small.masks
    run = hansa.train(
        {**values, "output": str(tmp_path), "model": {**CONFIG["model"], "bundle": first["bundle"]}}
    )
    trained = hansa.read_bundle(run.path / "bundle")
    assert trained.architecture == small.architecture
    assert [each["stage"] for each in trained.lineage] == ["prune", "train"]
    second = command(
        run.path / "bundle", "--method", "magnitude", "--density", 0.3, "--out", tmp_path / "second"
    )
    again = hansa.read_bundle(second["bundle"])
    assert [each["stage"] for each in again.lineage] == ["prune", "train", "prune"]
    assert sum(p.numel() for p in restore(again).parameters()) == first["parameters"]["after"]
    done = CliRunner().invoke(app, ["prune", second["bundle"], "--density", "0.1"])
    assert isinstance(done.exception, InputError)
    assert "pruned already" in str(done.exception)


@pytest.mark.parametrize(
    ("pruning", "structured", "key"),
    [
        ({"density": 0}, False, "pruning.density"),
        ({"density": 1.1}, False, "pruning.density"),
        ({"method": "nope"}, False, "pruning.method"),
        ({"options": {"batchs": 3}}, False, "pruning"),
        ({"densities": {"nope": 0.5}}, False, "pruning.densities.nope"),
        ({"exclude": ["nope"]}, False, "pruning.exclude"),
        ({"iterations": 2}, True, "pruning.iterations"),
        ({"scope": "erk"}, True, "pruning.scope"),
        ({"batch_size": 0}, False, "pruning.batch_size"),
    ],
)
def test_wrong_input_leaves_nothing_behind(tmp_path, pruning, structured, key) -> None:
    with pytest.raises(InputError) as caught:
        hansa.prune(configured(tmp_path, **pruning), structured=structured)
    assert caught.value.key == key
    assert not list(tmp_path.iterdir())


def test_nothing_to_do_and_nothing_there(tmp_path) -> None:
    values = {key: value for key, value in CONFIG.items() if key != "pruning"}
    with pytest.raises(InputError, match="--density"):
        hansa.prune(values)
    with pytest.raises(InputError, match="no such file"):
        hansa.prune(tmp_path / "nope.toml")


def test_a_deployment_refuses_pruning(tmp_path) -> None:

    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps({**configured(tmp_path), "deploy": {}}))
    with pytest.raises(InputError, match="pruning"):
        read_deployment(path)


def test_masks_survive_a_restored_and_attached_model(tmp_path) -> None:
    bundle = hansa.prune(configured(tmp_path)).bundle
    model = attach(restore(bundle), bundle.kept)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    optimizer.step()
    head = model.get_submodule("head")
    assert not head.weight[~bundle.kept["head.weight"]].any()

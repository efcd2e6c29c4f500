"""Language models over a tree, from configuration to run: the train stage on texts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import hansa
from hansa.config import load
from hansa.errors import InputError
from hansa.federation.message import Message
from hansa.seeding import generator
from hansa.training import prepare
from support import same

WORDS = {
    "root": "the tree stands on its root and the root in the ground",
    "A": "north of the river people speak slowly and of the weather",
    "a1": "snow and ice and snow and wind and ice again",
    "a2": "boats nets fish salt boats nets fish salt",
    "b1": "figs dates olives figs dates olives",
    "b2": "sand sun sand sun well sand sun well",
}
NODES: dict[str, dict[str, Any]] = {
    "root": {},
    "A": {},
    "B": {},
    "a1": {"parent": "A"},
    "a2": {"parent": "A"},
    "b1": {"parent": "B"},
    "b2": {"parent": "B"},
}
SMALL = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Data at the root and at one of two inner nodes; two key blocks that can be had."""
    nodes = {name: dict(options) for name, options in NODES.items()}
    for name, words in WORDS.items():
        pool = words.split()
        drawn = torch.randint(len(pool), (100,), generator=generator(0, name)).tolist()
        (tmp_path / f"{name}.txt").write_text(" ".join(pool[k] for k in drawn))
        nodes[name]["text"] = f"file:{tmp_path / name}.txt"
    return {
        "name": "t",
        "output": str(tmp_path / "runs"),
        "rounds": 3,
        "text": {"context": 8},
        "nodes": nodes,
        "model": {"options": dict(SMALL)},
        "training": {"optimizer": "adamw", "lr": 0.01, "batch_size": 2, "steps": 2},
        "method": {"name": "worldlm", "threshold": 0.9999},
        "engine": {"kind": "sequential", "workers": 1},
    }


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The configuration with one dotted key set, or taken out where the value is None."""
    first, _, rest = key.partition(".")
    below = dict(config)
    if rest:
        below[first] = changed(dict(config.get(first, {})), rest, value)
    elif value is None:
        below.pop(first, None)
    else:
        below[first] = value
    return below


def outcome(run: hansa.Run) -> tuple[Any, ...]:
    """All that a run leaves behind but its folder's name and its seconds."""
    names = ("scores", "ledger", "figures", "pairs")
    tables = {name: run.history.table(name).to_pylist() for name in names}
    states = {
        path.relative_to(run.path): path.read_bytes()
        for path in sorted((run.path / "states").rglob("*.msg"))
    }
    summary = json.loads((run.path / "summary.json").read_text())
    del summary["run"], summary["seconds"], summary["speed"]
    return tables, states, summary


# From configuration to run.


def test_a_run_on_texts_scores_every_node_at_both_moments(config: dict[str, Any]) -> None:
    run = hansa.train(config)
    scores = run.history.table("scores").to_pylist()
    found = {(row["node"], row["split"], row["metric"]) for row in scores}
    for name in WORDS:
        path = {"root": "root", "A": "root/A"}.get(name, f"root/{name[0].upper()}/{name}")
        for split in ("test", "validation", "test:trained"):
            assert {(path, split, m) for m in ("loss", "accuracy", "bits_per_byte")} <= found
    assert not any(node == "root/B" for node, _, _ in found)
    metrics = run.history.summary()["metrics"]
    assert {"perplexity", "perplexity_after_local_steps", "bits_per_byte"} <= metrics.keys()
    loss = run.history.scored("test", "loss")[3]
    leaves = [math.exp(loss[name]) for name in ("a1", "a2", "b1", "b2")]
    assert metrics["perplexity"]["mean"] == pytest.approx(sum(leaves) / 4)
    # Bytes are tokens here, so that bits per byte are bits per token.
    bits = run.history.scored("test", "bits_per_byte")[3]
    assert bits == pytest.approx({name: value / math.log(2) for name, value in loss.items()})
    assert any(
        row["name"] == "residuals_came" and row["value"]
        for row in run.history.table("figures").to_pylist()
    )


def test_training_learns_something(config: dict[str, Any]) -> None:
    """From about the eight bits that a byte has."""
    values = {**config, "training": {**config["training"], "lr": 0.05, "steps": 8}}
    bits = hansa.train(values).history.scored("test", "bits_per_byte")
    assert all(bits[3][name] < min(7, bits[1][name] - 0.3) for name in WORDS)


def test_the_bundle_holds_the_roots_model(config: dict[str, Any]) -> None:
    run = hansa.train(config)
    bundle = hansa.read_bundle(run.path / "bundle")
    trial = prepare(run.config)
    trial.federation.keep_states_in(run.store(), run.round)
    assert same(bundle.weights, trial.federation.model_of("root").state_dict())


@pytest.mark.parametrize(
    "method",
    [
        {"name": "worldlm", "share_keys": False},
        {"name": "worldlm", "keys": ["model.model.layers.0"], "schedule": "parallel"},
        {"name": "worldlm", "server": {"kind": "nesterov", "lr": 0.7}},
        {"name": "hierfavg", "inner_rounds": 2},
        {"name": "diloco"},
        {"name": "fedper", "personal": ["*.layers.1.*"]},
        {"name": "local"},
        {"name": "fedavg"},
        {"name": "centralised"},
    ],
    ids=lambda m: " ".join(map(str, m.values())),
)
def test_every_method_runs_and_what_it_writes_reads_back(
    config: dict[str, Any], method: dict[str, Any]
) -> None:
    run = hansa.train({**config, "method": method, "rounds": 2})
    again = hansa.Run(run.path)
    assert again.config == run.config == load(run.config.as_dict())
    assert set(run.history.scored("test", "loss")[2]) == set(WORDS)


def test_a_node_without_a_parent_stands_below_the_root(config: dict[str, Any]) -> None:
    tree = load(config).shape()
    assert tree.children("root") == ("root/A", "root/B")
    assert tree.path_of("a1") == "root/A/a1"


def test_byte_pairs_are_those_of_the_roots_text(config: dict[str, Any]) -> None:
    """No other node's text changes them."""
    values = {**config, "text": {"context": 8, "tokenizer": "bpe", "vocabulary": 280}}
    first = prepare(load(values)).data.tokenizer
    file = Path(config["nodes"]["b1"]["text"].removeprefix("file:"))
    file.write_text("entirely other words " * 60)
    second = prepare(load(values)).data.tokenizer
    assert first is not None
    assert second is not None
    assert first.as_json() == second.as_json()
    run = hansa.train({**values, "rounds": 1})
    loss, bits = (run.history.scored("test", m)[1]["a1"] for m in ("loss", "bits_per_byte"))
    assert bits < loss / math.log(2)


# Interruption.


class Killed(BaseException):
    """The power fails."""


def test_an_interrupted_run_ends_as_if_it_had_not_been(config: dict[str, Any]) -> None:
    """With every state on disk, private nodes, failing children and a server that remembers."""
    values = {
        **config,
        "engine": {"kind": "sequential", "workers": 1, "state_memory_mb": 0},
        "participation": {"failure_rate": 0.2},
        "method": {
            **config["method"],
            "most": 2,
            "server": {"kind": "nesterov", "lr": 0.7, "momentum": 0.9},
        },
    }
    values = changed(values, "nodes.a1.privacy", {"unit": "update", "noise": 0.01})
    values = changed(values, "nodes.A.privacy", {"unit": "gradient", "noise": 0.5, "epsilon": 50.0})
    whole = hansa.train(values)

    def watch(run: hansa.Run, result: Any) -> None:
        if result.number == 2:
            raise Killed

    with pytest.raises(Killed):
        hansa.train({**values, "name": "broken"}, watch=watch)
    rest = hansa.train(resume=Path(config["output"]) / "broken-seed0")
    assert outcome(rest) == outcome(whole)


def test_a_kill_within_a_round_leaves_the_states_of_the_last_one(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mid-tree: the first federation has answered, and the second never does."""
    from hansa.federation.methods import WorldLM

    values = changed(config, "engine.state_memory_mb", 0)
    whole = hansa.train(values)
    real = WorldLM.reply

    def reply(self: WorldLM, node: Any, state: Any) -> Message:
        if node.round == 2 and node.path == "root/B":
            raise Killed
        return real(self, node, state)

    with monkeypatch.context() as patch:
        patch.setattr(WorldLM, "reply", reply)
        with pytest.raises(Killed):
            hansa.train({**values, "name": "broken"})
    broken = Path(config["output"]) / "broken-seed0"
    assert hansa.Run(broken).round == 1
    assert outcome(hansa.train(resume=broken)) == outcome(whole)


def test_a_run_that_is_extended_goes_on_with_its_batches(config: dict[str, Any]) -> None:
    """``training.steps`` goes on where the last round stopped."""
    config = {**config, "compare_up_to": 0}  # else the first part compares after its last round
    whole = hansa.train(config)
    part = hansa.train({**config, "rounds": 1})
    assert outcome(hansa.train(resume=part.path, overrides=["rounds=3"])) == outcome(whole)


def test_another_text_is_another_run(config: dict[str, Any]) -> None:
    run = hansa.train({**config, "rounds": 1})
    Path(config["nodes"]["b1"]["text"].removeprefix("file:")).write_text("other words " * 90)
    with pytest.raises(InputError, match=r"found data .*; allowed: the run's data"):
        hansa.train(resume=run.path, overrides=["rounds=2"])


# The engine.


def test_stacked_llamas_are_as_single_ones(config: dict[str, Any]) -> None:
    """Four leaves below one root; one shape of work, whatever the length of their texts."""
    nodes = {n: {"text": config["nodes"][n]["text"]} for n in ("a1", "a2", "b1", "b2")}
    values = {**config, "nodes": nodes, "rounds": 2}
    values["method"] = {"name": "worldlm", "temperature": 1.0, "residuals": False}
    one = hansa.train(values)
    many = hansa.train({**values, "engine": {"kind": "stacked", "stack": 4, "workers": 1}})
    engine = many.history.table("rounds")["engine"].to_pylist()[-1]
    assert "stack" in engine
    assert "one by one" not in engine
    first, second = (hansa.read_bundle(run.path / "bundle").weights for run in (one, many))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-4, atol=1e-5)
    for split in ("test", "test:trained", "validation"):
        losses = [run.history.scored(split, "loss")[2] for run in (one, many)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_methods_are_compared_on_texts(config: dict[str, Any]) -> None:
    found = hansa.compare({**config, "rounds": 1}, ["fedavg", "worldlm"], [0])
    assert set(found.runs) == {"fedavg", "worldlm"}
    options = found.runs["worldlm"][0].config.method
    assert options.model_dump()["threshold"] == 0.9999
    assert found.runs["fedavg"][0].data_fingerprint == found.runs["worldlm"][0].data_fingerprint


# Privacy, by the configuration.


def test_a_private_node_tells_its_epsilon_and_stops_at_its_budget(config: dict[str, Any]) -> None:
    budget = {"unit": "update", "noise": 1.0, "clip": 1.0, "epsilon": 8.0}
    run = hansa.train(changed(changed(config, "nodes.a1.privacy", budget), "rounds", 4))
    epsilon = run.history.scored("state", "epsilon")
    spent = [epsilon[number]["a1"] for number in (1, 2, 3, 4)]
    assert set(epsilon[4]) == {"a1"}
    assert spent[0] < spent[1] <= 8
    assert spent[3] <= 8
    fates = [
        row["fate"] for row in run.history.table("ledger").to_pylist() if row["node"] == "root/A/a1"
    ]
    stops = fates.index("spent")
    assert fates == ["ok"] * stops + ["spent"] * (4 - stops)
    assert len(set(spent[:stops])) == stops
    assert len(set(spent[stops - 1 :])) == 1
    node = {"unit": "update", "noise": 1.0, "delta": 1e-5, "epsilon": spent[3], "drawn": "seed"}
    made = hansa.read_bundle(run.path / "bundle")
    assert made.privacy == [{"stage": "train", "nodes": {"a1": node}}]
    assert made.labels == []
    own = hansa.export(run, "a1")  # tells it once, by its parent
    assert own.privacy == made.privacy


def test_a_card_tells_of_all_private_nodes_and_of_ancestors(config: dict[str, Any]) -> None:
    """Rules of A hold for its own text and below it; without noise epsilon is infinite."""
    config = changed(config, "nodes.A.privacy", {"noise": 0.0})
    first = hansa.train(changed(config, "rounds", 1))
    start = hansa.read_bundle(first.path / "bundle")
    node = {"unit": "gradient", "noise": 0.0, "delta": 1e-5, "epsilon": None, "drawn": "seed"}
    assert start.privacy == [{"stage": "train", "nodes": dict.fromkeys(("A", "a1", "a2"), node)}]
    config = changed(config, "nodes.A.privacy", None)
    config = changed(config, "model.bundle", str(first.path / "bundle"))
    again = hansa.train(changed(config, "name", "again"))
    assert hansa.read_bundle(again.path / "bundle").privacy == start.privacy


# Wrong input: one line that names the key.

FILE = "file:{}/a1.txt"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("nodes.A.parent", "a1", r"nodes\.A: found the cycle A -> a1 -> A"),
        ("nodes.A.parent", "A", r"nodes\.A: found the cycle A -> A"),
        ("nodes.A.parent", "north", r"nodes\.A: found the parent 'north'; allowed: 'root' or a"),
        ("nodes.root.parent", "A", r"nodes\.root\.parent: found 'A'"),
        ("nodes.a b", {"text": FILE}, r"nodes\.a b: found the name 'a b'"),
        ("nodes.b1.text", None, r"nodes\.b1\.text: found nothing; allowed: text, which every leaf"),
        ("nodes.b1.text", "b1.txt", r"nodes\.b1\.text: found 'b1.txt'; allowed: 'python:KIND'"),
        ("nodes.b1.text", "file:/nowhere", r"nodes\.b1\.text: found no file at /nowhere"),
        ("text.context", 500, r"nodes\..*\.text: found \d+ sequences of 500 tokens for train"),
        ("training.batch_size", 300, r"nodes\..*\.text: found .*one batch, which is 300"),
        ("method.keys", ["layers.0"], r"method\.keys: found 'layers.0'; allowed: model\.model\.la"),
        ("method.keys", 3, r"method\.keys: found 3; allowed: 0 to 2 blocks"),
        ("nodes.a1.tokenizer", "bpe", r"nodes\.a1\.tokenizer: found 'bpe'.*common to all nodes"),
        ("nodes.a1.texts", FILE, r"nodes\.a1\.texts: found an unknown key;.*did you mean text\?"),
        ("nodes.a1.privacy", {"noise": -1.0}, r"nodes\.a1\.privacy\.noise: found -1"),
        ("nodes.a1.privacy", {"unit": "user"}, r"nodes\.a1\.privacy\.unit: found 'user'"),
        ("nodes.a1.privacy", {"sigma": 1.0}, r"nodes\.a1\.privacy\.sigma: found an unknown key"),
        ("nodes.a1.privacy", {"noise": 0.0, "epsilon": 1.0}, r"nodes\.a1\.privacy: .*budget needs"),
        ("nodes.a1.privacy", {"clip": math.inf}, r"nodes\.a1\.privacy: .*clip = inf needs noise"),
        ("nodes.A.participation", {"newcomers": 1}, r"nodes\.A\.participation\.newcomers: found 1"),
        ("nodes.A.participation", {"fraction": 2.0}, r"nodes\.A\.participation\.fraction: found 2"),
        ("nodes.a1.steps", 0, r"nodes\.a1\.steps: found 0"),
        ("training.steps", 0, r"training\.steps: found 0"),
        ("data", {"clients": 3}, r"data: found a table beside \[nodes\]"),
        ("tree", {"federations": 2}, r"tree: found a table beside \[nodes\]"),
        ("pruning", {"method": "snip", "density": 0.5}, r"pruning: found a table beside \[nodes\]"),
        ("model.name", "mlp", r"model\.name: found 'mlp'; allowed: llama, gpt2, transformers"),
        ("method", {"name": "ditto"}, r"nodes\.A: found data of an inner node with method 'ditto'"),
        (
            "method",
            {"name": "worldlm", "share_keys": False, "residuals": True},
            "method: .*share_k",
        ),
        ("nodes", None, r"nodes: found nothing; allowed: the nodes of the tree"),
        (
            "text.tokenizer",
            "own",
            r"text\.tokenizer: found 'own'; allowed: 'bytes', 'bpe' or 'bundle'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value[0] in "ntdpm" else "",
)
def test_wrong_input_is_named_and_leaves_nothing_behind(
    config: dict[str, Any], key: str, value: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        hansa.train(changed(config, key, value))
    assert not Path(config["output"]).exists()


def test_byte_pairs_need_text_at_the_root(config: dict[str, Any]) -> None:
    values = changed(changed(config, "nodes.root.text", None), "text.tokenizer", "bpe")
    with pytest.raises(InputError, match=r"text\.tokenizer: found 'bpe' and no text at the root"):
        hansa.train(values)


def test_a_language_model_needs_nodes() -> None:
    with pytest.raises(InputError, match="nodes: found nothing; allowed: nodes with text"):
        load({"model": {"name": "llama"}})


def test_a_private_root_trains_no_tokenizer(tmp_path) -> None:
    values = {
        "text": {"tokenizer": "bpe"},
        "nodes": {
            "root": {"text": "python:manual", "privacy": {"noise": 1.0}},
            "a": {"text": "python:names"},
        },
    }
    with pytest.raises(InputError, match=r"text\.tokenizer: found 'bpe' with a private root"):
        load(values)

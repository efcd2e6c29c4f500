"""A language model over real SuperLinks, SuperNodes and a gateway. Slow: a dozen processes."""

import json
import stat
from typing import Any

import pytest

from deployments import LOOK, PATIENCE, check_states, finished, ports, until
from hansa.runs import Run
from hansa.training import train


@pytest.mark.slow(60)
def test_a_deployed_language_model_has_the_local_engines_bits(running, tmp_path) -> None:
    """WorldLM with text at the root and at an inner node, rules, and residuals between branches.

    One branch is private, without the noise that would be its own and with a limit out of reach.
    """
    unlimited = {"unit": "update", "noise": 0.0, "clip": 1e6}
    nodes: dict[str, dict[str, Any]] = {
        "root": {},
        "north": {"privacy": unlimited},
        "a": {"parent": "north"},
        "b": {"steps": 3},
    }
    for name, options in nodes.items():
        words = " ".join(f"{name} says {name}{k % 7} {k % 5}" for k in range(60))
        (tmp_path / f"{name}.txt").write_text(words)
        options["text"] = f"file:{tmp_path / name}.txt"
    small = {"hidden_size": 8, "intermediate_size": 8}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config: dict[str, Any] = {
        "name": "lm",
        "rounds": 3,
        "score_every": 0,
        "text": {"context": 8},
        "nodes": nodes,
        "model": {"options": {**small, **heads}},
        "training": {"optimizer": "adamw", "lr": 0.01, "batch_size": 2, "steps": 2},
        "method": {"name": "worldlm", "threshold": 0.9999, "temperature": 1.0},
    }
    deploy = {"port": ports(6), "deadline": PATIENCE, "look": LOOK}
    deploy["federations"] = {"north": {"look": LOOK}}
    place = running({**config, "deploy": deploy})
    engine = {"kind": "sequential", "workers": 1}
    local = train({**config, "output": str(tmp_path / "local"), "engine": engine})
    root, north = place / "root", place / "north"
    until(lambda: finished(root)() and finished(north)(), "finished", place)
    run, below = Run(root / "runs" / "lm-seed0"), Run(north / "runs" / "lm-seed0")
    check_states(
        place, run, local, ["root/north", "root/north/a", "root/b", "root/north@root/north/a"]
    )
    for party in (north, place / "a"):
        secret = party / "state" / "releases.json"
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        assert json.loads(secret.read_text())["number"] == 3
    assert len(list(place.rglob("releases.json"))) == 2
    came = [row for row in below.history.table("figures").to_pylist() if "came" in row["name"]]
    assert any(row["value"] for row in came)
    # Both federations' tables tell of their own training and scores, as the local engine's do.
    unknown = {"simulated_seconds", "down", "up", "csr"}  # of itself, or by rules of others
    for each, mine in ((run, {"root", "root/b"}), (below, {"root/north", "root/north/a"})):
        for table, number in (("ledger", 1), ("scores", 3)):
            theirs, ours = (
                [
                    {key: value for key, value in row.items() if key not in unknown}
                    for row in history.table(table).to_pylist()
                    if row["node"] in mine and row["round"] >= number
                ]
                for history in (local.history, each.history)
            )
            assert ours == theirs
            assert ours

"""Real SuperLinks, SuperNodes and gateways on the loopback. Slow: a dozen processes each."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from PIL import Image

from deployments import (
    BIN,
    LOOK,
    PATIENCE,
    at_work,
    check_states,
    command,
    finished,
    hansa,
    kill,
    named,
    ports,
    until,
)
from halfway import Halfway
from hansa.bundle import read_bundle
from hansa.data.federate import DataOptions, federate
from hansa.deploy.certificates import write_node_key
from hansa.deploy.flwr_commands import answers
from hansa.deploy.party import told
from hansa.deploy.trial import processes
from hansa.export import export
from hansa.federation.engines.flower.exchange import Answer, Request, from_bytes, to_bytes
from hansa.federation.engines.plan import EngineOptions
from hansa.federation.federation import Federation
from hansa.federation.methods import FedAvg
from hansa.federation.optimizer import Training
from hansa.federation.store import DiskStore
from hansa.federation.tree import Tree
from hansa.files import write_atomic
from hansa.runs import Run
from hansa.training import train
from support import same


def gray(folder: Path, value: int) -> None:
    """A client's images: of its own value, and of the value that pulls nowhere."""
    for name, level in (("pulls", value), ("rests", 255)):
        (folder / name).mkdir(parents=True)
        for k in range(4):
            Image.new("L", (2, 2), level).save(folder / name / f"{k}.png")


TARGETS = {"north": {"n1": 0, "n2": 4}, "south": {"s1": 8, "s2": 12}}


@pytest.mark.slow(100)
def test_a_federation_of_federations_gives_the_hand_computed_number(running, tmp_path) -> None:
    """Passes halfway to 0, 4, 8, 12 with a mean at each level: 3, then 4.5, then 5.25.

    In the second pass a gateway's SuperLink and server are killed, and start again by themselves.
    Strangers try to get in meanwhile. After the third FedAvg's model is the local engine's.
    """
    for names in TARGETS.values():
        for name, value in names.items():
            gray(tmp_path / "data" / name, value)
    config: dict[str, Any] = {
        "name": "tree",
        "rounds": 3,
        "score_every": 0,
        "model": {"name": "halfway:Halfway"},
        "training": {"lr": 0.5, "batch_size": 8},
        "method": {"name": "fedavg", "weighting": "uniform"},
    }
    clients = {
        name: {"federation": federation, "data": {"source": f"folder:{tmp_path}/data/{name}"}}
        for federation, names in TARGETS.items()
        for name in names
    }
    deploy = {
        "port": ports(10),
        "shape": [1, 2, 2],
        "classes": ["pulls", "rests"],
        "deadline": PATIENCE,
        "federations": {name: {"wait": PATIENCE, "look": LOOK} for name in TARGETS},
        "parties": clients,
        "wait": PATIENCE,
        "look": LOOK,
    }
    place = running({**config, "deploy": deploy})
    root, north, south = (place / name for name in ("root", "north", "south"))

    until(at_work(north, 2), "in round 2", place)
    with _strangers(place, tmp_path / "strangers", deploy["port"]) as strangers:
        pids = processes(north)
        parts = ("bin/flower-superlink", "bin/flwr-serverapp", "deploy.gate")
        kill([pid for part in parts for pid in named(pids, part)])

        until(at_work(root, 3), "in round 3", place)
        states = DiskStore(root / "runs" / "tree-seed0" / "states", 2, reads_only=True)
        assert float(states.get("root").group("model")["w"]) == 4.5
        # Alone, it is waited for by nobody: its SuperLink's helper lives on.
        kill(named(processes(root), "bin/flwr-serverapp"))
        until(finished(root), "finished", place)
        weights = read_bundle(root / "runs" / "tree-seed0" / "bundle").weights
        assert float(weights["w"]) == 5.25
        assert same(weights, _tree_on_the_local_engine(tmp_path / "data"))
        until(lambda: all(finished(party)() for party in (north, south)), "told of the end", place)
        for name, why in strangers.items():
            log = (tmp_path / "strangers" / f"{name}.log").read_text(errors="replace")
            assert "SuperNode ID" not in log, name
            assert why in log, log
        # Of a wrong time the SuperLink does not tell the node.
        told_off = (root / "logs" / "superlink.log").read_text(errors="replace")
        assert told_off.count('"POST /v1/fleet/activate-node HTTP/1.1" 401') == 1
    ledger = Run(root / "runs" / "tree-seed0").history.table("ledger").to_pylist()
    assert {row["node"] for row in ledger} == {"root/north", "root/south"}
    assert {row["fate"] for row in ledger} == {"ok"}
    below = Run(north / "runs" / "tree-seed0").history
    assert {row["node"] for row in below.table("ledger").to_pylist()} == {
        "root/north/n1",
        "root/north/n2",
    }
    assert below.num_rounds == 3


def _tree_on_the_local_engine(folder: Path) -> Mapping[str, torch.Tensor]:
    """The root's model after three rounds over the same data."""
    parents = {name: above for above, names in TARGETS.items() for name in names}
    clients = {}
    for name in parents:
        options = DataOptions(source=f"folder:{folder / name}", clients=1)
        (clients[name],) = federate(options, 0).clients.values()
    federation = Federation(
        Halfway(),
        clients,
        FedAvg(weighting="uniform"),
        Training(lr=0.5, batch_size=8),
        tree=Tree(parents | dict.fromkeys(TARGETS, "root")),
        engine=EngineOptions(kind="sequential", workers=1),
    )
    federation.run(3, score_every=0)
    return federation.model_of("root").state_dict()


AN_HOUR_LATE = """
from datetime import timedelta
from flwr.supernode import node_auth_http_interceptor as signing
from flwr.supernode.cli.flower_supernode import flower_supernode
now = signing.now
signing.now = lambda: now() - timedelta(hours=1)
flower_supernode()
"""


@contextmanager
def _strangers(place: Path, folder: Path, port: int) -> Iterator[dict[str, str]]:
    """Start SuperNodes that have no business at the root; yields what each says of its end."""
    folder.mkdir()
    write_node_key(folder / "node.key")
    supernode = [str(BIN / "flower-supernode")]
    member, key = place / "north" / "member", "--auth-supernode-private-key"
    authority = ["--root-certificates", str(member / "superlink-ca.crt")]
    unknown = "[code: 2004] Failed to activate SuperNode"
    no_tls = "Server disconnected without sending a response"
    cases = {
        "wrong key": ([*supernode, *authority, key, str(folder / "node.key")], unknown),
        # What lets it into north does not let it into the root.
        "another federation's": (
            [*supernode, *authority, key, str(place / "n1" / "member" / "node.key")],
            unknown,
        ),
        "no certificate": ([*supernode, "--insecure", "--max-retries", "2"], no_tls),
        # As one would be that sends again what a member has signed.
        "another time": (
            [sys.executable, "-c", AN_HOUR_LATE, *authority, key, str(member / "node.key")],
            "SuperNode terminated gracefully",
        ),
    }
    started = []
    for number, (name, (program, _)) in enumerate(cases.items()):
        runtime = str(port + 1500 + number)
        options = ["--superlink", f"127.0.0.1:{port}", "--port", runtime, "--isolation", "process"]
        with (folder / f"{name}.log").open("wb") as log:
            stranger = subprocess.Popen(
                [*program, *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0"},
            )
            started.append(stranger)
    try:
        yield {name: why for name, (_, why) in cases.items()}
    finally:
        for stranger in started:
            stranger.kill()
            stranger.wait()


@pytest.mark.slow(150)
def test_a_deployment_gives_the_local_engines_bits_and_lives_through_faults(
    running, tmp_path
) -> None:
    """FedSelect and ZeroFL: three rounds as on the local engine, to the bit. Then one with faults.

    In round 4 of the first a client is slow, another answers with garbage, and the SuperNode of
    the third is killed.
    """
    config: dict[str, Any] = {
        "name": "t",
        "rounds": 3,
        "score_every": 0,
        "data": {
            "clients": 3,
            "train_per_class": 3,
            "test_per_class": 5,
            "partition": {"kind": "shards", "classes": 4},
        },
        "model": {"options": {"hidden": [512]}},
        "training": {"lr": 0.1, "batch_size": 3},
        "method": {"name": "fedselect", "rate": 0.2},
    }
    place = running({**config, "deploy": {"port": ports(6), "deadline": PATIENCE, "look": LOOK}})
    root = place / "root"
    until(finished(root), "finished", place)
    engine = {"kind": "sequential", "workers": 1}
    local = train({**config, "output": str(tmp_path / "local"), "engine": engine})
    run = Run(root / "runs" / "t-seed0")
    check_states(place, run, local, ["root/client-0", "root/client-1", "root/client-2"])
    # A second run of the same members, while what the first one made is looked at.
    other = {**config, "name": "z", "method": {"name": "zerofl", "sparse": ["*"]}}
    listed = _second_run(root, other)
    _check_bytes(listed, run)
    command("export", place / "client-0", tmp_path / "own")
    own, theirs = read_bundle(tmp_path / "own"), export(local, "client-0", tmp_path / "theirs")
    assert same(own.weights, theirs.weights)
    assert same(own.masks, theirs.masks)
    until(lambda: "z-seed0" in told(root, "run").get("what", ""), "finished again", place)
    local = train({**other, "output": str(tmp_path / "local"), "engine": engine})
    check_states(place, Run(root / "runs" / "z-seed0"), local, [])

    # One more round, with a deadline that a slow client misses.
    _stop(root)
    for name, *change in (
        ("app/federation.toml", "rounds = 3", "rounds = 4"),
        ("party.toml", f"deadline = {PATIENCE}", "deadline = 20.0"),
    ):
        text = (root / name).read_text()
        assert change[0] in text
        (root / name).write_text(text.replace(*change))
    hansa("up", place)
    # None of them can answer the round: they stand still from when they have said who they are.
    stopped = [_stopped_after_hello(place / f"client-{k}", place) for k in range(3)]
    until(at_work(root, 4), "in round 4", place)
    kill(named(processes(place / "client-2"), "engines.flower.supernode"))
    until(lambda: _answered_garbage(place / "client-1"), "asked", place)
    until(lambda: "client-2: late" in (run.path / "log.txt").read_text(), "late", place)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    until(finished(root), "finished", place)

    ledger = Run(run.path).history.table("ledger").to_pylist()
    fates = {(row["round"], row["node"][-1]): row["fate"] for row in ledger}
    assert {fates[number, k] for number in (1, 2, 3) for k in "012"} == {"ok"}
    assert [fates[4, k] for k in "012"] == ["late", "excluded", "late"]
    (error,) = (row["error"] for row in ledger if row["fate"] == "excluded")
    assert "no use" in error
    log = (run.path / "log.txt").read_text()
    for what in ("client-0: late", "client-1: excluded", "client-2: late"):
        assert what in log
    assert "started again" in (place / "client-2" / "logs" / "party.log").read_text()


def _second_run(root: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Start another run on a SuperLink, and return what that had to say of the runs before."""
    settings = tomllib.loads((root / "app" / "federation.toml").read_text())
    made = root / config["name"]
    shutil.copytree(root / "app", made)
    about = {**settings, **config, "federation": settings["federation"]}
    (made / "federation.toml").write_text(tomli_w.dumps(about))
    commands = [["list"], ["run", str(made), "federation"]]
    said = subprocess.run(
        [sys.executable, "-m", "hansa.deploy.flwr_commands", json.dumps(commands)],
        env={**os.environ, "FLWR_HOME": str(root / "flower"), "FLWR_TELEMETRY_ENABLED": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    listed, started = answers(said)
    assert started["success"]
    return listed


def _check_bytes(listed: dict[str, Any], run: Run) -> None:
    """What the SuperLink counts agrees with the ledger: 2 % and 4 kB for each message."""
    (traffic,) = (each["network-traffic"] for each in listed["runs"])
    ledger = run.history.table("ledger").to_pylist()
    last = sum(row["down"] for row in ledger if row["round"] == 3)  # sent once more for the scores
    counted = {
        "outbound-bytes": sum(row["down"] for row in ledger) + last,
        "inbound-bytes": sum(row["up"] for row in ledger),
    }
    messages = len(ledger) + 2 * 3  # hello and score of three clients
    for way, expected in counted.items():
        print(way, traffic[way], expected, (traffic[way] - expected) / messages)
        assert abs(traffic[way] - expected) < 0.02 * expected + 4000 * messages
        assert expected > 4000 * messages  # so that the constant does not say it all


def _stop(party: Path) -> None:
    os.kill(int((party / ".lock").read_text()), signal.SIGTERM)
    end = time.monotonic() + 30
    while processes(party):
        assert time.monotonic() < end
        time.sleep(0.2)


def _stopped_after_hello(party: Path, place: Path) -> int:
    """Stop a client's worker once it has said who it is, and return its number."""
    (pid,) = named(processes(party), "hansa.deploy.member")
    until(lambda: told(party, "worker").get("what") == "hello of round 0 ok", "there", place)
    os.kill(pid, signal.SIGSTOP)
    return pid


def _answered_garbage(party: Path) -> bool:
    """Answer a client's next request in its place."""
    for path in (party / "mailbox" / "requests").glob("[0-9a-f]*"):
        request = from_bytes(Request, path.read_bytes())
        answer = Answer(request.path, request.round, body=b"garbage")
        write_atomic(party / "mailbox" / "answers" / path.name, to_bytes(answer))
        path.unlink()
        return True
    return False

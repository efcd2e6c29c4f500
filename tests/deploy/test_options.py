"""Descriptions of deployments, and the folders that are made of them."""

import contextlib
import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w
import torch
from hypothesis import given
from hypothesis import strategies as st

from hansa.alive import is_alive
from hansa.deploy.certificates import check_server, write_authority, write_server
from hansa.deploy.charter import Charter
from hansa.deploy.export import export
from hansa.deploy.flwr_commands import answers
from hansa.deploy.holding import Holding
from hansa.deploy.layout import init, write_app
from hansa.deploy.mailbox import Mailbox
from hansa.deploy.member import ClientSite
from hansa.deploy.options import read_deployment
from hansa.deploy.party import Party
from hansa.deploy.supervisor import (
    Supervisor,
    _superlink_command,
    _supernode_command,
    check_port,
)
from hansa.errors import InputError
from hansa.federation.engines.flower import check_version
from hansa.federation.engines.flower.exchange import Answer, Kind, Request
from hansa.federation.message import Message
from hansa.federation.tree import ROOT
from hansa.federation.wire import encode

TREE: dict[str, Any] = {
    "federations": {"north": {}, "south": {"deadline": 100.0}},
    "parties": {
        "client-0": {"federation": "north"},
        "client-1": {"federation": "south"},
        "client-2": {},
    },
}


def description(folder: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "name": "study",
        "data": {"clients": 3, "train_per_class": 2},
        "model": {"options": {"hidden": [4]}},
        "deploy": TREE,
        **changes,
    }
    path = folder / "description.toml"
    path.write_text(tomli_w.dumps(values))
    return path


def deploy(**changes: Any) -> dict[str, Any]:
    return {"deploy": {**TREE, **changes}}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (deploy(prot=1), "deploy.prot"),
    "unknown federation": (
        deploy(parties={"client-0": {"federation": "east"}}),
        "deploy.parties.client-0.federation",
    ),
    "no such client": (deploy(parties={"ward": {}}), "deploy.parties.ward"),
    "federation without members": (
        deploy(parties={"client-0": {"federation": "north"}}),
        "deploy.federations.south",
    ),
    "both": (deploy(parties={"north": {}}), "deploy.parties.north"),
    "deadline above its parent's": (
        deploy(federations={**TREE["federations"], "south": {"deadline": 5000.0}}),
        "deploy.federations.south.deadline",
    ),
    "port taken twice": (
        deploy(port=8001, federations={**TREE["federations"], "south": {"port": 8001}}),
        "deploy.federations.south.port",
    ),
    "simulated failures": ({"participation": {"failure_rate": 0.1}}, "participation.failure_rate"),
    "simulated failures below": (
        deploy(federations={**TREE["federations"], "south": {"participation": {"deadline": 1.0}}}),
        "participation.failure_rate",
    ),
    "method for flat federations": ({"method": {"name": "fedselect"}}, "tree.federations"),
    "methods that do not fit": (
        deploy(federations={**TREE["federations"], "south": {"method": {"name": "scaffold"}}}),
        "deploy.federations.south.method",
    ),
    "own data with a wrong key": (
        deploy(parties={**TREE["parties"], "client-2": {"data": {"sorce": "digits"}}}),
        "deploy.parties.client-2.data.sorce",
    ),
    "privacy of a flat run": ({"privacy": {"where": "central"}}, "privacy"),
    "looks without a pause": (deploy(look=0.0), "deploy.look"),
    "IPv6": (deploy(host="::1"), "deploy.host"),
    "port": (deploy(port=65535), "deploy.port"),
    "bundle": ({"model": {"bundle": "x"}}, "model.bundle"),
}


NODES: dict[str, dict[str, Any]] = {
    "root": {"text": "file:root.txt"},
    "north": {"text": "file:north.txt", "steps": 3},
    "a": {"parent": "north", "text": "file:a.txt"},
    "b": {"text": "python:licences", "lr": 0.77},
}
TEXT: dict[str, Any] = {
    "name": "study",
    "text": {"context": 8},
    "nodes": NODES,
    "model": {
        "name": "gpt2",
        "options": {"n_embd": 8, "n_layer": 2, "n_head": 2},
    },
    "training": {"batch_size": 2},
    "method": {"name": "worldlm"},
    "deploy": {"federations": {"north": {"port": 9000}}},
}
PRIVATE = {"noise": 1.0, "epsilon": 8.0}
WRONG_TEXT: dict[str, tuple[dict[str, Any], str]] = {
    "parties": ({"deploy": {"parties": {"a": {}}}}, "deploy.parties"),
    "no inner node": ({"deploy": {"federations": {"a": {}}}}, "deploy.federations.a"),
    "another parent": (
        {"deploy": {"federations": {"north": {"parent": "root"}}}},
        "deploy.federations.north.parent",
    ),
    "privacy beside [nodes]": ({"deploy": {"privacy": PRIVATE}}, "deploy.privacy"),
    "privacy of a federation beside [nodes]": (
        {"deploy": {"federations": {"north": {"privacy": PRIVATE}}}},
        "deploy.federations.north.privacy",
    ),
    "no noise": (
        {"nodes": {**NODES, "b": {**NODES["b"], "privacy": {"noise": -1.0}}}},
        "nodes.b.privacy.noise",
    ),
    "private by a method whose looks nobody counts": (
        {
            "nodes": {**NODES, "root": {}, "north": {}, "b": {**NODES["b"], "privacy": PRIVATE}},
            "method": {"name": "fedprox"},
        },
        "nodes.b.privacy",
    ),
    "simulated failures": (
        {"nodes": {**NODES, "north": {"participation": {"failure_rate": 0.1}}}},
        "nodes.north.participation",
    ),
    "text that the method has no use for": ({"method": {"name": "scaffold"}}, "nodes.root.text"),
    "an encoding of no text": (
        {"text": {"tokenizer": "bpe"}, "nodes": {**NODES, "root": {}}},
        "text.tokenizer",
    ),
    "questions and answers": ({"text": {"answers": {}}}, "text.answers"),
    "an encoding of text elsewhere": ({"text": {"tokenizer": "bpe"}}, "nodes.root.text"),
}


def text_description(folder: Path, **changes: Any) -> Path:
    path = folder / "texts.toml"
    path.write_text(tomli_w.dumps({**TEXT, **changes}))
    return path


@pytest.mark.parametrize("case", WRONG_TEXT)
def test_texts_that_cannot_be_deployed_are_refused(case, tmp_path) -> None:
    changes, key = WRONG_TEXT[case]
    with pytest.raises(InputError) as caught:
        init(read_deployment(text_description(tmp_path, **changes)), tmp_path / "made")
    assert caught.value.key == key
    assert not (tmp_path / "made").exists()


def test_each_party_knows_its_own_text_and_rules_and_no_others(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "made"
    folders = init(read_deployment(text_description(tmp_path)), made)
    parties = {folder.name: Party.read(folder) for folder in folders}
    assert {name: party.text for name, party in parties.items()} == {
        "root": f"file:{tmp_path}/root.txt",
        "b": "python:licences",
        "north": f"file:{tmp_path}/north.txt",
        "a": f"file:{tmp_path}/a.txt",
    }
    # A federation's rules hold below it where nothing else does.
    rules = {name: party.rules for name, party in parties.items()}
    assert rules == {"root": None, "b": {"lr": 0.77}, "north": {"steps": 3}, "a": {"steps": 3}}
    assert parties["north"].server
    assert parties["north"].server.port == 9000
    for name, children in (("root", ("root/b", "root/north")), ("north", ("root/north/a",))):
        settings = made / name / "app" / "federation.toml"
        assert not any(word in settings.read_text() for word in ("file:", "licences", "0.77"))
        charter = Charter.read(settings)
        assert charter.children == children
        assert (charter.shape, len(charter.classes)) == ((8,), 256)
        assert charter.setup.moments
    holding = Holding.of(parties["a"], made / "a")
    assert holding.setup(charter).at("root/north/a").training.steps == 3


def test_an_encoding_travels_to_all_and_the_text_it_is_made_of_to_nobody(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "root.txt").write_text("snow and ice and snow and wind " * 40)
    changes: dict[str, Any] = {"text": {"tokenizer": "bpe", "vocabulary": 260, "context": 8}}
    init(read_deployment(text_description(tmp_path, **changes)), tmp_path / "made")
    for name in ("root", "north"):
        charter = Charter.read(tmp_path / "made" / name / "app" / "federation.toml")
        assert charter.tokens.size == len(charter.classes) == 260
        assert charter.tokens.decode(charter.tokens.encode("snow")) == "snow"
        assert charter.setup.task.objective.to("cpu").bytes_of.max() > 1
    client = Holding("root/b", tmp_path / "state", text="python:licences").client(charter)
    assert int(client.labels.max()) >= 256
    assert client.count("train") > 2
    nothing = Holding("root/c", tmp_path / "other")
    with pytest.raises(InputError, match="every client needs"):
        nothing.client(charter)


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_refused_before_anything_is_written(case, tmp_path) -> None:
    changes, key = WRONG[case]
    with pytest.raises(InputError) as caught:
        init(read_deployment(description(tmp_path, **changes)), tmp_path / "made")
    assert caught.value.key == key
    assert not (tmp_path / "made").exists()


def test_a_supernode_sleeps_as_long_as_it_is_told_and_no_longer(monkeypatch) -> None:
    import time

    from flwr.supernode import start_client_internal as flowers

    from hansa.federation.engines.flower.supernode import look_every

    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(flowers, "time", flowers.time)  # put back after this test
    assert flowers.time is time  # or its sleeps were its own matter
    look_every(0.5)
    for seconds in (3, 0.1):
        flowers.time.sleep(seconds)
    assert slept == [0.5, 0.1]
    assert flowers.time.time() > 0


LEFT = """
import runpy, sys, threading
import flwr.supernode.cli.flower_supernode
flowers = sys.modules["flwr.supernode.cli.flower_supernode"]  # a function goes by its name too
flowers.flower_supernode = lambda: threading.Thread(target=threading.Event().wait).start()
sys.argv = ["supernode", "0.5"]
runpy.run_module("hansa.federation.engines.flower.supernode", run_name="__main__")
"""


def test_a_supernode_whose_connection_broke_leaves_no_process_behind() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT], timeout=120, capture_output=True)
    assert done.returncode == 1, done.stderr


def test_how_often_a_member_looks_is_up_to_its_federation(tmp_path) -> None:
    changes = deploy(look=7.0, federations={"north": {"look": 0.5}, "south": {}})
    made = tmp_path / "made"
    init(read_deployment(description(tmp_path, **changes)), made)
    found = {}
    for name in ("client-0", "client-1", "north"):
        upward = Party.read(made / name).upward
        assert upward
        found[name] = upward.look
    assert found == {"client-0": 0.5, "client-1": 3.0, "north": 7.0}


def test_parties_get_what_they_need_and_no_more(tmp_path) -> None:
    made = tmp_path / "made"
    folders = init(read_deployment(description(tmp_path)), made)
    assert [f.name for f in folders] == [
        "root",
        "client-2",
        "north",
        "client-0",
        "south",
        "client-1",
    ]
    root, north, client = (Party.read(made / name) for name in ("root", "north", "client-0"))
    assert root.server
    assert root.upward is None
    assert north.server
    assert north.upward
    assert client.server is None
    assert client.upward
    assert client.upward.superlink == f"127.0.0.1:{north.server.port}"
    # Deadlines nest: a federation's, its gateway's patience, the one above.
    assert north.server.deadline < north.upward.patience < root.server.deadline
    assert {p.stem for p in (made / "root" / "keys").iterdir()} == {"north", "south", "client-2"}
    assert not (made / "root" / "member").exists()
    assert not (made / "client-0" / "tls").exists()
    for key in made.rglob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600, key
    assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders)
    charter = Charter.read(made / "north" / "app" / "federation.toml")
    assert charter.children == charter.clients == ("root/north/client-0",)
    assert (charter.depth, charter.shape, len(charter.classes)) == (1, (1, 8, 8), 10)
    assert Charter.read(made / ROOT / "app" / "federation.toml").depth == 2
    for folder in folders:  # a private key of another party is nowhere
        assert len(list(folder.rglob("node.key"))) == (0 if folder.name == ROOT else 1)
    with pytest.raises(InputError, match="something there"):
        init(read_deployment(description(tmp_path)), made)


def test_texts_are_what_their_readers_take(tmp_path) -> None:
    import yaml

    made = tmp_path / "made"
    parties = {"1": {"data": {"source": "digits"}}, "on": {"data": {"source": "digits"}}}
    changes = {"parties": parties, "federations": {}, "shape": [1, 8, 8]}
    changes["classes"] = [str(k) for k in range(10)]
    init(read_deployment(description(tmp_path, deploy=changes)), made)
    services = yaml.safe_load((made / "compose.yaml").read_text())["services"]
    assert set(services) == {"root", "1", "on"}
    assert set(yaml.safe_load((made / "on" / "compose.yaml").read_text())["services"]) == {"on"}
    for folder in made.iterdir():
        if folder.is_dir():
            assert os.access(folder / "start.sh", os.X_OK)
            assert (
                subprocess.run(["/bin/sh", "-n", folder / "start.sh"], check=False).returncode == 0
            )
    project = tomllib.loads((made / "root" / "app" / "pyproject.toml").read_text())
    assert project["tool"]["flwr"]["app"]["components"]["serverapp"] == "app:server"


def test_an_app_to_simulate_holds_all_clients(tmp_path) -> None:
    assert write_app(read_deployment(description(tmp_path)), tmp_path / "app") == 3
    charter = Charter.read(tmp_path / "app" / "federation.toml")
    assert charter.clients == ("root/client-2", "root/north/client-0", "root/south/client-1")
    assert charter.tree.children("root/north") == ("root/north/client-0",)


def test_a_browser_would_take_the_certificate_for_its_host_and_no_other(tmp_path) -> None:
    write_authority(tmp_path, "a")
    write_server(tmp_path, "study.example")
    check_server(tmp_path)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    client = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # what Python 3.13 asks for by default

    def shake(name: str) -> None:
        ends = [ssl.MemoryBIO() for _ in range(4)]
        one = client.wrap_bio(ends[0], ends[1], server_hostname=name)
        two = server.wrap_bio(ends[2], ends[3], server_side=True)
        for _ in range(6):
            for side in (one, two):
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
                ends[2].write(ends[1].read())
                ends[0].write(ends[3].read())
        one.do_handshake()

    shake("study.example")
    shake("localhost")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake("other.example")


def test_certificates_out_of_date_or_of_another_key_are_refused(tmp_path) -> None:
    write_authority(tmp_path, "a")
    write_server(tmp_path, "localhost", days=-1)
    with pytest.raises(InputError, match=f"expired on {datetime.now(UTC).year - 1}|expired on"):
        check_server(tmp_path)
    write_server(tmp_path, "localhost")
    key = (tmp_path / "server.key").read_bytes()
    write_server(tmp_path, "localhost")
    (tmp_path / "server.key").write_bytes(key)
    with pytest.raises(InputError, match=r"no certificate for server\.key"):
        check_server(tmp_path)
    (tmp_path / "server.crt").unlink()
    with pytest.raises(InputError, match="no such file"):
        check_server(tmp_path)


@pytest.mark.parametrize(("party", "file"), [("root", "server.crt"), ("client-2", "ca.crt")])
def test_a_party_whose_certificates_have_expired_does_not_start(party, file, tmp_path) -> None:
    made = tmp_path / "made"
    init(read_deployment(description(tmp_path)), made)
    if party == "root":
        write_authority(made / party / "tls", "late")
        write_server(made / party / "tls", "localhost", days=-1)
    else:
        write_authority(tmp_path, "late", days=-1)
        (made / party / "member" / "superlink-ca.crt").write_bytes(
            (tmp_path / "ca.crt").read_bytes()
        )
    hansa = Path(sys.executable).with_name("hansa")
    done = subprocess.run(
        [hansa, "deploy", "start", made / party],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"{file}: found a certificate that expired on" in line


def test_a_request_that_unfolds_to_more_than_its_model_is_refused(tmp_path) -> None:
    """A few hundred bytes that stand for eight megabytes of zeros, to a model of some hundred."""
    made = tmp_path / "made"
    init(read_deployment(description(tmp_path)), made)
    folder = made / "client-2"
    charter = Charter.read(made / "root" / "app" / "federation.toml")
    site = ClientSite(charter, Holding.of(Party.read(folder), folder))
    huge = torch.zeros(2 << 20).index_fill_(0, torch.tensor([5]), 1.0)
    body = encode(Message({"model": {"w": huge}}))
    assert len(body) < 1000
    for kind in get_args(Kind)[1:3]:
        answer = site.answer(Request(kind, "r", "root/client-2", 1, body=body))
        assert answer.status == "refused"
        assert "unfolds to more than the limit" in answer.error


def test_flowers_processes_are_started_with_tls_and_keys_and_on_the_loopback(tmp_path) -> None:
    made = tmp_path / "made"
    init(read_deployment(description(tmp_path)), made)
    folder = made / "north"  # which has both
    party = Party.read(folder)
    assert party.upward
    superlink, supernode = (
        command(folder, party) for command in (_superlink_command, _supernode_command)
    )
    for command, files in (
        (superlink, {"--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certfile"}),
        (supernode, {"--root-certificates", "--auth-supernode-private-key"}),
    ):
        given = dict(pairwise(command))
        assert given["--host"] == "127.0.0.1"
        assert all(Path(given[option]).is_file() for option in files)
        assert "--insecure" not in command
    assert "--enable-supernode-auth" in superlink
    # What Flower's own programs make of them.
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    found = _parse_args_run_supernode().parse_args(supernode[4:])
    assert (found.host, found.port) == ("127.0.0.1", party.upward.runtime_port)
    assert not found.insecure


def test_a_superlink_that_is_killed_as_it_starts_is_no_reason_to_end(tmp_path) -> None:
    made = tmp_path / "made"
    init(read_deployment(description(tmp_path)), made)
    party = Supervisor(made / "root")
    for code, mends in (("kill -9 $$", True), ("exit 1", False)):
        party._processes["superlink"] = process = subprocess.Popen(["/bin/sh", "-c", code])
        process.wait()
        with contextlib.nullcontext() if mends else pytest.raises(InputError, match="SuperLink"):
            assert not party._is_healthy()


def test_a_process_that_was_killed_is_not_alive_before_somebody_waits_for_it() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert is_alive(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(process.pid)
    assert not is_alive(process.pid)
    assert not is_alive(0)


def test_a_port_that_is_taken_is_named_at_once(tmp_path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"{port}.*in use"):
            check_port("server.port", "127.0.0.1", port)
        made = tmp_path / "made"
        init(read_deployment(description(tmp_path)), made)
        path = made / "root" / "party.toml"
        path.write_text(path.read_text().replace("port = 8000", f"port = {port}", 1))
        hansa = Path(sys.executable).with_name("hansa")
        for command in (["up", made], ["start", made / "root"]):
            done = subprocess.run(
                [hansa, "deploy", *command], capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 2
            assert f"server.port: found {port}" in done.stderr
            assert "Traceback" not in done.stderr
    (made / "north" / "keys" / "client-0.pub").unlink()
    with pytest.raises(InputError, match=r"client-0\.pub"):
        Supervisor(made / "north").check()


def test_a_party_that_has_trained_nothing_has_nothing_to_export(tmp_path) -> None:
    made = tmp_path / "made"
    init(read_deployment(description(tmp_path)), made)
    for party in ("client-0", "root"):
        with pytest.raises(InputError, match="nothing trained"):
            export(made / party, tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_other_releases_of_flower_are_refused(monkeypatch) -> None:
    import hansa.federation.engines.flower as module

    check_version()
    for found in ("1.40.9", "1.42.0", "2.41.0"):
        monkeypatch.setattr(module, "version", lambda name, found=found: found)
        with pytest.raises(InputError, match=f"version {found}.*1.41.x"):
            check_version()


@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=9))),
    st.text(st.characters(exclude_characters="{}")),
)
def test_answers_of_flowers_commands_are_found_in_any_noise(values, noise) -> None:
    text = noise.join(["", *(json.dumps(value, indent=1) for value in values), ""])
    assert answers(text) == values


def test_a_mailbox_hands_over_each_letter_once_and_forgets_who_gave_up(tmp_path) -> None:
    ours, theirs = Mailbox(tmp_path), Mailbox(tmp_path)
    request = Request("train", "r", "root/a", 1, body=b"x")
    assert ours.ask(request, 0.25) is None
    assert next(theirs.requests()) is None  # nobody waits for it any more
    import threading

    got: list[Any] = []
    asking = threading.Thread(target=lambda: got.append(ours.ask(request, 30)))
    asking.start()
    came = next(r for r in theirs.requests() if r is not None)
    theirs.reply(came, Answer("root/a", 1, body=b"y"))
    asking.join()
    assert (came, got) == (request, [Answer("root/a", 1, body=b"y")])
    assert not list(tmp_path.glob("*/*"))


def test_the_door_lets_members_in_and_nobody_else() -> None:
    import asyncio

    import httpx
    from starlette.applications import Starlette
    from starlette.requests import Request as Call
    from starlette.responses import Response
    from starlette.routing import Route

    from hansa.deploy.gate import gate

    seen = []

    async def superlink(call: Call) -> Response:
        seen.append((call.url.path, call.headers.get("flwr-key"), await call.body()))
        return Response(b"answer", 201, {"flwr-extra": "1"})

    inner = Starlette(routes=[Route("/{path:path}", superlink, methods=["GET", "POST"])])

    async def calls() -> list[httpx.Response]:
        behind = httpx.AsyncClient(transport=httpx.ASGITransport(inner), base_url="http://inner")
        door = httpx.ASGITransport(gate(behind))
        async with behind, httpx.AsyncClient(transport=door, base_url="http://door") as client:
            good = await client.post("/v1/fleet/pull", content=b"b", headers={"flwr-key": "k"})
            bad = [
                await client.post(path)
                for path in (
                    "/v1/control/start-run",
                    "/v1/runtime/acquire-task",
                    "/",
                    "/v1/fleet/%2e%2e/control/start-run",
                    "/v1/fleetx/pull",
                )
            ]
        return [good, *bad]

    good, *bad = asyncio.run(calls())
    assert (good.status_code, good.content, good.headers["flwr-extra"]) == (201, b"answer", "1")
    assert {answer.status_code for answer in bad} == {403}
    assert seen == [("/v1/fleet/pull", "k", b"b")]

"""Deployments that tests start: patience, ports, and what is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import tomli_w
from typer.testing import CliRunner

from hansa.cli import app
from hansa.deploy.party import told
from hansa.federation.message import State
from hansa.federation.store import DiskStore
from hansa.runs import Run
from support import is_taken, same

BIN = Path(sys.executable).parent
_HELD: list[IO[str]] = []
PATIENCE = 240.0
LOOK = 0.5
"""What an idle SuperNode sleeps: Flower's own three seconds would be most of a test's time."""


def ports(num: int) -> int:
    """The first of some free ports in a row, which no other test on this machine is given.

    What is started later binds others 1000, 1500 and 2000 above them. All of them lie below those
    that the system hands out by itself.
    """
    places = [12000 + 50 * (60 * k + n) for k in range(6) for n in range(20)]
    first = os.getpid() % len(places)
    for start in (*places[first:], *places[:first]):
        lock = (Path(tempfile.gettempdir()) / f"hansa-tests-ports-{start}.lock").open("w")
        if is_taken(lock) and all(map(_is_free, _spread(start, num))):
            _HELD.append(lock)  # until this process ends
            return start
        lock.close()
    raise AssertionError("no free ports")


def _spread(start: int, num: int) -> list[int]:
    return [start + base + k for base in (0, 1000, 1500, 2000) for k in range(num)]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def hansa(*arguments: str | Path) -> None:
    done = subprocess.run(
        [BIN / "hansa", "deploy", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def command(*arguments: str | Path) -> None:
    """Run a command in this process, which has imported everything."""
    done = CliRunner().invoke(app, ["deploy", *map(str, arguments)])
    assert done.exit_code == 0, done.output


def init(folder: Path, description: dict[str, Any]) -> Path:
    path = folder / "description.toml"
    path.write_text(tomli_w.dumps(description))
    place = folder / "parties"
    command("init", path, place)
    return place


def until(what: Callable[[], bool], about: str, place: Path, patience: float = PATIENCE) -> None:
    end = time.monotonic() + patience
    while not what():
        if time.monotonic() > end:
            states = {
                str(path.relative_to(place)): path.read_text()
                for path in sorted(place.glob("*/status/*.json"))
            }
            raise AssertionError(f"not {about}: {json.dumps(states, indent=1)}")
        time.sleep(0.2)


def finished(party: Path) -> Callable[[], bool]:
    def is_over() -> bool:
        state = told(party, "run").get("state")
        assert state != "failed", told(party, "run")
        return state == "finished"

    return is_over


def at_work(party: Path, number: int) -> Callable[[], bool]:
    """Whether a federation's run has begun a round."""
    text = f"round {number}"
    return lambda: text in told(party, "run").get("what", "")


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def named(pids: list[int], text: str) -> list[int]:
    found = []
    for pid in pids:
        try:
            if text.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def check_logs(place: Path) -> None:
    """No log, status or table of any party holds a line of a private key, or a node's secret."""
    secrets: dict[bytes, Path] = {}
    for path in place.rglob("*.key"):
        lines = [line for line in path.read_bytes().splitlines() if not line.startswith(b"-----")]
        assert lines, path
        secrets |= dict.fromkeys(lines, path)
    for path in place.rglob("releases.json"):
        secrets[json.loads(path.read_text())["secret"].encode()] = path
    assert secrets
    told = [
        path for ending in ("*.log", "log.txt", "status/*.json") for path in place.rglob(ending)
    ]
    assert told
    for path in told:
        content = path.read_bytes()
        for secret, where in secrets.items():
            assert secret not in content, f"{path} holds what is in {where}"


def check_states(place: Path, run: Run, local: Run, below: Sequence[str]) -> None:
    """States after three rounds are those of the local engine, bit for bit.

    Args:
        place: of the parties.
        run: the root's run.
        local: the local engine's.
        below: other nodes and links that must have states.
    """
    stores = {"root": DiskStore(run.path / "states", 3)}
    expected = DiskStore(local.path / "states", 3)
    number = str(run.checkpoint["run"])

    def found(node: str, key: str) -> State:
        name = node.rpartition("/")[2]
        if name not in stores:
            stores[name] = DiskStore(place / name / "state" / number / "states", 3)
        return stores[name].get(key)

    checked: set[str] = set()
    nodes = ["root", *sorted({row["node"] for row in local.history.table("ledger").to_pylist()})]
    for node in dict.fromkeys(nodes):
        keys = [(node, node)]
        if node != "root":
            above = node.rpartition("/")[0]
            keys.append((above, f"{above}@{node}"))
        for holder, key in keys:
            mine, theirs = found(holder, key), expected.get(key)
            assert mine.groups.keys() == theirs.groups.keys(), key
            assert all(same(mine.group(group), theirs.group(group)) for group in theirs.groups), key
            checked |= {key} if mine.groups else set()
    assert {"root", *below} <= checked

"""A whole deployment on this machine: started, looked at, stopped."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hansa.deploy.party import FILE, HOLD, LOCK, VARIABLE, Party, told
from hansa.deploy.supervisor import Supervisor
from hansa.errors import InputError

_STOP = 20.0  # seconds that processes have to end when told to
_START = 240.0  # seconds that a SuperLink has to start
_TICK = 0.2


def parties(folder: Path) -> list[Path]:
    """Return the parties' folders, federations before their members.

    Raises:
        InputError: there are none.
    """
    found = {path.parent: Party.read(path.parent) for path in folder.glob(f"*/{FILE}")}
    if not found:
        raise InputError(str(folder), "no parties", "a folder of `hansa deploy init`")
    return sorted(found, key=lambda path: (found[path].path.count("/"), found[path].path))


def up(folder: Path, watch: Callable[[str], None] = lambda name: None) -> None:
    """Start every party that does not run: federations, from the root downward, before clients.

    Args:
        folder: what ``init`` wrote.
        watch: called with the name of each party that is started.

    Raises:
        InputError: a port, a certificate or a key that cannot be used; then nothing is started.
    """
    idle = [party for party in parties(folder) if not is_running(party)]
    for party in idle:
        Supervisor(party).check()
    started: dict[Path, subprocess.Popen[bytes]] = {}
    for party in idle:
        # Its SuperNode would be turned away before the SuperLink knows its members.
        (party / HOLD).touch()
    for party in idle:
        watch(party.name)
        (party / "logs").mkdir(exist_ok=True)
        with (party / "logs" / "party.log").open("ab") as log:
            started[party] = subprocess.Popen(  # noqa: S603 our own command
                [sys.executable, "-m", "hansa.cli", "deploy", "start", str(party)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, VARIABLE: str(party.resolve())},
            )
    try:
        _release(folder, idle, started)
    finally:
        for party in idle:
            (party / HOLD).unlink(missing_ok=True)


def _release(
    folder: Path, parties: Sequence[Path], started: Mapping[Path, subprocess.Popen[bytes]]
) -> None:
    """Let each party's SuperNode start once the SuperLink above knows its members.

    Raises:
        InputError: a party ends.
    """
    above = {
        party: folder / (Party.read(party).path.split("/")[-2:-1] or [""])[0] for party in parties
    }
    held = list(parties)
    until = time.monotonic() + _START
    while held and time.monotonic() < until:
        for party, process in started.items():
            if process.poll() is not None:
                why = told(party, "party").get("what") or f"see {party / 'logs'}"
                raise InputError(party.name, f"an end at once: {why}", "one that starts")
        for party in held:
            if above[party] == folder or told(above[party], "superlink").get("state") == "running":
                (party / HOLD).unlink(missing_ok=True)
        held = [party for party in held if (party / HOLD).exists()]
        time.sleep(_TICK)
    if held:
        names = ", ".join(party.name for party in held)
        raise InputError("SuperLink", f"none above {names} after {_START:g} s", "one that starts")


def status(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each part of every party: ``party``, ``part``, ``state``, ``what``."""
    rows = []
    for path in parties(folder):
        running, party = is_running(path), Party.read(path)
        names = ["superlink", "run"] if party.server else []
        names += ["supernode"] if party.upward else []
        names += [] if party.server else ["worker"]
        failure = told(path, "party")
        for name in names:
            facts = told(path, name)
            state = facts.get("state", "not started")
            if not running and state != "finished":
                state = failure.get("state", "stopped" if facts else "not started")
            row = {"party": path.name, "part": name, "state": state, "what": facts.get("what", "")}
            if not running and state == "failed":
                row["what"] = failure.get("what", "")
            rows.append(row)
    return rows


def down(folder: Path) -> None:
    """Stop every party, and wait until all of their processes have ended."""
    running = {party: _pid(party) for party in reversed(parties(folder)) if is_running(party)}
    for pid in running.values():
        os.kill(pid, signal.SIGTERM)
    _await(lambda: not any(map(is_running, running)))
    # Some of Flower's processes are in sessions of their own, and end a little later.
    _await(lambda: not any(map(processes, parties(folder))))
    for party in parties(folder):
        for pid in processes(party):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def processes(party: Path) -> list[int]:
    """Return the processes that work for a party, by their environment (Linux; elsewhere none)."""
    wanted, found = f"{VARIABLE}={party.resolve()}".encode(), []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
    return found


def is_running(party: Path) -> bool:
    """Tell whether a process runs a party."""
    return _pid(party) > 0


def _pid(party: Path) -> int:
    """Return the process that runs a party, 0 where none does."""
    try:
        with (party / LOCK).open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return int(lock.read() or 0)
    except (OSError, ValueError):
        pass
    return 0


def _await(what: Callable[[], bool]) -> None:
    until = time.monotonic() + _STOP
    while not what() and time.monotonic() < until:
        time.sleep(_TICK)

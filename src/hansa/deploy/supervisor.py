"""What a party runs: a SuperLink with its run, a SuperNode, or both; what dies is started again."""

import ctypes
import fcntl
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import tomli_w

from hansa.alive import is_alive
from hansa.deploy.certificates import check_authority, check_server, public_key
from hansa.deploy.flwr_commands import answers
from hansa.deploy.party import HOLD, LOCK, PARTS, VARIABLE, Party, tell, told
from hansa.errors import InputError
from hansa.federation.engines.flower import QUIET
from hansa.untrusted import read_text, toml_of

_log = logging.getLogger("hansa.deploy")
_TICK = 0.5  # seconds between looks at the processes
_REST = 3.0  # seconds before a process that ended is started again
_MOST_REST = 12.0  # what that grows to while the process keeps ending
_SOON = 30.0  # seconds after its start
_BEGIN = 180.0  # seconds that a run has to start
_HEALTH = 120.0  # seconds that a SuperLink has to come up
_STOP = 10.0  # seconds that a process has to end when told to
_CONNECTION = "federation"
_TURNED_AWAY = "Exit Code: 305"
_KNOWN = "already in use"
_SUBMITTED = "submitted"
"""Where the number of the last run stands that was started, in ``status/``."""
_DATABASE = "superlink.db"


class Supervisor:
    """Keeps a party's processes running until it is told to stop.

    Args:
        folder: the party's.

    Raises:
        InputError: what the folder holds cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.party = Party.read(self.folder)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._rest: dict[str, float] = {}
        self._began: dict[str, float] = {}
        self._last_rest: dict[str, float] = {}
        self._submitted = 0.0
        self._log_start = 0

    def check(self, is_looked_at: bool = False) -> None:
        """Refuse what is bound to fail, before anything is started.

        Args:
            is_looked_at: whether another process has looked at the party's rules just now.

        Raises:
            InputError: a certificate, a key or a port that cannot be used, or rules that cannot be
                kept.
        """
        server, upward = self.party.server, self.party.upward
        for part in PARTS:
            (self.folder / "status" / f"{part}.json").unlink(missing_ok=True)
        if server is not None:
            check_server(self.folder / "tls")
            check_port("server.port", server.bind, server.port)
            check_port("server.inner_port", "127.0.0.1", server.inner_port)
            for path in _children(self.folder):
                public_key(self.folder / "keys" / f"{path.rpartition('/')[2]}.pub")
        if upward is not None:
            check_authority(self.folder / "member" / "superlink-ca.crt")
            if not (self.folder / "member" / "node.key").is_file():
                raise InputError(
                    str(self.folder / "member" / "node.key"), "no such file", "the node's key"
                )
            check_port("upward.runtime_port", "127.0.0.1", upward.runtime_port)
        if self.party.rules is not None and not is_looked_at:
            from hansa.deploy.holding import Holding  # PyTorch's seconds are for rules only

            Holding.of(self.party, self.folder).releases()

    def run(self) -> None:
        """Run until SIGTERM or SIGINT.

        Raises:
            InputError: something that starting again would not mend.
        """
        with _alone(self.folder), _stopping() as is_stopped:
            try:
                self.check(is_looked_at=VARIABLE in os.environ)  # by `up`
                while not is_stopped():
                    if self.party.server is not None:
                        self._superlink()
                    if self.party.upward is not None:
                        self._supernode()
                    time.sleep(_TICK)
                tell(self.folder, "party", state="stopped", what="")
            except InputError as error:
                tell(self.folder, "party", state="failed", what=str(error))
                raise
            finally:
                self._end()

    def _superlink(self) -> None:
        if not self._is_up("superlink"):
            self._start("superlink", _superlink_command(self.folder, self.party))
            self._submitted = 0.0
            if not self._is_healthy():
                return
            self._submit("its SuperLink was not there", *self._registrations())
        if not self._is_up("gate"):
            self._start("gate", [sys.executable, "-m", "hansa.deploy.gate", self._place])
            tell(self.folder, "superlink", state="running", what=self._address)
        if self._processes["superlink"].poll() is not None:
            return  # it rests before it is started again
        run = told(self.folder, "run")
        if run.get("state") == "failed":
            raise InputError("run", run.get("what", "a failure"), f"see {self.folder / 'logs'}")
        if run.get("state") == "finished":
            return
        if not self._submitted:
            self._submit("its run was not there")
        elif not run and time.monotonic() - self._submitted > _BEGIN:
            self._submit("its run did not start")
        elif run and not is_alive(int(run.get("pid", 0))):  # Flower does not wait for it
            self._submit("its process ended")

    def _submit(self, why: str, *first: list[str]) -> None:
        """Start the federation's run, if it is not over; it goes on where the one before was.

        Args:
            why: for the log.
            *first: commands of Flower's that come before.
        """
        commands, run = list(first), told(self.folder, "run")
        if run.get("state") != "finished":
            if run:
                _log.warning("the run is started again: %s", why)
            (self.folder / "status" / "run.json").unlink(missing_ok=True)
            self._submitted = time.monotonic()
            if before := told(self.folder, _SUBMITTED).get("number"):
                # Or members would wait for what the one before can no longer send.
                commands.append(["stop", str(before), _CONNECTION])
            commands.append(["run", self._place + "/app", _CONNECTION])
        try:
            said = self._flwr(*commands)
        except InputError:
            time.sleep(_TICK)
            if self._processes["superlink"].poll() is None:
                raise
            self._submitted = 0.0  # the SuperLink died over it, and so will be started again
        else:
            if self._submitted:
                tell(self.folder, _SUBMITTED, number=said[-1].get("run-id"))

    def _registrations(self) -> list[list[str]]:
        """Return what makes the members known to the SuperLink; those known before stay so."""
        keys = sorted((self.folder / "keys").glob("*.pub"))
        register = ["supernode", "register"]
        return [[*register, str(key), _CONNECTION, "--name", key.stem] for key in keys]

    def _supernode(self) -> None:
        if "supernode" in self._processes:
            if self.party.server is None and not self._is_up("worker"):
                self._start("worker", [sys.executable, "-m", "hansa.deploy.member", self._place])
            if not self._is_up("tasks"):
                self._start("tasks", _tasks_command(self.party))
        if self._is_up("supernode"):
            if told(self.folder, "supernode").get("state") != "running" and _has_joined(
                self.folder / "logs" / "supernode.log", self._log_start
            ):
                tell(self.folder, "supernode", state="running", what=self._upward)
            return
        if (self.folder / HOLD).exists():
            return
        why = _probe(self._upward, self.folder / "member" / "superlink-ca.crt")
        if why:
            tell(self.folder, "supernode", state="waiting", what=why)
            return
        log = self.folder / "logs" / "supernode.log"
        self._log_start = log.stat().st_size if log.exists() else 0
        if "supernode" in self._processes:
            _log.warning("the SuperNode ended (%s) and is started again", self._last_words(log))
        tell(self.folder, "supernode", state="starting", what=self._last_words(log))
        self._start("supernode", _supernode_command(self.folder, self.party))

    @property
    def _place(self) -> str:
        return str(self.folder)

    @property
    def _upward(self) -> str:
        return self.party.upward.superlink if self.party.upward else ""

    @property
    def _address(self) -> str:
        return f"{self.party.server.host}:{self.party.server.port}" if self.party.server else ""

    def _is_up(self, name: str) -> bool:
        """Tell whether a process runs, or rests before it may be started again."""
        process = self._processes.get(name)
        if process is not None and process.poll() is None:
            return True
        if process is None:
            return False
        if name not in self._rest:  # the first look at a process that ended begins its rest
            now, before = time.monotonic(), self._last_rest.get(name, _REST / 2)
            soon = now - self._began[name] < _SOON
            self._last_rest[name] = min(2 * before, _MOST_REST) if soon else _REST
            self._rest[name] = now + self._last_rest[name]
        return time.monotonic() < self._rest[name]

    def _start(self, name: str, command: list[str]) -> None:
        self._rest.pop(name, None)
        self._began[name] = time.monotonic()
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(  # noqa: S603 our own command
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=self._environment,
                preexec_fn=_die_with_parent,
            )

    @property
    def _environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        home = self.folder / "flower"
        own = {VARIABLE: str(self.folder), "FLWR_HOME": str(home), "PATH": path}
        return {**os.environ, **QUIET, **own, "OMP_NUM_THREADS": "1"}

    def _is_healthy(self) -> bool:
        """Wait until the SuperLink answers, and tell whether it does: it may have been killed.

        Raises:
            InputError: it ended by itself, or does not answer.
        """
        assert self.party.server is not None  # noqa: S101 for mypy
        address = f"127.0.0.1:{self.party.server.inner_port}"
        authority = self.folder / "tls" / "loopback-ca.crt"
        until = time.monotonic() + _HEALTH
        while why := _probe(address, authority):
            ended = self._processes["superlink"].poll()
            if ended is not None and ended < 0:  # by a signal: starting again mends that
                return False
            if ended is not None or time.monotonic() > until:
                found = self._last_words(self.folder / "logs" / "superlink.log") or why
                raise InputError("SuperLink", f"no answer: {found}", "one that starts")
            time.sleep(_TICK)
        home = self.folder / "flower"
        home.mkdir(exist_ok=True)
        # A relative path would be taken as one below the folder of this file.
        connection = {"address": address, "root-certificates": str(authority)}
        (home / "config.toml").write_text(
            tomli_w.dumps({"superlink": {"default": _CONNECTION, _CONNECTION: connection}})
        )
        return True

    def _flwr(self, *commands: list[str]) -> list[dict[str, Any]]:
        """Run some of Flower's commands, and return what each has to say.

        Raises:
            InputError: one fails, other than to stop what has ended and to register who is known.
        """
        if not commands:
            return []
        program = [sys.executable, "-m", "hansa.deploy.flwr_commands", json.dumps(commands)]
        try:
            done = subprocess.run(  # noqa: S603 our own command
                program,
                capture_output=True,
                text=True,
                cwd=self.folder,
                env=self._environment,
                timeout=_HEALTH + 5 * len(commands),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            found = f"no answer to `flwr {commands[0][0]}`"
            raise InputError("SuperLink", found, "one that answers") from error
        said = answers(done.stdout)
        words = [
            f"`flwr {command[0]}`: {answer.get('error-message')}"
            for command, answer in zip(commands, said, strict=False)
            if not answer.get("success") and command[0] != "stop"
        ]
        words = [text for text in words if _KNOWN not in text]
        if words or len(said) < len(commands):
            words.append(f"`flwr {commands[0][0]}`: {done.stderr[-500:].strip()}")
            raise InputError("SuperLink", words[0], "success")
        return said

    def _last_words(self, log: Path) -> str:
        """Return the last line of a log that says something went wrong, or the last one."""
        try:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines()[-40:]]
        except OSError:
            return ""
        if any(_TURNED_AWAY in line for line in lines):
            return (
                "turned away: the SuperLink does not know its key, or counts it as connected "
                "still, which lasts a minute after a node has died"
            )
        wrong = [line for line in lines if "ERROR" in line or "rror:" in line]
        return (wrong or [line for line in lines if line] or [""])[-1]

    def _end(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + _STOP
        for process in self._processes.values():
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _children(folder: Path) -> list[str]:
    """Return the paths of a federation's members.

    Raises:
        InputError: its settings do not say.
    """
    path = folder / "app" / "federation.toml"
    try:
        return [str(p) for p in toml_of(read_text(path))["federation"]["children"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(str(path), f"no federation ({error})", "what init wrote") from error


def check_port(key: str, host: str, port: int) -> None:
    """Refuse a port that another program listens on.

    Raises:
        InputError: it does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(key, f"{port} ({error.strerror})", "a free port") from error


def _superlink_command(folder: Path, party: Party) -> list[str]:
    assert party.server is not None  # noqa: S101 for mypy
    tls = folder / "tls"
    return [
        str(Path(sys.executable).with_name("flower-superlink")),
        *("--host", "127.0.0.1", "--port", str(party.server.inner_port)),
        *("--ssl-certfile", str(tls / "loopback-server.crt")),
        *("--ssl-keyfile", str(tls / "loopback-server.key")),
        *("--ssl-ca-certfile", str(tls / "loopback-ca.crt"), "--enable-supernode-auth"),
        *("--database", str(folder / _DATABASE), "--disable-runtime-dependency-installation"),
    ]


def _supernode_command(folder: Path, party: Party) -> list[str]:
    assert party.upward is not None  # noqa: S101 for mypy
    member = folder / "member"
    return [
        *(sys.executable, "-m", "hansa.federation.engines.flower.supernode"),
        str(party.upward.look),
        *("--superlink", party.upward.superlink),
        *("--host", "127.0.0.1", "--port", str(party.upward.runtime_port)),
        *("--isolation", "process"),
        *("--root-certificates", str(member / "superlink-ca.crt")),
        *("--auth-supernode-private-key", str(member / "node.key")),
    ]


def _tasks_command(party: Party) -> list[str]:
    assert party.upward is not None  # noqa: S101 for mypy
    program = [sys.executable, "-m", "hansa.federation.engines.flower.tasks"]
    return [*program, f"127.0.0.1:{party.upward.runtime_port}"]


def _probe(address: str, authority: Path) -> str:
    """Return why a server cannot be reached, nothing where it can.

    Raises:
        InputError: it shows a certificate that the authority did not sign, or one out of date.
    """
    host, _, port = address.rpartition(":")
    try:
        context = ssl.create_default_context(cafile=str(authority))
        with (
            socket.create_connection((host, int(port)), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return ""
    except ssl.SSLCertVerificationError as error:
        found = f"{address} shows a certificate that is refused ({error.verify_message})"
        raise InputError(str(authority), found, "the certificate of its authority") from error
    except OSError as error:
        return f"for {address} ({error.strerror or error})"


def _has_joined(log: Path, start: int) -> bool:
    """Tell whether a SuperNode's log says that the SuperLink took it in."""
    try:
        with log.open("rb") as file:
            file.seek(start)
            return b"SuperNode ID" in file.read()
    except OSError:
        return False


def _die_with_parent() -> None:
    """Have a process that is about to start told to end when this one ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a party for this process, and leave its number for ``down``.

    Raises:
        InputError: another process runs the party.
    """
    with (folder / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(str(folder), "a party that runs already", "an idle one") from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Yield what tells whether SIGTERM or SIGINT has come."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

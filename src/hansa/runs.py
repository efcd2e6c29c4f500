"""A run's folder: configuration, states, tables, and a checkpoint after every round.

``config.toml``
    the configuration as validated; ``hansa train`` takes it as it is.
``checkpoint.json``
    the last whole round and what the run stands on. It is replaced last in a round, by a rename;
    whatever a kill leaves behind of a later round is removed on the next start.
``pruning.safetensors``
    masks that were found before the first round, where the configuration asks for any.
``curation/``
    which examples are used from a round on, and how that was found, where the configuration asks.
``states/``
    states of nodes, as encoded messages.
``log.txt``
    how the work was done, and why.
``parts/``
    tables of single rounds, until the run ends.
``scores.parquet``, ``ledger.parquet``, ``pairs.parquet``, ``figures.parquet``,
``rounds.parquet``, ``summary.json``, ``bundle/``
    the result.
"""

import errno
import fcntl
import json
import logging
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import save as save_masks

from hansa import bundle
from hansa.config import RunConfig, load
from hansa.curation.masks import Kept
from hansa.errors import InputError
from hansa.federation.engines.engine import RoundResult
from hansa.federation.engines.plan import Plan
from hansa.federation.history import SCHEMAS, History, tables_of
from hansa.federation.privacy import Privacy
from hansa.federation.rules import inherited
from hansa.federation.store import DiskStore
from hansa.federation.tree import ROOT, name_of
from hansa.files import sync_folder, write_atomic
from hansa.parquet import read_table
from hansa.tensor_files import read_tensors
from hansa.untrusted import json_of, read_text

FORMAT = 5


class BusyError(InputError):
    """A run that another process is at work on."""


class Run:
    """One run's folder, open for reading, or for writing once locked.

    Attributes:
        path: the folder.
        config: the run's configuration.
        checkpoint: what the last checkpoint says: ``round``, ``states`` (how many), and the facts
            that the run stands on: ``data``, ``bundle``, ``clients``, ``classes``.
        history: what the run measured up to its last checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a run.

        Raises:
            InputError: no run there, or a damaged one.
        """
        self.path = path = Path(path)
        if not (path / "config.toml").is_file():
            raise InputError(str(path), "no run", "the folder of a run, with its config.toml")
        self.config = load(path / "config.toml")
        try:
            self.checkpoint = self._read_checkpoint()
            self.history = History(self._tables())
        except (ValueError, KeyError, pa.ArrowException, OSError) as error:
            raise InputError(str(path), f"a damaged run ({error})", "a whole run") from error

    @classmethod
    def create(cls, config: RunConfig) -> "Run":
        """Make the folder of a new run; its name is counted up where it is taken."""
        first, number = config.folder, 1
        parent = first.parent
        # Filled beside its name, so that a kill leaves a whole run or none.
        made = parent / f".{first.name}-{secrets.token_hex(4)}"
        try:
            made.mkdir(parents=True)
        except OSError as error:
            raise InputError(
                "output", f"{parent} ({error.strerror})", "a folder that can be written"
            ) from error
        start = json.dumps({"format": FORMAT, "round": 0}) + "\n"
        write_atomic(made / "checkpoint.json", start)
        write_atomic(made / "config.toml", config.as_toml())
        while True:
            path = first if number == 1 else parent / f"{first.name}-{number}"
            try:
                made.rename(path)
                break
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                number += 1
        sync_folder(parent)
        return cls(path)

    @property
    def round(self) -> int:
        """The last whole round; 0 before the first."""
        return int(self.checkpoint["round"])

    @property
    def data_fingerprint(self) -> str:
        """SHA-256 over the data that the run stands on; empty before its start."""
        return str(self.checkpoint.get("data", ""))

    @contextmanager
    def claimed(self, config: RunConfig, facts: dict[str, Any]) -> Iterator[None]:
        """Hold the run for this process alone, and check what it stands on.

        Args:
            config: the configuration to follow from here on.
            facts: JSON values; ``data`` (the fingerprint) and ``bundle`` (the digest of the one
                it starts from) must be those that the run began with.

        Raises:
            InputError: another process is at work on the run, or it was begun on other facts.
        """
        with locked(self.path):
            if self._read_checkpoint() != self.checkpoint:
                raise InputError(str(self.path), "a run that went on meanwhile", "another try")
            for key in ("data", "bundle"):
                began, now = (str(f.get(key, facts[key])) for f in (self.checkpoint, facts))
                if began != now:
                    raise InputError(
                        str(self.path), f"{key} {now[:12]}", f"the run's {key}, {began[:12]}"
                    )
            if config != self.config:
                self.config = config
                write_atomic(self.path / "config.toml", config.as_toml())
            self.checkpoint |= {"format": FORMAT, **facts}
            self._write_checkpoint()
            if self.round < config.rounds:  # a summary stands for a finished run
                (self.path / "summary.json").unlink(missing_ok=True)
            with _logged(self.path / "log.txt"):
                yield

    def store(self) -> DiskStore:
        """Return the states of the run as of its last whole round.

        Raises:
            InputError: some of them are missing.
        """
        memory = self.config.engine.state_memory_mb * 1_000_000
        self._store = DiskStore(self.path / "states", self.round, memory)
        held, wanted = self._store.num_states, self.checkpoint.get("states", 0)
        if held != wanted:
            raise InputError(str(self.path / "states"), f"{held} states", f"all {wanted} of them")
        return self._store

    @property
    def masks(self) -> dict[str, torch.Tensor] | None:
        """The masks found before the first round: name -> bool tensor, True where kept.

        Returns:
            None where there are none yet, and in a run without pruning.

        Raises:
            InputError: a file that cannot be read.
        """
        path = self.path / "pruning.safetensors"
        if not path.exists():
            return None
        try:
            return read_tensors(path)
        except (OSError, ValueError) as error:
            raise InputError(str(path), f"unreadable ({error})", "masks") from error

    def keep_masks(self, masks: dict[str, torch.Tensor], result: RoundResult) -> None:
        """Make permanent what was found before the first round, and what it cost."""
        self.record(result, None)
        content = {name: mask.contiguous() for name, mask in masks.items()}
        write_atomic(self.path / "pruning.safetensors", save_masks(content))

    def curated(self, round_: int) -> Kept | None:
        """Return which examples are used after a round, None where all of them are.

        Raises:
            InputError: a file that cannot be read.
        """
        found = sorted((self.path / "curation").glob("*.json"))
        path = next((p for p in reversed(found) if _number(p.stem) <= round_), None)
        if path is None:
            return None
        try:
            tensors = read_tensors(path.with_suffix(".safetensors"))
            held = json_of(read_text(path))
        except (OSError, ValueError) as error:
            raise InputError(str(path), f"unreadable ({error})", "masks") from error
        if not isinstance(held, dict):
            raise InputError(str(path), type(held).__name__, "a table about the masks")
        clients: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, what = key.rpartition("/")
            clients.setdefault(name, {})[what] = tensor
        return Kept(clients, held)

    def keep_curated(self, kept: Kept) -> None:
        """Make permanent which examples are used from a round on."""
        folder = self.path / "curation"
        folder.mkdir(exist_ok=True)
        tensors = {
            f"{name}/{what}": tensor.contiguous()
            for name, held in kept.clients.items()
            for what, tensor in held.items()
        }
        stem = folder / f"{int(kept.manifest['round']):08d}"
        write_atomic(stem.with_suffix(".safetensors"), save_masks(tensors))
        write_atomic(stem.with_suffix(".json"), json.dumps(kept.manifest, indent=2) + "\n")

    @property
    def plan(self) -> Plan | None:
        """How the newest round was done, None before the first."""
        plan = self.checkpoint.get("plan")
        try:
            return Plan(**plan) if plan else None
        except TypeError as error:
            place = str(self.path / "checkpoint.json")
            raise InputError(place, f"another plan ({error})", "that of a run") from error

    def record(self, result: RoundResult, plan: Plan | None) -> None:
        """Make one round permanent: tables, then the checkpoint, then the clearing-up.

        A round that is there already is replaced, and what came after it removed.
        """
        tables = tables_of(result)
        folder = self.path / "parts"
        folder.mkdir(exist_ok=True)
        # The round before the first, the 0th, is there already only where its tables are.
        again = result.number <= self.round and (result.number > 0 or bool(self._parts()))
        for name, table in tables.items():
            _write_table(folder / f"{result.number:08d}-{name}.parquet", table)
        self.checkpoint |= {"round": result.number, "states": self._store.num_states}
        if plan is not None:
            self.checkpoint["plan"] = vars(plan)
        self._write_checkpoint()
        if again:
            for path in (self.path / "parts").glob("*.parquet"):
                if int(path.name[:8]) > result.number:
                    path.unlink()
            self.history = History(self._tables())
        else:
            self.history.add(tables)
        self._store.prune()

    def privacy(self, drawn: Literal["seed", "secret"] = "seed") -> dict[str, dict[str, Any]]:
        """Return private node -> its rules and the ``epsilon`` that its training has spent.

        That is None where it is infinite, as without noise, or where it was not told node by node.
        Of the nodes of a deployment, whose rules are their own, there is no more than they told.

        Args:
            drawn: where noise comes from: the run's seed, by which it can be taken off again, or a
                secret of the node.
        """
        found: dict[str, dict[str, Any]] = {}
        if (central := self.config.central) is not None:
            found = {ROOT: _told(central)}
        elif nodes := self.config.nodes:
            rules = inherited(self.config.shape(), self.config.rules)
            found = {
                name_of(path): _told(held.privacy)
                for path, held in rules.items()
                if held.privacy is not None and nodes[name_of(path)].text is not None
            }
        spent = self.history.epsilons()
        if not found and (flat := self.config.privacy) is not None:
            found = dict.fromkeys(spent, _told(flat.rule))
        return {
            name: {**found.get(name, {}), "epsilon": spent.get(name), "drawn": drawn}
            for name in found | spent
        }

    def summary(self) -> dict[str, Any]:
        """Return where the run lies, its method, and what it measured in a few numbers."""
        about = {"run": str(self.path), "method": self.config.method.name}
        return {**about, **self.history.summary()}

    def finish(self, common: bundle.Bundle | None) -> dict[str, Any]:
        """Gather the tables into one file each, and write and return the summary."""
        for name in SCHEMAS:  # `rounds` last, see `_tables`
            _write_table(self.path / f"{name}.parquet", self.history.table(name))
        shutil.rmtree(self.path / "parts", ignore_errors=True)
        summary = {**self.summary(), "bundle": common.digest if common else None}
        write_atomic(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _read_checkpoint(self) -> dict[str, Any]:
        path = self.path / "checkpoint.json"
        try:
            checkpoint = json_of(read_text(path))
            fits = checkpoint["format"] == FORMAT and _is_round(checkpoint["round"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(str(path), f"no checkpoint ({error})", "that of a run") from error
        if not fits:
            raise InputError(str(path), "another format", f"format {FORMAT}")
        return dict(checkpoint)

    def _write_checkpoint(self) -> None:
        write_atomic(self.path / "checkpoint.json", json.dumps(self.checkpoint, indent=2) + "\n")

    def _parts(self) -> list[int]:
        """Return the rounds whose tables stand apart; a federation may have missed some."""
        files = (self.path / "parts").glob(f"{'[0-9]' * 8}-rounds.parquet")
        return sorted(int(p.name[:8]) for p in files)

    def _tables(self) -> list[dict[str, pa.Table]]:
        """Return the tables of every whole round; those of an unfinished round are left out."""
        gathered = {
            name: _read_table(self.path / f"{name}.parquet", name)
            for name in SCHEMAS
            if (self.path / f"{name}.parquet").exists()
        }
        # A run killed while gathering has newer files beside older ones, and still all its parts.
        # `rounds` is written last, so it tells how far all of them reach.
        held = History([gathered]).num_rounds if len(gathered) == len(SCHEMAS) else -1
        tables = [
            {name: table.filter(pc.field("round") <= held) for name, table in gathered.items()}
        ]
        for number in self._parts():
            if held < number <= self.round:
                stem = self.path / "parts" / f"{number:08d}"
                tables.append(
                    {name: _read_table(Path(f"{stem}-{name}.parquet"), name) for name in SCHEMAS}
                )
        return tables


def claim(path: Path, begun: bool, own: Collection[str], whose: str) -> None:
    """Make the folder of a stage, unless something else lies there.

    Args:
        path: the folder.
        begun: whether the stage's own work lies there already.
        own: what it may find there before that, beside its lock and half-written files of these.
        whose: whose folder it may be, in words.

    Raises:
        InputError: no folder can be made, or something else lies there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(str(path), f"no folder ({error.strerror})", "a folder to make") from error
    known = {".lock", *own, *(f".{name}.tmp" for name in own)}
    if not begun and (odd := sorted({entry.name for entry in path.iterdir()} - known)):
        raise InputError("--out", f"{path} with {odd[0]} in it", f"a new folder, or {whose}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone.

    Raises:
        BusyError: another process is at work on it.
    """
    with (folder / ".lock").open("w") as lock:
        for patience in (0.05, 0.05, 0.0):  # one that only looks (`is_locked`) is gone by then
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if not patience:
                    raise BusyError(str(folder), "a run under way", "an idle run") from error
                time.sleep(patience)
        yield


def is_locked(folder: Path) -> bool:
    """Tell whether a process is at work on a folder; nothing is written, and nobody kept out."""
    try:
        with (folder / ".lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Append what Hansa logs to a file."""
    handler, logger = logging.FileHandler(path), logging.getLogger("hansa")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()


def _told(rule: Privacy) -> dict[str, Any]:
    """Return what of a rule of privacy stands beside what was spent."""
    return rule.model_dump(include={"unit", "noise", "delta"})


def _is_round(value: object) -> bool:
    """Tell whether a value numbers a round; a file is called by it, with eight digits."""
    return type(value) is int and 0 <= value < 10**8


def _number(stem: str) -> int:
    """Return the round that a file is called by; of another file, one that never comes."""
    return int(stem) if re.fullmatch(r"[0-9]{8}", stem) else 10**8


def _read_table(path: Path, name: str) -> pa.Table:
    table = read_table(path, str(path))
    if not table.schema.equals(SCHEMAS[name]):
        raise ValueError(f"{path.name} has other columns")
    return table


def _write_table(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomic(path, sink.getvalue().to_pybytes())
    sync_folder(path.parent)

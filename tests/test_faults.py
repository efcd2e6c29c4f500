"""What a machine may do to a run beside killing it: a disk that takes nothing, a clock that jumps.

Late and repeated answers, old requests that come again, and kills of every part are in
``federation/engines/test_remote.py`` and ``deploy/``; ``benchmarks/faults.py`` kills at random.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hansa.files
from hansa.bundle import read_bundle
from hansa.cli import app
from hansa.config import load
from hansa.deploy import mailbox
from hansa.deploy.mailbox import Mailbox
from hansa.errors import InputError
from hansa.federation.engines.flower.exchange import Answer, Request
from hansa.runs import Run
from hansa.training import completed, train

CONFIG: dict[str, Any] = {
    "name": "faulty",
    "rounds": 4,
    "data": {"clients": 3, "train_per_class": 3, "partition": {"kind": "shards", "classes": 4}},
    "training": {"lr": 0.1},
    "method": {"name": "fedper"},
    "engine": {"kind": "sequential", "workers": 1},
}


def full(patch: pytest.MonkeyPatch, room: float) -> Iterator[int]:
    """Have no file synced after the first ones, and return what counts them."""
    syncs = count()

    def fsync(handle: int) -> None:
        if next(syncs) >= room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(hansa.files.os, "fsync", fsync)
    return syncs


def read_only(patch: pytest.MonkeyPatch, room: float) -> Iterator[int]:
    """Have no state or checkpoint opened after the first ones, and return what counts them."""
    opens, usual = count(), Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        # States are written in place, all else beside its place.
        if "w" in mode and path.suffix in (".msg", ".tmp") and next(opens) >= room:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return usual(path, mode, *args, **options)

    patch.setattr(Path, "open", opened)
    return opens


DISKS: dict[Callable[[pytest.MonkeyPatch, float], Iterator[int]], str] = {
    full: "No space left",
    read_only: "Read-only file system",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, bytes], Any]:
    """An undisturbed run: its bundle's digest, its states, and how often it met each disk."""
    with pytest.MonkeyPatch.context() as patch:
        met = {disk: disk(patch, float("inf")) for disk in DISKS}
        run = train({**CONFIG, "output": str(tmp_path_factory.mktemp("whole"))})
    nums = {disk: next(calls) for disk, calls in met.items()}
    return read_bundle(run.path / "bundle").digest, states(run), nums


def states(run: Run) -> dict[str, bytes]:
    """Return the files that hold the run's states."""
    found = (run.path / "states").rglob("*")
    return {path.name: path.read_bytes() for path in found if path.is_file()}


@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("part", range(12))
def test_a_disk_that_takes_nothing_for_a_while_costs_no_state(
    part: int, disk: Any, whole: Any, tmp_path: Path
) -> None:
    digest, expected, nums = whole
    config = load({**CONFIG, "output": str(tmp_path)})
    with pytest.MonkeyPatch.context() as patch:
        disk(patch, part * nums[disk] // 12)
        with pytest.raises((OSError, InputError), match=DISKS[disk]):
            completed(config)
    path = completed(config)
    assert read_bundle(path / "bundle").digest == digest
    assert states(Run(path)) == expected


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("rounds = 1\n[data]\nclients = 2\n")
    # Not by permissions, which do not hold for root: nobody makes folders there.
    done = CliRunner().invoke(
        app, ["train", str(tmp_path / "config.toml"), "--set", "output=/proc/none"]
    )
    assert isinstance(done.exception, InputError)
    assert "output: found /proc/none" in str(done.exception)


@pytest.mark.parametrize("jump", [-4e8, 4e8])
def test_a_clock_that_jumps_changes_no_number(
    jump: float, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, calls = time.time, count()
    monkeypatch.setattr(time, "time", lambda: now() + jump * (next(calls) % 2))
    run = train({**CONFIG, "output": str(tmp_path)})
    assert read_bundle(run.path / "bundle").digest == whole[0]
    assert states(run) == whole[1]


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_an_answer_reaches_whoever_asked_though_the_clock_jumps(
    jump: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    monkeypatch.setattr(mailbox.time, "time", lambda: now() + jump)
    box = Mailbox(tmp_path)
    stop = threading.Event()

    def work() -> None:
        for request in box.requests():
            if request is not None:
                box.reply(request, Answer(request.path, request.round))
            if stop.is_set():
                return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for number in range(1, 4):
            request = Request("train", "1", "root/a", number)
            answer = box.ask(request, 30.0)
            assert answer is not None
            assert answer.round == number
    finally:
        stop.set()
        thread.join()

"""Bad input, damaged files and messages by the thousand: only named errors may come of them.

    python benchmarks/fuzz.py [--quick] [--json] [--seconds 20] [--target NAME ...] [--seeded]

Every target (``fuzz_targets.py``) reads bytes that come from elsewhere and must return or raise
its own named error, within seconds and a gigabyte. Inputs are valid ones made on the spot and
damaged (``fuzz_mutations.py``); where atheris is installed, what reached new lines of Hansa is
damaged further, otherwise all is drawn from a seed. Each target runs in a fork of its own, whose
address space is limited, and in another one where an input ends it. What was found lies in
``--keep``. The last line says how many inputs were tried and how many of them got through.
"""

import argparse
import importlib.util
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from fuzz_mutations import damaged

_HELD = struct.Struct("<QQ")  # inputs tried, bytes of the one under way
_ROOM = 1 << 21
_CPU = 5.0  # seconds of an input's own
_WALL = 30.0  # seconds, on a machine with other work
_GROWTH = 1 << 30  # bytes of memory that an input may take
_SPACE = 6 << 30  # bytes of address space beyond what the libraries take


class Hang(BaseException):
    """An input that takes too long."""


def main() -> None:
    """Fuzz all targets, or do what a process of one of them does."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="two seconds a target")
    parser.add_argument("--json", action="store_true", help="nothing but the last line")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each target")
    parser.add_argument("--target", action="append", help="one of them; by default all")
    parser.add_argument("--seeded", action="store_true", help="without atheris")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for inputs that got through")
    options = parser.parse_args()
    targets = instrumented(not options.seeded)
    guided = not options.seeded and "atheris" in sys.modules
    seconds = 2.0 if options.quick else options.seconds
    inputs, crashes = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        keep = options.keep or Path(folder)
        for name in options.target or targets:
            tried, found = watched(targets[name], keep / name, seconds, options.seed, guided)
            inputs, crashes = inputs + tried, crashes + len(found)
            if not options.json:
                print(f"{name:14} {tried:9,} inputs {len(found):3} crashes", flush=True)
                for each in found:
                    print(f"    {each['error'][:160]} at {each['where']}", flush=True)
    print(json.dumps({"inputs": inputs, "crashes": crashes}))


def instrumented(guided: bool) -> dict[str, Any]:
    """Return the targets, so imported that atheris sees which lines are reached."""
    if guided and importlib.util.find_spec("atheris") is not None:
        import atheris

        with atheris.instrument_imports(include=["hansa"]):
            from fuzz_targets import TARGETS
    else:
        from fuzz_targets import TARGETS
    torch.set_num_threads(1)
    return dict(TARGETS)


def watched(
    target: Any, folder: Path, seconds: float, seed: int, guided: bool
) -> tuple[int, list[dict[str, str]]]:
    """Run a target in forks, and return how many inputs it had and what got through.

    Args:
        target: what reads them.
        folder: where inputs that got through are kept.
        seconds: how long.
        seed: of the first fork; one more for each that takes its place.
        guided: whether atheris chooses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, used = folder / "state", 0.0
    tried, found = 0, list[dict[str, str]]()
    while used < seconds and len(found) < 20:
        state.write_bytes(bytes(_HELD.size + _ROOM))
        if (process := os.fork()) == 0:
            _begin(target, folder, seconds - used, seed, guided)
        began = time.monotonic()
        ended = _waited(process, state)
        count, size = _HELD.unpack_from(data := state.read_bytes())
        used += time.monotonic() - began
        tried, seed = tried + count, seed + 1
        if ended:
            if not count and not size:
                raise RuntimeError((folder / "log").read_text()[-2000:])
            held = data[_HELD.size : _HELD.size + size]
            found.append(_kept(folder, held, f"its process ended ({ended})", "native code"))
    state.unlink()
    told = folder / "found.jsonl"
    lines = told.read_text().splitlines() if told.exists() else []
    return tried, [*map(json.loads, lines), *found]


def _waited(process: int, state: Path) -> int:
    """Return how a fork ended: 0, its code, or a signal below 0; one that hangs is ended."""
    last, since = -1, time.monotonic()
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        count = _HELD.unpack_from(state.read_bytes())[0]
        if count != last:
            last, since = count, time.monotonic()
        elif time.monotonic() - since > 4 * _WALL:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.2)


def _kept(folder: Path, data: bytes, error: str, where: str) -> dict[str, str]:
    name = f"input-{len(list(folder.glob('input-*'))):03d}"
    (folder / name).write_bytes(data)
    return {"error": error, "where": where, "input": name}


class Runner:
    """Hands inputs to a target, one after another, and notes what should not have come of one."""

    def __init__(self, target: Any, folder: Path, place: Path) -> None:
        self.target, self._folder, self._place = target, folder, place
        with (folder / "state").open("r+b") as file:
            self._state = mmap.mmap(file.fileno(), 0)
        self.count, self._known = 0, set[str]()
        told = folder / "found.jsonl"
        if told.exists():
            self._known = {json.loads(line)["where"] for line in told.read_text().splitlines()}
        self._most = _peak() + _GROWTH
        for number in (signal.SIGVTALRM, signal.SIGALRM):
            signal.signal(number, _hang)

    def __call__(self, data: bytes) -> None:
        """Try one input."""
        self._state[: _HELD.size] = _HELD.pack(self.count, min(len(data), _ROOM))
        self._state[_HELD.size : _HELD.size + min(len(data), _ROOM)] = data[:_ROOM]
        try:
            with timed():
                self.target.run(data, self._place)
        except self.target.named:
            pass
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also what native code raises past Exception
            self._note(data, error)
        if _peak() > self._most:
            self._most = _peak() + _GROWTH
            self._note(data, MemoryError(f"{_peak() >> 20} MB"))
        self.count += 1
        self._state[: _HELD.size] = _HELD.pack(self.count, 0)

    def _note(self, data: bytes, error: BaseException) -> None:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "hansa" in f.filename]
        own = frames[-1] if frames else None
        where = f"{Path(own.filename).name}:{own.lineno}" if own else "the target"
        where += f" ({type(error).__name__})"
        if where not in self._known:
            self._known.add(where)
            text = f"{type(error).__name__}: {error}"[:300]
            with (self._folder / "found.jsonl").open("a") as file:
                file.write(json.dumps(_kept(self._folder, data, text, where)) + "\n")
            with (self._folder / "log").open("a") as log:
                traceback.print_exception(error, limit=-12, file=log)


@contextmanager
def timed() -> Iterator[None]:
    """Raise ``Hang`` where what follows takes too long."""
    signal.setitimer(signal.ITIMER_VIRTUAL, _CPU)
    signal.setitimer(signal.ITIMER_REAL, _WALL)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(signal.Signals(number).name)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _begin(target: Any, folder: Path, seconds: float, seed: int, guided: bool) -> NoReturn:
    """Fuzz one target in this fork until the time is over."""
    with (folder / "log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        with tempfile.TemporaryDirectory() as made:
            os.chdir(made)
            place = Path(made)
            corpus = target.seeds(place)
            space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (space + _SPACE, space + _SPACE))
            runner = Runner(target, folder, place)
            for data in corpus:
                runner(data)
            over = time.monotonic() + seconds
            if guided:
                _guided(runner, corpus, place, over, seed)
            else:
                _drawn(runner, corpus, over, seed)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _drawn(runner: Runner, corpus: Sequence[bytes], over: float, seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311 (no secret is drawn)
    while time.monotonic() < over:
        runner(runner.target.fixed(damaged(rng, rng.choice(corpus), corpus)))


def _guided(runner: Runner, corpus: Sequence[bytes], place: Path, over: float, seed: int) -> None:
    """Let atheris choose what is damaged further; it ends the process."""
    import atheris

    begun = place / "corpus"
    begun.mkdir()
    for number, data in enumerate(corpus):
        (begun / f"{number:04d}").write_bytes(data)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)  # noqa: S311 (no secret is drawn)
        if rng.random() < 0.3:
            made = bytes(atheris.Mutate(data, len(data)))
        else:
            made = damaged(rng, data or rng.choice(corpus), corpus)
        return bytes(runner.target.fixed(made)[:most])

    def once(data: bytes) -> None:
        if time.monotonic() > over:
            shutil.rmtree(place, ignore_errors=True)
            os._exit(0)
        runner(data)

    flags = ["-timeout=0", "-rss_limit_mb=0", f"-max_len={1 << 20}", f"-seed={seed + 1}"]
    flags += ["-verbosity=0", "-len_control=0", f"-artifact_prefix={place}/"]
    atheris.Setup([sys.argv[0], *flags, str(begun)], once, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""The part of ``faults.py`` that kills pipelines: both that come with Hansa, made smaller.

A pipeline is killed at random moments of every stage and gone on with; its bundles' digests are
compared with those of one that nobody disturbed. Both start after the profile, if there is one,
which measures this machine and gives other numbers every time.
"""

import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from hansa.demo import SMALLER

SMALLEST = {
    "edge": ("train.training.epochs=1", "train.rounds=4", "personalise.rounds=2"),
    "language": (
        *("base.rounds=3", "base.training.lr_rounds=3", "train.training.steps=10"),
        "redteam.attacks=[{ name='full', steps=20, lrs=[1e-3] }]",
        "redteam.probes=[10, 20]",
    ),
}
"""Overrides beside the demo's: it is not about what is learned."""


def work(name: str, folder: str, until: str | None = None) -> None:
    """Bring a pipeline to its end, or on with it: what is killed."""
    from hansa.pipeline import pipeline

    os.chdir(folder)
    pipeline(name, overrides=[*SMALLER[name], *SMALLEST[name]], until=until)


def pipelines(kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill each stage of both pipelines so many times."""
    found: dict[str, Any] = {"kills": 0, "runs": 0, "lost": [], "stages": {}}
    for name in SMALLER:
        with tempfile.TemporaryDirectory() as place:
            whole, killed = Path(place) / "whole", Path(place) / "killed"
            whole.mkdir()
            if name == "edge":
                _start(name, whole, "profile").join()
            shutil.copytree(whole, killed)
            _start(name, whole).join()
            expected = _told(name, whole)
            hits = _torment(name, killed, expected, kills, rng)
            found["kills"] += sum(hits.values())
            found["runs"] += 1
            found["stages"] |= hits
            found["lost"] += [f"{name}: {odd}" for odd in _odd(expected, _told(name, killed))]
        print(f"{name}: {dict(hits)}, {len(found['lost'])} lost", file=sys.stderr, flush=True)
    return found


def _torment(
    name: str, folder: Path, stages: list[dict[str, Any]], kills: int, rng: random.Random
) -> Counter[str]:
    """Kill each stage so often, and let the pipeline end; return the stages that were hit."""
    hits: Counter[str] = Counter()
    for stage in stages:
        if stage["kind"] == "profile":
            continue
        for _ in range(kills):
            began = time.time_ns()
            process = _start(name, folder)
            # A stage that the kill before came too late for is done: then any stage will do.
            while process.is_alive() and _state(name, folder, stage["name"], began) == "waiting":
                time.sleep(0.02)
            process.join(rng.uniform(0, 0.8 * stage["seconds"] / kills))
            if process.is_alive():
                process.kill()
                process.join()
                hits.update(
                    each["name"] for each in _told(name, folder) if each["state"] == "running"
                )
    _start(name, folder).join()
    return hits


def _start(name: str, folder: Path, until: str | None = None) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hansa.pipeline", "torch", "sklearn.datasets", "transformers"])
    process = context.Process(target=work, args=(name, str(folder), until))
    process.start()
    return process


def _told(name: str, folder: Path) -> list[dict[str, Any]]:
    stages = json.loads((folder / f"runs/{name}-seed0/pipeline.json").read_text())["stages"]
    return [dict(stage) for stage in stages]


def _state(name: str, folder: Path, stage: str, since: int) -> str:
    """Return a stage's state, as this process has told it: one that was killed left its own."""
    path = folder / f"runs/{name}-seed0/pipeline.json"
    if not path.exists() or path.stat().st_mtime_ns < since:
        return "waiting"
    (state,) = (str(each["state"]) for each in _told(name, folder) if each["name"] == stage)
    return state


def _odd(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    """Return the stages that do not hold the same."""
    kept = ("name", "state", "key", "digest")
    return [
        mine["name"]
        for mine, theirs in zip(expected, found, strict=True)
        if mine["state"] != "done" or any(mine[key] != theirs[key] for key in kept)
    ]

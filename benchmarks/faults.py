"""Kill processes at random moments, go on, and compare with a run that nobody disturbed.

``local``: the process of a run on one machine, again and again until the run is finished, by
several methods. ``deployed``: a federation of two federations on the loopback, of which any
process may be killed: a client's worker, a SuperNode, a gateway's server or SuperLink, the root's.
``pipelines``: both that come with Hansa, in each stage.
What is compared: of a run every state of every node and link, the bundle, and the tables but for
times; of a deployment the root's model and the clients' states with those of the local engine, and
that no child was missed; of a pipeline the digests of all bundles.

    python benchmarks/faults.py [--quick] [--only local|deployed|pipelines]
                                [--kills N] [--seed S] [--json]
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults_pipelines import pipelines

DATA = {"clients": 6, "train_per_class": 6, "partition": {"kind": "shards", "classes": 4}}
RUN = {
    "name": "killed",
    "data": DATA,
    "model": {"options": {"hidden": [32]}},
    "training": {"lr": 0.1, "batch_size": 8, "epochs": 2},
    "engine": {"kind": "sequential", "workers": 1},
}
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedper": {},
    "ditto": {},
    "scaffold": {},
    "fedselect": {"rate": 0.1},
    "zerofl": {"sparse": ["*"]},
}
ROUNDS = 25
_ABOUT_TIME = {"seconds", "start", "speed"}


def work(config: Mapping[str, Any]) -> None:
    """Bring a run to its end, or on with it: what is killed."""
    from hansa.config import load
    from hansa.training import completed

    completed(load(config))


def contents(folder: Path) -> dict[str, Any]:
    """Return all that a finished run holds, but for how long it took."""
    from hansa.bundle import read_bundle
    from hansa.runs import Run

    run = Run(folder)
    found: dict[str, Any] = {"round": run.round}
    if (folder / "bundle").is_dir():
        found["bundle"] = read_bundle(folder / "bundle").digest
    for name in ("scores", "ledger", "pairs", "figures"):
        table = run.history.table(name)
        kept = [column for column in table.column_names if column not in _ABOUT_TIME]
        found[name] = table.select(kept).to_pylist()
    return found | {
        f"state {path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "states").rglob("*"))
        if path.is_file()
    }


def local(kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill runs on one machine until so many kills are done."""
    # Forks of a process that has imported everything begin at once, so that kills hit work.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hansa.training", "torch", "sklearn.datasets"])
    done, lost, finished, rounds = 0, [], 0, Counter[int]()
    with tempfile.TemporaryDirectory() as place:
        whole: dict[str, tuple[float, Any]] = {}
        for name, options in METHODS.items():
            config = _config(name, options, f"{place}/whole-{name}")
            began = time.perf_counter()
            process = context.Process(target=work, args=(config,))
            process.start()
            process.join()
            seconds = time.perf_counter() - began
            whole[name] = seconds, contents(Path(config["output"]) / "killed-seed0")
        while done < kills:
            name = rng.choice(list(METHODS))
            seconds, expected = whole[name]
            config = _config(name, METHODS[name], f"{place}/{finished}-{name}")
            folder = Path(config["output"]) / "killed-seed0"
            limit = 0.6 * seconds
            while True:
                process = context.Process(target=work, args=(config,))
                process.start()
                process.join(rng.uniform(0, limit))
                if process.exitcode is None:
                    process.kill()
                    process.join()
                    done += 1
                    rounds[_round(folder)] += 1
                elif process.exitcode == 0:
                    break
                else:
                    lost.append(f"{name}: ended by itself with {process.exitcode}")
                    break
                limit *= 1.1  # so that it ends
            finished += 1
            if process.exitcode == 0 and (odd := differences(contents(folder), expected)):
                lost.append(f"{name}: {odd}")
            print(f"{done} kills, {finished} runs, {len(lost)} lost", file=sys.stderr, flush=True)
    return {"kills": done, "runs": finished, "lost": lost, "in_rounds": len(rounds)}


def _config(name: str, options: Mapping[str, Any], output: str) -> dict[str, Any]:
    return {**RUN, "rounds": ROUNDS, "method": {"name": name, **options}, "output": output}


def _round(folder: Path) -> int:
    try:
        return int(json.loads((folder / "checkpoint.json").read_text())["round"])
    except OSError:
        return -1


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return the names of what is not the same, or is not there."""
    return sorted(
        key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)
    )


TREE = {"north": ("n1", "n2"), "south": ("s1", "s2")}
PROCESSES = {
    "worker": "hansa.deploy.member",
    "SuperNode": "engines.flower.supernode",
    "server": "bin/flwr-serverapp",
    "SuperLink": "bin/flower-superlink",
    "door": "deploy.gate",
}


def deployed(kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill processes of deployments until so many kills are done."""
    done, lost, finished, parts = 0, [], 0, Counter[str]()
    while done < kills:
        with tempfile.TemporaryDirectory() as place, _tree(Path(place)) as (parties, config):
            hit = _torment(parties, rng, kills - done)
            done, finished = done + sum(hit.values()), finished + 1
            parts += hit
            for odd in _against_local(parties, config, Path(place)):
                lost.append(f"deployment {finished}: {odd}")
        print(f"{done} kills, {finished} runs, {len(lost)} lost", file=sys.stderr, flush=True)
    return {"kills": done, "runs": finished, "lost": lost, "parts": dict(parts)}


@contextmanager
def _tree(place: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Start a deployment of two federations of two clients, and stop it afterwards."""
    import tomli_w

    from hansa.deploy.layout import init
    from hansa.deploy.options import read_deployment
    from hansa.deploy.trial import down, up

    names = [name for members in TREE.values() for name in members]
    config = {
        "name": "killed",
        "rounds": 12,
        "score_every": 0,
        "data": {**DATA, "clients": len(names)},
        "model": {"options": {"hidden": [32]}},
        "training": {"lr": 0.1, "batch_size": 8},
        "method": {"name": "fedper"},
    }
    calm = {"deadline": 1200.0, "wait": 600.0, "look": 0.5}
    deploy = {
        "port": free_ports(len(names) + 6),
        **calm,
        "federations": {name: {**calm, "deadline": 1000.0} for name in TREE},
        "parties": {
            f"client-{names.index(name)}": {"federation": above}
            for above, members in TREE.items()
            for name in members
        },
    }
    path = place / "federation.toml"
    path.write_text(tomli_w.dumps({**config, "deploy": deploy}))
    parties = place / "parties"
    init(read_deployment(path), parties)
    up(parties)
    try:
        yield parties, config
    finally:
        down(parties)


def _torment(parties: Path, rng: random.Random, most: int) -> Counter[str]:
    """Kill a process every few seconds until the root is finished; return which parts were hit."""
    from hansa.deploy.party import told
    from hansa.deploy.trial import processes

    hit: Counter[str] = Counter()
    end = time.monotonic() + 1500
    while told(parties / "root", "run").get("state") != "finished":
        if time.monotonic() > end:
            raise RuntimeError("no end after 25 minutes")
        time.sleep(rng.uniform(0.5, 4.0))
        if sum(hit.values()) >= most:
            continue
        party = rng.choice(sorted(path.parent for path in parties.glob("*/party.toml")))
        # A SuperNode that died is let in again after a minute: hit seldom, or nothing moves.
        weights = [4.0, 0.25, 3.0, 1.0, 1.0]
        part = rng.choices(list(PROCESSES), weights)[0]
        pids = [pid for pid in processes(party) if _is(pid, PROCESSES[part])]
        for pid in pids[:1]:
            with _even_if_gone():
                os.kill(pid, signal.SIGKILL)
                hit[part] += 1
    return hit


@contextmanager
def _even_if_gone() -> Iterator[None]:
    """Let pass that a process has ended by itself."""
    try:
        yield
    except ProcessLookupError:
        return


def _is(pid: int, text: str) -> bool:
    try:
        return text.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _against_local(parties: Path, config: Mapping[str, Any], place: Path) -> Iterator[str]:
    """Yield what a deployment holds that the local engine does not, or otherwise."""
    from hansa.bundle import read_bundle
    from hansa.config import load
    from hansa.federation.engines.plan import EngineOptions
    from hansa.federation.federation import Federation
    from hansa.federation.store import DiskStore
    from hansa.federation.tree import Tree
    from hansa.runs import Run
    from hansa.training import prepare

    run = Run(parties / "root" / "runs" / "killed-seed0")
    trial = prepare(load(dict(config)))
    above = [above for above, members in TREE.items() for _ in members]
    tree = Tree({f"client-{k}": name for k, name in enumerate(above)} | dict.fromkeys(TREE, "root"))
    federation = Federation(
        trial.model,
        trial.data.clients,
        trial.config.method,
        trial.config.training,
        tree=tree,
        engine=EngineOptions(kind="sequential", workers=1),
    )
    rounds = trial.config.rounds
    federation.run(rounds, score_every=0)
    mine = read_bundle(run.path / "bundle").weights
    theirs = federation.model_of("root").state_dict()
    if any(not mine[name].equal(theirs[name]) for name in theirs):
        yield "the root's model"
    ledger = run.history.table("ledger").to_pylist()
    if odd := sorted({row["fate"] for row in ledger} - {"ok"}):
        yield f"rounds with a child {', '.join(odd)}"
    number = str(run.checkpoint["run"])
    for k in range(len(above)):
        path = f"root/{above[k]}/client-{k}"
        held = DiskStore(parties / f"client-{k}" / "state" / number / "states", rounds)
        found, expected = held.get(path).groups, federation.state_of(f"client-{k}").groups
        if _digests(found) != _digests(expected):
            yield f"the state of {path}"


def _digests(groups: Mapping[str, Any]) -> dict[str, str]:
    from hansa.bundle import digest

    return {group: digest(tensors) for group, tensors in groups.items()}


def free_ports(num: int) -> int:
    """Return the first of some free ports in a row; what is started later binds others above."""
    for start in range(14000, 30000, 100):
        try:
            for base in (0, 1000, 1500, 2000):
                for k in range(num):
                    with socket.socket() as probe:
                        probe.bind(("127.0.0.1", start + base + k))
        except OSError:
            continue
        return start
    raise RuntimeError("no free ports")


PARTS = {"local": (local, 30, 200), "deployed": (deployed, 8, 40), "pipelines": (pipelines, 1, 2)}
"""What is killed, and how often, quickly and in full."""


def main() -> None:
    """Kill, go on, compare; print what was lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer kills")
    parser.add_argument("--only", choices=list(PARTS))
    told = "in a part, or of a pipeline in each stage; 200, 40 and 2 by default"
    parser.add_argument("--kills", type=int, help=told)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    found = {}
    for name, (part, quick, default) in PARTS.items():
        if options.only in (None, name):
            kills = options.kills or (quick if options.quick else default)
            found[name] = part(kills, random.Random(options.seed))  # noqa: S311 no secret
            print(f"{name}: {json.dumps(found[name])}")
    kills = sum(part["kills"] for part in found.values())
    lost = [text for part in found.values() for text in part["lost"]]
    if options.json:
        print(json.dumps({"kills": kills, "lost": len(lost)}))
    else:
        print(f"{kills} kills, {len(lost)} runs that differ from an undisturbed one")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()

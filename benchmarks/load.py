"""A thousand simulated clients for two hundred rounds, a tenth failing; 32 real SuperNodes.

``simulated``: FedPer, whose clients keep states, on 1,000 clients of the digits model, all asked in
every round; a tenth fail. Peak resident memory is noted after round 10 and after the last.
``nodes``: a deployment of 32 clients on the loopback, each with a SuperNode and a worker of its
own, for three rounds, compared with the local engine bit for bit.

    python benchmarks/load.py [--quick] [--only simulated|nodes] [--json]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from faults import free_ports
from scaling import made

CLIENTS, ROUNDS, FAILING, EARLY = 1000, 200, 0.1, 10


def simulated(quick: bool) -> dict[str, Any]:
    """Return memory and fates of a long run, from a process of its own."""
    command = [sys.executable, __file__, "--one", str(40 if quick else ROUNDS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(rounds: int) -> None:
    """Run and print the figures as JSON."""
    from hansa import Federation, Participation, Training
    from hansa.federation.engines.plan import EngineOptions
    from hansa.federation.methods import FedPer
    from hansa.federation.store import DiskStore

    federation = Federation(
        *made(CLIENTS),
        FedPer(),
        Training(lr=0.05, batch_size=10),
        participation=Participation(failure_rate=FAILING),
        # In one process: resident memory of workers that are alive is not the parent's to know.
        engine=EngineOptions(workers=1),
    )
    fates: Counter[str] = Counter()
    peak: dict[int, float] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        federation.keep_states_in(DiskStore(Path(folder), cache_bytes=1 << 26))
        for result in federation.rounds(rounds, score_every=0):
            fates.update(visit.fate for visit in result.visits)
            if result.number in (EARLY, rounds):
                peak[result.number] = _peak_mb()
    seconds = time.perf_counter() - began
    told = {"peak_rss": peak, "fates": fates, "rounds": rounds, "seconds": round(seconds, 1)}
    print(json.dumps(told))


def _peak_mb() -> float:
    """Return the most resident memory of this process so far, in MB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def nodes(num: int) -> dict[str, Any]:
    """Run three rounds of a deployment of so many clients, and compare with the local engine."""
    import tomli_w

    from hansa.bundle import read_bundle
    from hansa.deploy.layout import init
    from hansa.deploy.options import read_deployment
    from hansa.deploy.party import told
    from hansa.deploy.trial import down, processes, up
    from hansa.runs import Run
    from hansa.training import train

    config = {
        "name": "load",
        "rounds": 3,
        "score_every": 0,
        "data": {"clients": num, "partition": {"kind": "iid"}},
        "model": {"options": {"hidden": [32]}},
        "training": {"lr": 0.1, "batch_size": 8},
        "method": {"name": "fedavg"},
    }
    deploy = {"port": free_ports(num + 2), "deadline": 1200.0, "wait": 900.0, "look": 1.0}
    with tempfile.TemporaryDirectory() as place:
        path, parties = Path(place) / "federation.toml", Path(place) / "parties"
        path.write_text(tomli_w.dumps({**config, "deploy": deploy}))
        init(read_deployment(path), parties)
        began = time.perf_counter()
        up(parties)
        try:
            most = 0
            while (state := told(parties / "root", "run").get("state")) != "finished":
                if state == "failed" or time.perf_counter() - began > 1800:
                    raise RuntimeError(str(told(parties / "root", "run")))
                folders = [file.parent for file in parties.glob("*/party.toml")]
                most = max(most, sum(len(processes(folder)) for folder in folders))
                time.sleep(2)
            seconds = time.perf_counter() - began
        finally:
            down(parties)
        run = Run(parties / "root" / "runs" / "load-seed0")
        fates = Counter(row["fate"] for row in run.history.table("ledger").to_pylist())
        engine = {"kind": "sequential", "workers": 1}
        local = train({**config, "output": f"{place}/local", "engine": engine})
        mine, theirs = (read_bundle(r.path / "bundle").weights for r in (run, local))
        same = all(mine[name].equal(theirs[name]) for name in theirs)
    return {
        "nodes": num,
        "processes": most,
        "fates": fates,
        "same_bits": same,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Measure both and print them, or with ``--json`` one object."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="40 rounds, 4 nodes")
    parser.add_argument("--only", choices=["simulated", "nodes"])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one)
        return
    found: dict[str, Any] = {}
    if options.only in (None, "simulated"):
        found |= simulated(options.quick)
        print(json.dumps(found))
    if options.only in (None, "nodes"):
        found["nodes"] = nodes(4 if options.quick else 32)
        print(json.dumps(found["nodes"]))
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()

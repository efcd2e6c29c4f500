"""Simulated rounds of federated averaging by Hansa and by others, on the same work, side by side.

Every engine trains the same clients on the same batches in the same order; the test losses at the
end must agree. Each runs in a process of its own, all of them in turn, over and over. Figures are
CPU seconds (of a process and all it started) and wall seconds per round after warm-up, seconds to
the end of the first round from the start of the program, and peak memory.

    python benchmarks/simulation.py [--tasks cnn28-10,cnn8-10] [--repeats 3] [--out DIR] [--json]

pfl-research and Flower are installed into environments of their own, under ``--peers``.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent / "peers"
sys.path.insert(0, str(HERE))

from hansa_engine import cohort_of, order_of  # noqa: E402
from work import CNN  # noqa: E402

CLIENTS, SAMPLES, BATCH, LR, SEED = 100, 60, 10, 0.05, 7
SHAPES = {"cnn28": (28, (16, 32), 64), "cnn8": (8, (32, 64), 160)}
ROUNDS = {10: 15, 100: 6}
PINS = {
    "pfl": ["pfl[pytorch]==0.6.0", "torch==2.13.0"],
    "flower": ["flwr[simulation]==1.41.0", "torch==2.13.0"],
}
# Label -> (environment, program, arguments).
ENGINES: dict[str, tuple[str, str, list[str]]] = {
    "loop": ("", "plain_loop.py", []),
    "pfllib": ("", "object_loop.py", []),
    "pfl": ("pfl", "pfl_research.py", []),
    "pfl, default threads": ("pfl", "pfl_research.py", ["0"]),
    "flower": ("flower", "flower_simulation.py", []),
    "hansa sequential": ("", "hansa_engine.py", ["sequential"]),
    "hansa stacked": ("", "hansa_engine.py", ["stacked"]),
    "hansa auto": ("", "hansa_engine.py", ["auto"]),
    "hansa compiled": ("", "hansa_engine.py", ["compiled"]),
    "hansa auto, 2 processes": ("", "hansa_engine.py", ["auto", "2"]),
}
SMALL = ("loop", "pfl", "hansa sequential", "hansa compiled", "hansa auto")


def write_work(path: Path, task: str, cohort: int) -> None:
    """Write a work file: images of noisy class patterns, two frequent classes at each client."""
    side, channels, hidden = SHAPES[task]
    rng = np.random.default_rng([SEED, side])
    patterns = rng.normal(0, 0.5, (10, 1, side, side))
    shares = np.full((CLIENTS, 10), 0.02)
    for row in shares:
        row[rng.choice(10, 2, replace=False)] += 0.4
    labels = np.stack([rng.choice(10, SAMPLES, p=row) for row in shares])
    test = rng.integers(0, 10, 1000)
    torch.manual_seed(SEED)
    model = CNN(side, (channels[0], channels[1]), hidden)
    rounds = ROUNDS[cohort]
    cohorts = [cohort_of(CLIENTS, cohort, number) for number in range(1, rounds + 1)]
    orders = [
        [order_of(client, number, SAMPLES) for client in asked]
        for number, asked in enumerate(cohorts, 1)
    ]
    facts = {"lr": LR, "batch": BATCH, "side": side, "channels": channels, "hidden": hidden}

    def drawn(classes: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        noise = rng.normal(0, 1, (*classes.shape, 1, side, side))
        return np.asarray(patterns[classes] + noise, dtype=np.float32)

    np.savez(
        path,
        images=drawn(labels),
        labels=labels,
        test_images=drawn(test),
        test_labels=test,
        cohorts=np.array(cohorts),
        orders=np.array(orders, dtype=np.int16),
        facts=json.dumps(facts),
        **{f"initial/{name}": p.numpy() for name, p in model.state_dict().items()},
    )


def flops(task: str, cohort: int) -> float:
    """Return the floating-point operations of a round: forward, and gradients by both factors."""
    side, (one, two), hidden = SHAPES[task]
    first = 2 * side**2 * one * 9
    second = 2 * (side // 2) ** 2 * two * one * 9
    dense = 2 * two * (side // 4) ** 2 * hidden + 2 * hidden * 10
    # The first layer's inputs need no gradient.
    return float((2 * first + 3 * (second + dense)) * SAMPLES * cohort)


def peaks(task: str) -> dict[str, float]:
    """Return what one thread reaches here, in GFLOP/s: a large product, the main convolution."""
    torch.set_num_threads(1)
    square = torch.randn(1024, 1024)
    side, (one, two), _ = SHAPES[task]
    maps = torch.randn(BATCH, one, side // 2, side // 2, requires_grad=True)
    weight = torch.randn(two, one, 3, 3, requires_grad=True)

    def convolution() -> None:
        out = F.conv2d(maps, weight, padding=1)
        torch.autograd.grad(out, (maps, weight), out.detach())

    products = 3 * 2 * BATCH * (side // 2) ** 2 * two * one * 9
    tried = {"matmul": (lambda: square @ square, 2 * 1024**3), "conv": (convolution, products)}
    found = {}
    for name, (call, operations) in tried.items():
        rates = []
        for _ in range(20):
            start = time.process_time()
            for _ in range(20):
                call()
            rates.append(20 * operations / (time.process_time() - start) / 1e9)
        found[name] = max(rates)
    return found


def environment(name: str, folder: Path) -> str:
    """Return the interpreter of a peer, which is installed first where it is not there yet."""
    if not name:
        return sys.executable
    python = folder / name / "bin" / "python"
    if not (folder / f"{name}.ready").exists():
        print(f"installing {' '.join(PINS[name])} into {folder / name}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PINS[name]], check=True)
        (folder / f"{name}.ready").touch()
    return str(python)


def measure(label: str, work: Path, peers: Path, timeout: int) -> dict[str, Any] | None:
    """Return what one engine reports, None where it does not finish."""
    name, program, arguments = ENGINES[label]
    command = [environment(name, peers), str(HERE / program), str(work), *arguments]
    surroundings = {**os.environ, "PYTHONPATH": str(HERE)}
    if label != "pfl, default threads":
        surroundings["OMP_NUM_THREADS"] = "1"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=surroundings
        )
    except subprocess.TimeoutExpired:
        print(f"{label}: no end after {timeout} s", file=sys.stderr)
        return None
    rows = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not rows:
        print(f"{label}: {done.stderr[-800:]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(rows[-1])
    return found


def compare(
    task: str, cohort: int, engines: list[str], repeats: int, out: Path, peers: Path
) -> dict[str, dict[str, Any]]:
    """Return medians for every engine on one task, measured in turn.

    Raises:
        SystemExit: losses differ, so that the work was not the same.
    """
    work = out / f"{task}-{cohort}.npz"
    write_work(work, task, cohort)
    rows: dict[str, list[dict[str, Any]]] = {label: [] for label in engines}
    for repeat in range(repeats):
        for label in engines:
            if (found := measure(label, work, peers, 900)) is not None:
                rows[label].append(found)
                print(f"{task}-{cohort} #{repeat} {label}: {found}", file=sys.stderr, flush=True)
    result: dict[str, dict[str, Any]] = {}
    for label, measured in rows.items():
        if measured:
            keys = ("cpu", "wall", "first", "peak_mb", "loss")
            result[label] = {key: median(row[key] for row in measured) for key in keys}
            # The first run of all has nothing in its cache.
            result[label]["first_cold"] = measured[0]["first"]
            result[label]["engine"] = measured[-1].get("engine", "")
    losses = [row["loss"] for row in result.values()]
    if max(losses) - min(losses) > 5e-3 * min(losses):  # rounding, over all rounds
        raise SystemExit(f"{task}-{cohort}: losses differ: {losses}")
    return result


def table(title: str, rows: dict[str, dict[str, Any]]) -> str:
    """Return one task's figures in Markdown."""
    base = rows["loop"]["cpu"]
    lines = [
        f"### {title}",
        "",
        "| engine | CPU s/round | of the loop | wall s/round | first round s | first ever s "
        "| peak MB | how |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, row in rows.items():
        lines.append(
            f"| {label} | {row['cpu']:.3f} | {row['cpu'] / base:.2f} | {row['wall']:.3f} "
            f"| {row['first']:.1f} | {row['first_cold']:.1f} | {row['peak_mb']:.0f} "
            f"| {row['engine']} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Draw CPU seconds per round of every engine, in shares of the plain loop's."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "hansa"
    figure = Figure(figsize=(8, 1.2 + 2.6 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for axis, (title, rows) in zip(axes, results.items(), strict=True):
        base = rows["loop"]["cpu"]
        labels = list(rows)[::-1]
        shares = [rows[label]["cpu"] / base for label in labels]
        colors = ["#0b6e6e" if label.startswith("hansa") else "#b0b7bd" for label in labels]
        bars = axis.barh(labels, shares, color=colors)
        axis.bar_label(bars, [f"{share:.2f}" for share in shares], padding=3)
        axis.set(title=title, xlabel="CPU seconds a round, plain loop = 1")
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run the comparison and print tables, or with ``--json`` one object."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", default="cnn28-10,cnn8-10,cnn28-100,cnn8-100")
    parser.add_argument("--engines", default=",".join(ENGINES).replace(", ", "; "))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one task, a few engines, once")
    parser.add_argument("--out", type=Path, default=Path("runs/simulation"))
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache/hansa/peers")
    parser.add_argument("--plot", type=Path, help="write the plot there as SVG")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    tasks = ["cnn28-10"] if options.quick else options.tasks.split(",")
    engines = [label.replace("; ", ", ") for label in options.engines.split(",")]
    if options.quick:
        engines = list(SMALL)
    if odd := sorted({*engines} - ENGINES.keys()):
        raise SystemExit(f"--engines: {odd[0]!r}; allowed: {', '.join(ENGINES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    options.peers.mkdir(parents=True, exist_ok=True)
    # What was chosen and compiled before is not to be found: the first run shows its cost.
    os.environ["HANSA_CACHE"] = str(options.out / f"cache-{os.getpid()}")
    results, reached = {}, {}
    for name in tasks:
        task, _, cohort = name.partition("-")
        repeats = 1 if options.quick else options.repeats
        rows = compare(task, int(cohort), engines, repeats, options.out, options.peers)
        results[name] = rows
        best = peaks(task)
        rate = flops(task, int(cohort)) / rows["hansa auto"]["cpu"] / 1e9
        reached[name] = {"gflops": rate, **{f"of_{k}": rate / v for k, v in best.items()}}
        print(table(name, rows))
        print(
            f"\nhansa auto: {rate:.0f} GFLOP/s, "
            + ", ".join(f"{rate / v:.0%} of {k} ({v:.0f} GFLOP/s)" for k, v in best.items()),
            flush=True,
        )
    if options.plot:
        plot(results, options.plot)
    if options.json:
        print(json.dumps({**ratios(results), "peak": reached, "tasks": results}))


def ratios(results: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Return what Hansa takes in shares of what others take, on the main task."""
    rows = results.get("cnn28-10", {})
    peers: list[str] = [peer for peer in ("pfl", "flower", "loop", "pfllib") if peer in rows]
    found: dict[str, dict[str, float]] = {
        "cpu_ratio": {p: rows["hansa auto"]["cpu"] / rows[p]["cpu"] for p in peers}
    }
    both = "hansa auto, 2 processes"
    if both in rows:
        walls = {"pfl": "pfl, default threads", "flower": "flower"}
        found["wall_ratio"] = {
            name: rows[both]["wall"] / rows[peer]["wall"]
            for name, peer in walls.items()
            if peer in rows
        }
    return found


if __name__ == "__main__":
    main()

"""Speed of the sequential engine beside a plain PyTorch loop, on the same federated rounds.

Both train the same clients on the same batches in the same order, in processes of their own, taken
in turn; the losses at the end must agree. CPU seconds per round after a warm-up round.

    python benchmarks/engine.py [--quick] [--json]
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median

import torch
import torch.nn.functional as F

from hansa import FedAvg, Federation, Participation, Training
from hansa.data.clients import Client
from hansa.federation.tree import ROOT
from hansa.models import Architecture, build
from hansa.seeding import generator

TASKS = {
    "mlp-8x8": ("mlp", (1, 8, 8)),
    "cnn-8x8": ("cnn", (1, 8, 8)),
    "cnn-28x28": ("cnn", (1, 28, 28)),
}
CLIENTS, COHORT, SAMPLES, BATCH, LR, SEED = 100, 10, 50, 10, 0.05, 0


def work(task: str) -> tuple[torch.nn.Module, dict[str, Client]]:
    """Return a model and clients with random images, so that nothing has to be loaded."""
    name, shape = TASKS[task]
    model = build(Architecture(name=name, shape=shape, classes=10), SEED)
    stream = generator(SEED, "benchmark")
    truth = torch.randn(10, torch.Size(shape).numel(), generator=stream)
    clients = {}
    for k in range(CLIENTS):
        images = torch.randn(SAMPLES, *shape, generator=stream)
        labels = (images.flatten(1) @ truth.T).argmax(1)
        clients[f"client-{k:02}"] = Client.of((images, labels), test=(images[:1], labels[:1]))
    return model, clients


def hansa_rounds(task: str, rounds: int) -> Iterator[torch.nn.Module]:
    """Train by Hansa, yielding the common model's owner after each round."""
    model, clients = work(task)
    federation = Federation(
        model,
        clients,
        FedAvg(),
        Training(lr=LR, batch_size=BATCH),
        seed=SEED,
        participation=Participation(fraction=COHORT / CLIENTS),
    )
    for _ in federation.rounds(rounds + 2, score_every=0):
        yield federation.model_of(ROOT)


def plain_rounds(task: str, rounds: int) -> Iterator[torch.nn.Module]:
    """Train by the textbook loop: a module, an optimizer, one client after the other."""
    model, clients = work(task)
    torch.set_num_threads(1)
    chosen_by = Participation(fraction=COHORT / CLIENTS)
    paths = [f"{ROOT}/{name}" for name in sorted(clients)]
    common = {name: p.detach().clone() for name, p in model.state_dict().items()}
    for number in range(1, rounds + 3):
        total = {name: torch.zeros_like(p) for name, p in common.items()}
        for path in chosen_by.choose(paths, SEED, ROOT, number):
            model.load_state_dict(common)
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            images, labels = clients[path.rpartition("/")[2]].batch("train")
            order = torch.randperm(SAMPLES, generator=generator(SEED, path, number, 0))
            for batch in order.split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            for name, tensor in model.state_dict().items():
                total[name] += tensor / COHORT
        common = total
        model.load_state_dict(common)
        yield model


ENGINES = {"hansa": hansa_rounds, "loop": plain_rounds}


def one(engine: str, task: str, rounds: int) -> None:
    """Print CPU seconds per round, and the loss at the end over all clients, as JSON."""
    marks, models = [], []
    for model in ENGINES[engine](task, rounds):
        marks.append(time.process_time())
        models.append(model)
    clients = work(task)[1].values()
    with torch.no_grad():
        parts = [(models[-1](x), y) for x, y in (client.batch("train") for client in clients)]
        loss = sum(float(F.cross_entropy(logits, labels)) for logits, labels in parts) / CLIENTS
    # The first round warms up; Hansa's last one also scores.
    print(json.dumps({"seconds": (marks[rounds] - marks[0]) / rounds, "loss": loss}))


def main() -> None:
    """Run the comparison and print a table, or with ``--json`` one object."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and repeats")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one[0], options.one[1], int(options.one[2]))
        return
    rounds, repeats = (10, 3) if options.quick else (30, 5)
    result: dict[str, dict[str, float]] = {}
    for task in TASKS:
        seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
        losses: dict[str, float] = {}
        for _ in range(repeats):
            for engine in ENGINES:
                command = [sys.executable, __file__, "--one", engine, task, str(rounds)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                measured = json.loads(done.stdout)
                seconds[engine].append(measured["seconds"])
                losses[engine] = measured["loss"]
        if abs(losses["hansa"] - losses["loop"]) > 1e-3 * losses["loop"]:
            raise SystemExit(f"{task}: the losses differ: {losses}")
        ours, theirs = median(seconds["hansa"]), median(seconds["loop"])
        result[task] = {"hansa": ours, "loop": theirs, "ratio": ours / theirs}
        print(f"{task}: hansa {ours:.4f}, loop {theirs:.4f} CPU s/round, ratio {ours / theirs:.2f}")
    if options.json:
        print(json.dumps({"cpu_seconds_per_round": result}))


if __name__ == "__main__":
    main()

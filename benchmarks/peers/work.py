"""The rounds that every simulator does: read from one file, so that all do the same work.

Runs in any environment with NumPy and PyTorch; Hansa is not needed. The file holds the clients'
data [clients, samples, 1, side, side], who is asked in each round, the order of every client's
samples in every round, initial weights, and test data.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

STARTED = time.perf_counter()
WARM_UP = 3
"""Rounds that are left out of the figures."""


class CNN(nn.Module):
    """Two 3x3 convolutions, each with ReLU and 2x2 max-pooling, one hidden layer, a head."""

    def __init__(self, side: int, channels: tuple[int, int], hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels[0], 3, padding=1)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 3, padding=1)
        self.hidden = nn.Linear(channels[1] * (side // 4) ** 2, hidden)
        self.head = nn.Linear(hidden, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, 10]."""
        maps = F.max_pool2d(F.relu(self.conv1(inputs)), 2)
        maps = F.max_pool2d(F.relu(self.conv2(maps)), 2)
        logits: torch.Tensor = self.head(F.relu(self.hidden(maps.flatten(1))))
        return logits


class Work:
    """The content of a work file."""

    def __init__(self, path: str | Path) -> None:
        held = np.load(path, allow_pickle=False)
        self.path = str(path)
        self.images = torch.from_numpy(held["images"])
        self.labels = torch.from_numpy(held["labels"])
        self.cohorts: list[list[int]] = held["cohorts"].tolist()
        self._orders = held["orders"]
        self.test = torch.from_numpy(held["test_images"]), torch.from_numpy(held["test_labels"])
        facts = json.loads(str(held["facts"]))
        self.lr, self.batch = float(facts["lr"]), int(facts["batch"])
        self._shape = int(facts["side"]), tuple(facts["channels"]), int(facts["hidden"])
        names = list(self.model(initial=False).state_dict())
        self.initial = {name: torch.from_numpy(held[f"initial/{name}"]) for name in names}

    @property
    def rounds(self) -> int:
        """The number of rounds."""
        return len(self.cohorts)

    def order(self, round_: int, client: int) -> torch.Tensor:
        """Return the order of a client's samples in a round, both counted from 0."""
        place = self.cohorts[round_].index(client)
        return torch.from_numpy(self._orders[round_, place].astype(np.int64))

    def model(self, initial: bool = True) -> CNN:
        """Return the model, with its initial weights."""
        side, channels, hidden = self._shape
        model = CNN(side, (channels[0], channels[1]), hidden)
        if initial:
            model.load_state_dict(self.initial)
        return model

    def loss(self, state: dict[str, Any]) -> float:
        """Return the test loss of some weights."""
        model = self.model(initial=False)
        model.load_state_dict({name: torch.as_tensor(state[name]) for name in self.initial})
        with torch.no_grad():
            return float(F.cross_entropy(model(self.test[0]), self.test[1]))


class Clock:
    """CPU and wall seconds at the end of every round, of this process and those it started."""

    def __init__(self) -> None:
        self.cpu, self.wall, self.first = [tree_cpu()], [time.perf_counter()], 0.0

    def tick(self) -> None:
        """Mark the end of a round."""
        self.cpu.append(tree_cpu())
        self.wall.append(time.perf_counter())
        self.first = self.first or time.perf_counter() - STARTED

    def report(self, loss: float, skip: int = WARM_UP, **facts: object) -> None:
        """Print what was measured as one line of JSON."""
        cpu, wall = np.diff(self.cpu[skip:]), np.diff(self.wall[skip:])
        row = {
            "cpu": float(np.mean(cpu)),
            "wall": float(np.median(wall)),
            "first": self.first,
            "peak_mb": tree_memory() / 2**20,
            "loss": loss,
            **facts,
        }
        print("RESULT " + json.dumps(row), flush=True)


def _tree() -> list[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found


def tree_cpu() -> float:
    """Return CPU seconds of this process and all below it, those that ended and were waited for."""
    ticks = 0
    for pid in _tree():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(int(field) for field in fields[11:15])
    return float(ticks / os.sysconf("SC_CLK_TCK"))


def tree_memory() -> int:
    """Return the sum of the peaks of memory of this process and all below it, in bytes."""
    total = 0
    for pid in _tree():
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        peak = next((line for line in status.splitlines() if line.startswith("VmHWM")), "x 0")
        total += int(peak.split()[1]) * 1024
    return total


def main(run: Callable[[Work, Clock], dict[str, Any]]) -> None:
    """Run ``python PEER.py WORK [THREADS]``: ``run`` does all rounds and returns the weights."""
    threads = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    if threads:
        torch.set_num_threads(threads)
    work = Work(sys.argv[1])
    clock = Clock()
    state = run(work, clock)
    clock.report(work.loss(state))

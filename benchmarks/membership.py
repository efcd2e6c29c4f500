"""Membership inference with and without differential privacy: the attack by a threshold on losses.

Handwritten digits at 20 clients of 10 training samples each, and 20 or so held out; federated
averaging for a hundred epochs, so that the model fits its training data better than others. The
same with noise by every client on each gradient (one sample is hidden), and with noise by the root
on the sum of updates (one client is hidden), two amounts each, 3 seeds.

    python benchmarks/membership.py [--quick] [--json]

The first row is what losses drawn at random would give, over 500 draws: the best threshold is
chosen on the samples that it is measured on. Advantage is the true-positive rate less the
false-positive rate of the common model's last state, at that threshold and at Yeom's (the mean
training loss). Epsilon is the most that a client has spent. With samples hidden, no attack's
advantage on one sample can be above the bound.
"""

import argparse
import json
import statistics
import tempfile
from typing import Any

import torch

import hansa
from hansa.config import load
from hansa.federation.tree import ROOT
from hansa.report.membership import advantage_bound, attack, membership
from hansa.training import prepare

DELTA = 1e-3
"""Below one over the 10 samples of a client, and over the 20 clients."""
ROWS: dict[str, dict[str, Any] | None] = {
    "no privacy": None,
    "each client, gradients, sigma = 2": {"unit": "gradient", "clip": 1.0, "noise": 2.0},
    "each client, gradients, sigma = 8": {"unit": "gradient", "clip": 1.0, "noise": 8.0},
    "the root, updates, sigma = 0.5": {"where": "central", "clip": 1.0, "noise": 0.5},
    "the root, updates, sigma = 2": {"where": "central", "clip": 1.0, "noise": 2.0},
}
FIGURES = (
    "accuracy",
    "train_accuracy",
    "epsilon",
    "advantage",
    "advantage_fixed",
    "auc",
    "tpr_at_1",
)


def configuration(
    privacy: dict[str, Any] | None, seed: int, output: str, rounds: int
) -> dict[str, Any]:
    """Return one run."""
    return {
        "name": "membership",
        "output": output,
        "seed": seed,
        "rounds": rounds,
        "score_every": 0,
        "compare_up_to": 0,
        "data": {
            "clients": 20,
            "train_per_class": 1,
            "test_per_class": 2,
            "partition": {"kind": "iid"},
        },
        "model": {"options": {"hidden": [32]}},
        "training": {"lr": 0.5, "batch_size": 10, "epochs": 5},
        "engine": {"kind": "sequential", "workers": 1},
        **({"privacy": {**privacy, "delta": DELTA}} if privacy else {}),
    }


def measured(privacy: dict[str, Any] | None, seed: int, rounds: int) -> dict[str, Any]:
    """Train once and attack the common model."""
    with tempfile.TemporaryDirectory() as folder:
        values = configuration(privacy, seed, folder, rounds)
        run = hansa.train(values)
        trial = prepare(load(values))
        trial.federation.keep_states_in(run.store(), run.round)
        model, clients = trial.federation.model_of(ROOT), trial.data.clients.values()
        found = membership(model, clients)
        summary = run.history.summary()
    right = [
        (model.eval()(inputs).argmax(1) == labels).float().mean().item()
        for inputs, labels in (client.batch("train") for client in clients)
    ]
    return {
        "accuracy": summary["metrics"]["accuracy"]["mean"],
        "train_accuracy": statistics.mean(right),
        "epsilon": summary.get("epsilon"),
        "advantage": found.advantage,
        "advantage_fixed": found.advantage_fixed,
        "auc": found.auc,
        "tpr_at_1": found.tpr_at_1,
    }


def main() -> None:
    """Run every row and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    seeds, rounds = (1, 2) if options.quick else (3, 20)
    found: dict[str, dict[str, list[Any]]] = {}
    head = ("noise", "accuracy %", "in training %", "epsilon", "bound", "advantage", "at Yeom's")
    print(f"| {' | '.join((*head, 'AUC', 'TPR at 1 %'))} |\n|{'---|' * 9}")
    cells = ["losses at random", *"----", *_attacked(chance())]
    print(f"| {' | '.join(cells)} |")
    for name, privacy in ROWS.items():
        runs = [measured(privacy, seed, rounds) for seed in range(seeds)]
        found[name] = {figure: [run[figure] for run in runs] for figure in FIGURES}
        print(_row(name, found[name], privacy), flush=True)
    if options.json:
        print(json.dumps(found))


def chance(members: int = 200, others: int = 381, draws: int = 500) -> dict[str, list[float]]:
    """Return the attack's figures on losses that tell nothing."""
    rng = torch.Generator().manual_seed(0)
    each = [
        attack(torch.rand(members, generator=rng), torch.rand(others, generator=rng))
        for _ in range(draws)
    ]
    return {figure: [getattr(one, figure) for one in each] for figure in FIGURES[3:]}


def _row(name: str, found: dict[str, list[Any]], privacy: dict[str, Any] | None) -> str:
    epsilon = None if privacy is None else max(found["epsilon"])
    by_sample = privacy is not None and privacy.get("unit") == "gradient"
    cells = [
        name,
        _spread(found["accuracy"], 100, 1),
        _spread(found["train_accuracy"], 100, 1),
        "-" if epsilon is None else f"{epsilon:.1f}",
        f"{advantage_bound(epsilon, DELTA):.3f}" if by_sample and epsilon is not None else "-",
        *_attacked(found),
    ]
    return f"| {' | '.join(cells)} |"


def _attacked(found: dict[str, list[Any]]) -> list[str]:
    return [_spread(found[figure], 1, 3) for figure in FIGURES[3:]]


def _spread(values: list[float], scale: float, digits: int) -> str:
    mean, std = statistics.mean(values), statistics.pstdev(values)
    return f"{scale * mean:.{digits}f} ± {scale * std:.{digits}f}"


if __name__ == "__main__":
    main()

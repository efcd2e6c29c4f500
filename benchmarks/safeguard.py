"""Safeguards in a world of made-up facts: what comes back under attack, of TAR and of its peers.

A small Llama learns two tables of invented facts; it should keep one and withhold the other. All
models start from the same first phase, Random Mapping. Tables:

recovery    share of restricted answers that come back after so many steps of full fine-tuning,
            the worst of four learning rates, each the mean over attack seeds; the steps to half;
            what is retained before any attack; and what the safeguard has cost
attacks     every other attack of the small grid on four of the models, one seed
cost        seconds of an outer step over those of a plain step, side by side, by the inner steps

    python benchmarks/safeguard.py [--quick] [--json] [--seeds 0,1] [--attack-seeds 0,1,2]
        [--tables a,b] [--processes N] [--output FOLDER]

What is done is kept in FOLDER (by default ``runs/benchmark-safeguard``): the same command goes on
where it was stopped. ``--quick`` trains two models and attacks them with one seed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hansa.models.build import Architecture, build
from hansa.processes import one_thread
from hansa.redteam import redteam
from hansa.safeguard.adversaries import Adversary
from hansa.safeguard.attack_grids import attacks_of, edits_of
from hansa.safeguard.losses import next_token
from hansa.safeguard.phases.tar import TAR
from hansa.safeguard.redteam_options import RedteamOptions
from hansa.safeguard.setup import Setup
from hansa.safeguard.world import World, WorldOptions
from hansa.safeguarding import safeguard

MODEL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
STEPS = (10, 25, 50, 100, 200, 400)
LOW, HIGH = [3e-4, 1e-3], [3e-4, 1e-3, 3e-3]
PRETRAIN = {"kind": "pretrain", "steps": 900}
MAPPING = {"kind": "random_mapping", "steps": 150, "lr": 1e-3, "warm_up": 15}
QUICK = ("same_compute",)


def tar(lrs: Sequence[float] = LOW, **more: Any) -> dict[str, Any]:
    """Return a phase of TAR, at the world's rates."""
    adversaries = [{"weight": 2, "lrs": lrs}, {"data": "switch", "lrs": lrs}]
    return {
        "kind": "tar",
        "steps": 100,
        "lr": 5e-4,
        "warm_up": 5,
        "batch_size": 32,
        "inner_steps": 16,
        "attack_batch_size": 16,
        "adversaries": adversaries,
        **more,
    }


def entropy(steps: int) -> dict[str, Any]:
    """Return TAR's losses without attacks in training."""
    return {"kind": "max_entropy", "steps": steps, "lr": 5e-4, "warm_up": 20}


LORA = [
    {"weight": 1, "lrs": HIGH},
    {"weight": 1, "lrs": [3e-3, 1e-2], "rank": 8},
    {"data": "switch", "lrs": HIGH},
]
CONTROLS: dict[str, dict[str, Any]] = {
    # As many plain steps as TAR with K = 16 takes: 100 x 13.3 of 2.33 each.
    "same_compute": {"after": 2, "phases": [entropy(571)]},
    "never": {"phases": [{**PRETRAIN, "tables": ["retained"]}]},
    "tar_k4": {"after": 2, "phases": [tar(inner_steps=4)]},
    "tar_k16": {"after": 2, "phases": [tar()]},
    "noise_distil": {
        "after": 2,
        "phases": [{"kind": "noise_distil", "noise": 0.4, "steps": 400}],
    },
    "mlac": {
        "after": 2,
        "phases": [tar(HIGH, loss="cross_entropy", weights="last", weight=1.0)],
    },
    "repnoise": {
        "after": 2,
        "phases": [{"kind": "repnoise", "steps": 571, "lr": 5e-4, "warm_up": 20}],
    },
    "tar_lora": {"after": 2, "phases": [tar(adversaries=LORA)]},
    "tar_k16_300": {"after": 2, "phases": [tar(steps=300)]},
}
NAMES = {"before": "phase1", "same_compute": "control", "safeguarded": "tar"}


class Bench:
    """What all tables share."""

    def __init__(
        self,
        quick: bool,
        seeds: Sequence[int],
        attack_seeds: Sequence[int],
        processes: int,
        output: Path,
    ) -> None:
        self.quick, self.seeds, self.attack_seeds = quick, seeds, attack_seeds
        self.processes, self.output = processes, output

    def config(self, seed: int) -> dict[str, Any]:
        """Return the configuration of all models of one training seed."""
        controls = {name: CONTROLS[name] for name in (QUICK if self.quick else CONTROLS)}
        return {
            "name": "facts",
            "output": str(self.output),
            "seed": seed,
            "model": {"options": MODEL},
            "data": {"kind": "world"},
            "phases": [PRETRAIN, MAPPING, tar(HIGH)],
            "controls": controls,
            "redteam": {
                "attacks": [{"name": "full"}],
                "edits": [],
                "seeds": list(self.attack_seeds),
                "processes": self.processes,
            },
        }

    def cards(self) -> list[dict[str, Any]]:
        """Return the scorecard of each training seed, of the models and attacks of all tables."""
        found = []
        for seed in self.seeds:
            with one_thread():
                safeguard(self.config(seed))
            found.append(redteam(self.config(seed)).scorecard)
        return found

    def others(self) -> dict[str, Any]:
        """Return the scorecard of every other attack, on TAR and on the first phase alone."""
        config = self.config(self.seeds[0])
        roles = ["before", "safeguarded"]
        roles += [] if self.quick else ["repnoise", "noise_distil"]
        options = RedteamOptions(grid="small")
        attacks = [
            {**how.model_dump(mode="json", exclude_none=True), "roles": roles}
            for how in attacks_of(options)
            if how.name != "full"
        ]
        edits = [
            {**how.model_dump(mode="json", exclude_none=True), "roles": roles}
            for how in edits_of(options)
        ]
        config["redteam"] |= {"attacks": attacks, "edits": edits, "seeds": [0]}
        folder = self.output / f"facts-seed{self.seeds[0]}-safeguard" / "redteam-others"
        return redteam(config, out=folder).scorecard


def main() -> None:
    """Run what was asked for, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", default=None)
    parser.add_argument("--attack-seeds", default=None)
    parser.add_argument("--tables", default="recovery,attacks,cost")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    quick = given.quick
    output = given.output or Path(f"runs/benchmark-safeguard{'-quick' if quick else ''}")
    bench = Bench(
        quick,
        _numbers(given.seeds or ("0" if quick else "0,1")),
        _numbers(given.attack_seeds or ("0" if quick else "0,1,2")),
        given.processes,
        output,
    )
    tables = given.tables.split(",")
    found: dict[str, Any] = {}
    if "recovery" in tables:
        found |= recovery(bench.cards())
    if "attacks" in tables:
        found["attacks"] = attacks(bench.others())
    if "cost" in tables:
        found["cost_in_steps"] = cost((4, 16, 32), 3 if quick else 7)
    print(json.dumps(found) if given.json else _text(found))


def recovery(cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what comes back of each model: means over training seeds, and each seed's own."""
    found: dict[str, Any] = {"recovery": {}, "retained": {}, "restricted": {}, "half": {}}
    found |= {"training_steps": dict(cards[0]["cost_in_steps"]), "by_seed": {}}
    for role in cards[0]["recovery"]:
        if role == "unprotected":
            continue
        name = NAMES.get(role, role)
        lines = [card["recovery"][role] for card in cards]
        found["recovery"][name] = {
            str(step): statistics.fmean(line[str(step)] for line in lines) for step in STEPS
        }
        found["by_seed"][name] = [{s: line[s] for s in line} for line in lines]
        found["retained"][name] = statistics.fmean(card["retained"][role] for card in cards)
        found["restricted"][name] = statistics.fmean(line["0"] for line in lines)
        found["half"][name] = [card["half"][role] for card in cards]
        found["training_steps"][name] = found["training_steps"].pop(role)
    return found


def attacks(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the most that each attack brings back at any step, of each model.

    An attack that brings nothing back from the first phase alone is none, which is told as well.
    """
    found: dict[str, Any] = {}
    for name, about in card["attacks"].items():
        peaks = {
            NAMES.get(role, role): entry["attacks"][name]["peak"]["recovered"]
            for role, entry in card["roles"].items()
            if name in entry["attacks"] and entry["attacks"][name]["peak"] is not None
        }
        half = {
            NAMES.get(role, role): entry["attacks"][name]["half"]
            for role, entry in card["roles"].items()
            if name in entry["attacks"]
        }
        found[name] = {"status": about["status"], "most": peaks, "half": half}
    return found


@one_thread()
def cost(inner: Sequence[int], turns: int) -> dict[str, dict[str, float]]:
    """Return what an outer step costs over a plain step of 32 rows: as measured, and by formula.

    The median over turns, each of which times all of them one after another.
    """
    world = World(WorldOptions())
    architecture = Architecture(
        name="llama", options=MODEL, shape=(world.context,), classes=world.vocabulary
    )
    module: Any = build(architecture)
    reference: Any = build(architecture)
    setup = Setup(module.model, reference.model.requires_grad_(False), world)
    adversaries = (Adversary(lrs=(1e-3,)),)
    phases = {k: TAR(**{**tar(inner_steps=k), "adversaries": adversaries}) for k in inner}
    advances = {k: phase.begin(setup) for k, phase in phases.items()}
    optimizer = torch.optim.AdamW(setup.params, lr=1e-6)

    def plain(step: int) -> None:
        rows = setup.rows("retain", 32, step)
        next_token(setup.run(rows).logits, rows).backward()

    def timed(work: Any, times: int) -> float:
        start = time.process_time()
        for step in range(times):
            optimizer.zero_grad(set_to_none=True)
            work(step)
            optimizer.step()
        return (time.process_time() - start) / times

    ratios: dict[int, list[float]] = {k: [] for k in inner}
    for turn in range(turns + 1):
        one = timed(plain, 20)
        for k, advance in advances.items():
            ratio = timed(advance, 1) / one
            if turn:  # the first turn warms up
                ratios[k].append(ratio)
    return {
        str(k): {"measured": statistics.median(ratios[k]), "formula": phases[k].step_cost()}
        for k in inner
    }


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _text(found: Mapping[str, Any]) -> str:
    lines = []
    if "recovery" in found:
        columns = ("before", *(str(step) for step in STEPS), "half after", "retained", "steps")
        lines += [_row(("model", *columns)), _row(["---"] * (len(columns) + 1))]
        for name, line in found["recovery"].items():
            halves = ", ".join("never" if h is None else str(h) for h in found["half"][name])
            lines.append(
                _row(
                    (
                        name,
                        f"{found['restricted'][name]:.2f}",
                        *(f"{line[str(step)]:.2f}" for step in STEPS),
                        halves,
                        f"{found['retained'][name]:.3f}",
                        f"{found['training_steps'][name]:,.0f}",
                    )
                )
            )
    if "attacks" in found:
        names = sorted({role for row in found["attacks"].values() for role in row["most"]})
        lines += ["", _row(("attack", "status", *names)), _row(["---"] * (len(names) + 2))]
        for name, row in found["attacks"].items():
            cells = []
            for role in names:
                half = row["half"].get(role)
                after = "never half" if half is None else f"half after {half}"
                most = row["most"].get(role)
                cells.append("-" if most is None else f"{most:.2f}, {after}")
            lines.append(_row((name, row["status"], *cells)))
    if "cost_in_steps" in found:
        lines += ["", _row(("K", "measured", "formula")), _row(["---"] * 3)]
        for k, row in found["cost_in_steps"].items():
            lines.append(_row((k, f"{row['measured']:.1f}", f"{row['formula']:.1f}")))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

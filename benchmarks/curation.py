"""Data quality control: what scores tell apart, what thresholds keep, and what it is worth.

Four clients, each of a domain of its own, hold made-up questions with answers, of which a part is
spoilt in six ways. A small Llama that was trained on public examples of the same language, and
knows none of the facts, scores them; gradients are taken at four checkpoints of ten rounds of
FedAvg over LoRA adapters, on all examples. Tables:

separation  AUROC of clean against spoilt examples, by kind, half of each client's spoilt; and
            within clients where 80, 20, 10 and 50 % are
thresholds  precision, recall and F1 of the rules by every score, evenly and unevenly spoilt, and
            what is kept where nothing is
training    test loss after training on all, filtered and clean examples, unevenly spoilt
cost        seconds per example of each score, over those of one forward pass, side by side
real        separation and thresholds on sentences of real texts, with ``--data``: a question is a
            sentence, its answer the next one; half of each client's are spoilt

    python benchmarks/curation.py [--quick] [--json] [--seeds 0,1,2] [--data FOLDER]
        [--tables a,b] [--output FOLDER]

What is done is kept in FOLDER (by default ``runs/benchmark-curation``): the same command goes on
where it was stopped.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

import hansa
from hansa.config import load
from hansa.curation.federated import Cohort
from hansa.curation.findings import Holder, compared, separation
from hansa.curation.protocol import points_from
from hansa.curation.scores import SCORES, Sample, measure
from hansa.data.examples import Example, read_examples, write_jsonl
from hansa.federation.store import DiskStore
from hansa.federation.wire import decode
from hansa.seeding import numpy_generator
from hansa.training import cohort_of, completed, prepare

CLIENTS = ("disease", "drug", "lab", "policy")
UNEVEN = (0.8, 0.2, 0.1, 0.5)
SPOILT: dict[str, Any] = {"even": 0.5, "uneven": list(UNEVEN), "clean": 0.0}
RULES = ("quantile of anchors, 0.1", "mean of 10 anchors", "same share of each client")
SHORT = ("quantile", "anchor mean", "same share")
REAL = {
    "articles": "biomedical-articles",
    "manual": "manual-en",
    "plays": "shakespeare",
    "wikipedia": "wikipedia-valid",
}
DEFAULT = "ifd"
Texts = Mapping[str, str]


class Bench:
    """What all tables share: sizes, seeds, and where things are kept."""

    def __init__(self, quick: bool, seeds: Sequence[int], output: Path, data: str | None) -> None:
        self.quick, self.seeds, self.output, self.data = quick, seeds, output, data
        self.rounds = 4 if quick else 10
        self.num = 80 if quick else 250
        self.anchors = 80 if quick else 160
        self.cases = ("even", "uneven") if quick else tuple(SPOILT)
        self.warm_up = {"rounds": 4, "keep": [2, 4]} if quick else WARM_UP

    def base(self, seed: int, real: bool = False) -> str:
        """Return the bundle of the public model, trained unless it is there."""
        kind = "real" if real else "made"
        root, public = self._public(seed, real)
        config = {
            "name": f"base-{kind}",
            "output": str(self.output),
            "seed": seed,
            "rounds": self.rounds,
            "score_every": 0,
            "compare_up_to": 0,
            "text": {
                "tokenizer": "bpe",
                "vocabulary": 768 if real else 384,
                "context": 144 if real else 72,
                "validation": 0.0,
                "test": 0.05,
                "answers": {},
            },
            "nodes": {"root": {"text": root}, "public": {"text": public}},
            "model": {"name": "llama", "options": SMALL},
            "training": {
                "optimizer": "adamw",
                "lr": 0.004,
                "lr_end": 0.0004,
                "lr_rounds": self.rounds,
                "batch_size": 32,
                "steps": 50,
            },
            "method": {"name": "centralised"},
        }
        return str(completed(load(config)) / "bundle")

    def config(self, seed: int, spoilt: str, real: bool = False) -> dict[str, Any]:
        """Return the configuration of a curation with all scores."""
        source = self._real(seed) if real else self._made(seed)
        return {
            "name": f"{'real' if real else 'made'}-{spoilt}",
            "output": str(self.output),
            "seed": seed,
            "rounds": 4 if self.quick else 20,
            "score_every": 0,
            "compare_up_to": 0,
            "text": {
                "tokenizer": "bundle",
                "context": 144 if real else 72,
                "validation": 0.0,
                "test": 0.2,
                "answers": {"corruption": {"shares": SPOILT[spoilt]}},
            },
            "nodes": {name: {"text": source[name]} for name in source if name not in PUBLIC},
            "model": {
                "name": "llama",
                "options": {**SMALL, "lora": {"r": 8}},
                "bundle": self.base(seed, real),
            },
            "training": {
                "optimizer": "adamw",
                "lr": 0.01,
                "lr_end": 0.001,
                "lr_rounds": 20,
                "batch_size": 16,
                "steps": 12,
            },
            "method": {"name": "fedavg"},
            "curation": {
                "scores": [DEFAULT, *(name for name in SCORES if name != DEFAULT)],
                "anchors": source["anchors"],
                "validation": source["validation"],
                "warm_up": self.warm_up,
                "guard": {"action": "warn"},
            },
        }

    def scored(
        self, seed: int, spoilt: str, real: bool = False
    ) -> tuple[Cohort, dict[str, Holder], dict[str, torch.Tensor]]:
        """Return who took part, what clients hold, and the anchors' scores."""
        config = self.config(seed, spoilt, real)
        made = hansa.curate(config, until="score")
        cohort = cohort_of(prepare(load(config)))
        anchors = dict(decode((made.path / "scores.msg").read_bytes()).group("anchors"))
        holders = {}
        for name, scores, _ in cohort.held(DiskStore(made.path / "states", 1, reads_only=True)):
            examples = cohort.data.examples[name]
            kinds = tuple(example.kind for example in examples)
            holders[name] = Holder(scores, kinds, cohort.public.numbers(examples))
        return cohort, holders, anchors

    def _public(self, seed: int, real: bool) -> tuple[str, str]:
        if real:
            source = self._real(seed)
            return source["root"], source["public"]
        num = 1000 if self.quick else 4000
        return tuple(f"made:all?num={num}&seed={100 * seed + k}&style=public" for k in (1, 2))  # type: ignore[return-value]

    def _made(self, seed: int) -> Texts:
        clients = {d: f"made:{d}?num={self.num}&seed={100 * seed + 3}" for d in CLIENTS}
        anchors = f"made:all?num={self.anchors}&seed={100 * seed + 4}"
        return clients | {
            "anchors": anchors,
            "validation": f"made:all?num=40&seed={100 * seed + 5}",
        }

    def _real(self, seed: int) -> Texts:
        """Deal the pairs of sentences of every text to the public and to its client."""
        folder = self.output / f"real-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        parts: dict[str, list[Example]] = {name: [] for name in PUBLIC}
        sources = {name: f"jsonl:{folder}/{name}.jsonl" for name in (*PUBLIC, *REAL)}
        if all((folder / f"{name}.jsonl").exists() for name in sources):
            return sources
        for name, file in REAL.items():
            path = Path(self.data or ".") / f"{file}.txt"
            read = self._sentences(path, seed, name)
            held = [e for e in read if len(e.question) + len(e.answer) <= SHORT_ENOUGH]
            rng = numpy_generator(seed, name, "without a question")
            for k, example in enumerate(held):
                held[k] = replace(example, id=f"{name}-{example.id}")
            cuts = np.cumsum([self.num, self.anchors // 4, 10])
            own, anchors, validation, public = (
                part.tolist() for part in np.split(np.arange(len(held)), cuts)
            )
            write_jsonl(folder / f"{name}.jsonl", [held[k] for k in own], None)
            parts["anchors"] += [held[k] for k in anchors]
            parts["validation"] += [held[k] for k in validation]
            for k in public:
                bare = rng.random() < 0.2  # so that an answer alone is nothing new to the model
                example = replace(held[k], question="") if bare else held[k]
                parts["root" if k % 2 else "public"].append(example)
        for name, examples in parts.items():
            write_jsonl(folder / f"{name}.jsonl", examples, None)
        return sources

    def _sentences(self, path: Path, seed: int, name: str) -> list[Example]:
        """Return as many pairs of a text as it has, up to 1500."""
        for num in (1500, 1000, 700, 500):
            try:
                source = f"sentences:{path}?num={num}&seed={seed}&domain={name}"
                return read_examples(source, "--data")
            except hansa.InputError as error:
                if num == 500 or "pairs" not in str(error.found):
                    raise
        raise AssertionError


SHORT_ENOUGH = 200
"""Characters of a pair of sentences that the context surely takes."""
WARM_UP = {"rounds": 10, "keep": [2, 5, 8, 10]}
SMALL = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2}
PUBLIC = ("root", "public", "anchors", "validation")


def separations(bench: Bench, real: bool = False) -> dict[str, Any]:
    """Return score -> kind -> AUROC in each seed."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in SCORES}
    for seed in bench.seeds:
        for name, row in separation(bench.scored(seed, "even", real)[1]).items():
            for kind, value in row.items():
                found[name].setdefault(kind, []).append(value)
    if not real:
        for seed in bench.seeds:
            for name, row in separation(bench.scored(seed, "uneven")[1]).items():
                for kind in ("all", "within"):
                    found[name].setdefault(f"uneven, {kind}", []).append(row[kind])
    return found


def thresholds(bench: Bench, cases: Sequence[str], real: bool = False) -> dict[str, Any]:
    """Return case -> score -> rule -> measure -> values in each seed."""
    found: dict[str, Any] = {}
    for case in cases:
        for seed in bench.seeds:
            cohort, holders, anchors = bench.scored(seed, case, real)
            for name in SCORES:
                options = cohort.options.model_copy(update={"by": (name,)})
                own = replace(cohort, options=options)
                rules = compared(own, holders, anchors, own.threshold(anchors))
                for rule, short in [*zip(RULES, SHORT, strict=True), ("everything", "everything")]:
                    into = found.setdefault(case, {}).setdefault(name, {}).setdefault(short, {})
                    row = rules[rule]
                    worst = min(row["recall_of"].values())
                    values = {k: row[k] for k in ("precision", "recall", "f1", "kept")}
                    for key, value in {**values, "worst": worst}.items():
                        into.setdefault(key, []).append(value)
    return found


def training(bench: Bench) -> dict[str, list[float]]:
    """Return what was trained on -> test loss in each seed, unevenly spoilt, default score."""
    found: dict[str, list[float]] = {}
    for seed in bench.seeds:
        config = bench.config(seed, "uneven")
        cases: dict[str, dict[str, Any]] = {"quantile": {}}
        if not bench.quick:
            cases["anchor mean"] = {"kind": "anchor_mean", "anchors": 10}
            clean = 1 - sum(UNEVEN) / len(UNEVEN)
            cases["same share"] = {"kind": "share", "share": clean}
        for rule, threshold in cases.items():
            config["curation"]["threshold"] = threshold
            losses = hansa.curate(config, train_too=True).summary["test_loss"]
            found.setdefault(f"filtered, {rule}", []).append(losses["filtered"]["mean"])
        for name, label in (("all", "all"), ("clean", "labelled clean")):
            found.setdefault(label, []).append(losses[name]["mean"])
    return found


def cost(bench: Bench, turns: int) -> dict[str, float]:
    """Return score -> seconds per example over those of one forward pass, medians of turns."""
    config = bench.config(bench.seeds[0], "even")
    cohort = cohort_of(prepare(load(config)))
    task, data = cohort.task, cohort.data
    points = cohort.points(task.params, [])
    model, checkpoints = points_from(points)
    inputs, labels = (tensor[:64] for tensor in data.clients["policy"].batch("train"))

    def once(name: str) -> Callable[[], object]:
        def call() -> object:
            pair = inputs, labels
            sample = Sample(task, task.buffers, model, checkpoints, pair, data.blank)
            return measure([name], sample)

        return call

    @torch.no_grad()
    def forward() -> object:
        return task.logits(task.params, task.buffers, inputs, training=False)

    calls = {"forward": forward, **{name: once(name) for name in SCORES}}
    took: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                took[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in took.items()}
    return {name: medians[name] / medians["forward"] for name in SCORES}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return a mean and the half width of its 95 % confidence interval over seeds."""
    mean = float(np.mean(values))
    if len(values) < 2 or not np.isfinite(values).all():
        return f"{mean:.{digits}f}"
    half = student.ppf(0.975, len(values) - 1) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _print(result: Mapping[str, Any]) -> None:
    for key in ("separation", "real separation"):
        if key in result:
            kinds = list(next(iter(result[key].values())))
            rows = [[f"`{n}`", *(spread(r[k]) for k in kinds)] for n, r in result[key].items()]
            print(f"\n{key}: AUROC\n\n{_table(['score', *kinds], rows)}")
    for key in ("thresholds", "real thresholds"):
        for case, scores in result.get(key, {}).items():
            print(f"\n{key}, {case}: precision / recall (worst client) / F1 or share kept\n")
            columns = ["score", *next(iter(scores.values()))]
            print(_table(columns, [[f"`{n}`", *map(_rule, r.values())] for n, r in scores.items()]))
    if "training" in result:
        rows = [[name, spread(values, 3)] for name, values in result["training"].items()]
        print(f"\ntest loss\n\n{_table(['trained on', 'loss'], rows)}")
    if "cost" in result:
        rows = [[f"`{name}`", f"{value:.1f}"] for name, value in result["cost"].items()]
        print(f"\ncost over a forward pass\n\n{_table(['score', 'cost'], rows)}")


def _rule(row: Mapping[str, Sequence[float]]) -> str:
    precision, recall, worst = (np.mean(row[key]) for key in ("precision", "recall", "worst"))
    if min(row["precision"]) == 1:  # nothing was spoilt
        return f"{spread(row['kept'])} ({min(row['worst']):.2f})"
    return f"{precision:.2f} / {recall:.2f} ({worst:.2f}) / {spread(row['f1'])}"


def main() -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", default="")
    parser.add_argument("--data")
    parser.add_argument("--tables", default="separation,thresholds,training,cost,real")
    parser.add_argument("--output", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in given.seeds.split(",")] if given.seeds else []
    output = given.output or f"runs/benchmark-curation{'-quick' if given.quick else ''}"
    bench = Bench(
        given.quick, seeds or ([0] if given.quick else [0, 1, 2]), Path(output), given.data
    )
    wanted = given.tables.split(",")
    result: dict[str, Any] = {}
    if "separation" in wanted:
        result["separation"] = separations(bench)
    if "thresholds" in wanted:
        result["thresholds"] = thresholds(bench, bench.cases)
    if "training" in wanted:
        result["training"] = training(bench)
    if "cost" in wanted:
        result["cost"] = cost(bench, 3 if given.quick else 9)
    if "real" in wanted and given.data:
        result["real separation"] = separations(bench, real=True)
        result["real thresholds"] = thresholds(bench, ["even"], real=True)
    _print(result)
    if given.json:
        print(json.dumps(summarised(result)))


def summarised(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures that are followed over time, with all the others behind them."""
    found: dict[str, Any] = {"tables": result}
    if "separation" in result:
        rows = result["separation"].items()
        found["auroc"] = {name: float(np.mean(row["all"])) for name, row in rows}
    if "thresholds" in result:
        rules = result["thresholds"]["uneven"][DEFAULT]
        keys = {"quantile": "quantile", "same share": "share", "anchor mean": "anchor_mean"}
        found["f1"] = {key: float(np.mean(rules[rule]["f1"])) for rule, key in keys.items()}
    if "training" in result:
        keys = {"all": "mixed", "filtered, quantile": "filtered", "labelled clean": "clean"}
        rows = result["training"]
        found["test_loss"] = {key: float(np.mean(rows[name])) for name, key in keys.items()}
    return found


if __name__ == "__main__":
    main()

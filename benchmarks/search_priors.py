"""What is known of models before any of them is trained: proxies, blocks, a supernet.

    python benchmarks/search_priors.py [--quick] [--json] [--seeds 0,1,2] [--names dna,snip]
        [--steps 160] [--processes 2] [--output FOLDER]

Each ranking is made anew for every seed and held to the mean test accuracies of the table that
comes with Hansa. Of each, the mean over seeds:

alike      Spearman's correlation with accuracy (``donna``: over the models it was not fitted on)
itself     Spearman's correlation of two seeds' rankings
best       the mean test accuracy of the model that it ranks first, and of the first ten
seconds    of one core, for all 240 models; all blocks and the teacher for the first of ``dna``,
           ``donna`` and ``lana``, which share them

``dna_mse`` adds up mean squared errors where ``dna`` has noise to signal. ``donna`` is fitted on
16 models whose accuracies it takes from the table; their training is not in its seconds. What
counts of operations tell, for nothing, is in ``search_seeds.py``. Finished rankings are kept in
FOLDER (by default ``runs/search-priors``). ``--quick`` trains 8 steps, and scores for one seed.
"""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hansa.files import write_atomic
from hansa.search.priors import BLOCKWISE, PriorOptions, prior_of, proxy_scores
from hansa.search.profile.rounds import rank_correlation
from hansa.search.proxies import PROXIES
from hansa.search.recipes import open_data, recipe_of
from hansa.search.spaces import Floats
from hansa.search.tables import open_table
from hansa.seeding import numpy_generator

BY_BLOCKS = (*BLOCKWISE, "dna_mse")
NAMES = (*BY_BLOCKS, "supernet", *PROXIES)
SUPERNET = 1000
"""Steps of the supernet of each kind."""


def by_training(name: str, seed: int, steps: int, folder: Path) -> tuple[Floats, list[int]]:
    """Return a ranking of the table's models by blocks or a supernet, and those it has seen."""
    table, recipe = open_table(), recipe_of("gratings16-w8")
    options = PriorOptions(steps=steps, loss="mse" if name == "dna_mse" else "nsr")
    fitted = numpy_generator(seed, "fitted").permutation(table.models)[: options.fitted]
    found = prior_of(
        name.removesuffix("_mse"),
        recipe,
        open_data(recipe),
        folder,
        options,
        seed,
        lambda models: np.array([table.validation_accuracy(model) for model in models]),
        fitted,
        lambda *_: None,
    )
    return found[table.models], fitted.tolist() if name == "donna" else []


def by_proxy(name: str, seed: int) -> Floats:
    """Return a proxy's scores of the table's models at their first weights."""
    recipe = recipe_of("gratings16-w8")
    models = open_table().models
    return proxy_scores(name, recipe, open_data(recipe), models, seed, lambda _: None)


def work(names: tuple[str, ...], seed: int, steps: int, folder: Path) -> None:
    """Make rankings one after another, unless they are kept already."""
    torch.set_num_threads(1)
    for name in names:
        path = folder / f"{name}.{seed}.json"
        if path.exists():
            continue
        begun = time.process_time()
        if name in PROXIES:
            scores = by_proxy(name, seed)
            seen: list[int] = []
        else:
            steps = SUPERNET if name == "supernet" and steps > 8 else steps
            scores, seen = by_training(name, seed, steps, folder / f"blocks-{seed}")
        kept = {"scores": scores.tolist(), "seen": seen}
        write_atomic(path, json.dumps({**kept, "seconds": time.process_time() - begun}))


def figures(name: str, seeds: list[int], folder: Path) -> dict[str, float]:
    """Return what the module's docstring says of one ranking."""
    table = open_table()
    accuracy = np.array([table.test_accuracy(int(model)) for model in table.models])
    kept = [json.loads((folder / f"{name}.{seed}.json").read_text()) for seed in seeds]
    scores = [np.array(each["scores"]) for each in kept]
    alike, best, ten = [], [], []
    for own, about in zip(scores, kept, strict=True):
        rest = ~np.isin(table.models, about["seen"])
        alike.append(rank_correlation(own[rest], accuracy[rest]))
        order = np.argsort(-own[rest], kind="stable")
        best.append(accuracy[rest][order[0]])
        ten.append(accuracy[rest][order[:10]].mean())
    pairs = [rank_correlation(a, b) for a, b in combinations(scores, 2)]
    return {
        "alike": float(np.mean(alike)),
        "alike_least": float(np.min(alike)),
        "alike_most": float(np.max(alike)),
        "itself": float(np.mean(pairs)) if pairs else float("nan"),
        "best": 100 * float(np.mean(best)),
        "first_ten": 100 * float(np.mean(ten)),
        "seconds": float(np.median([each["seconds"] for each in kept])),
    }


def main() -> None:
    """Make all rankings and print a table, or with ``--json`` one object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", default=None)
    parser.add_argument("--names", default=",".join(NAMES))
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", default="runs/search-priors")
    given = parser.parse_args()
    names = tuple(given.names.split(","))
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"--names: found {unknown[0]}; allowed: {', '.join(NAMES)}")
    steps = given.steps or (8 if given.quick else 160)
    seeds = [int(s) for s in (given.seeds or ("0" if given.quick else "0,1,2")).split(",")]
    folder = Path(f"{given.output}-{steps}")
    folder.mkdir(parents=True, exist_ok=True)
    # What shares blocks is made one after another, whatever else goes on beside it.
    groups = [tuple(name for name in names if name in BY_BLOCKS)]
    groups += [(name,) for name in names if name not in BY_BLOCKS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.processes, context) as pool:
        tasks = [(group, seed) for group in groups for seed in seeds if group]
        jobs = [pool.submit(work, group, seed, steps, folder) for group, seed in tasks]
        for job in jobs:
            job.result()
    found: dict[str, Any] = {name: figures(name, seeds, folder) for name in names}
    if given.json:
        print(json.dumps({"rankings": found}))
        return
    print("| ranking | alike | least, most | itself | best | first ten | seconds |")
    print("|---|---|---|---|---|---|---|")
    for name, own in sorted(found.items(), key=lambda item: -item[1]["alike"]):
        between = f"{own['alike_least']:.2f}, {own['alike_most']:.2f}"
        rest = f"{own['itself']:.2f} | {own['best']:.1f} | {own['first_ten']:.1f}"
        print(f"| {name} | {own['alike']:.2f} | {between} | {rest} | {own['seconds']:.0f} |")


if __name__ == "__main__":
    main()

"""Make a table: which models by how many seeds, trained by parallel workers."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from pathlib import Path
from time import sleep

import numpy as np

from hansa.errors import InputError
from hansa.models.blox_space import COUNTS, NUM_MODELS, Ints, check_id, multiply_adds, split
from hansa.processes import one_thread, pool
from hansa.search.recipes import Recipe, Splits, open_data
from hansa.search.store import Job, Store
from hansa.search.training import Curves, train_model
from hansa.seeding import numpy_generator

Watch = Callable[[int, int], None]
_LOOK = 0.5
"""Seconds between two looks at what others are doing."""


def choose(wanted: str, seed: int = 0) -> Ints:
    """Return the models that a text names, in the order in which they are to be trained.

    ``all``; ``random:N``; ``spread:N``, which are spread evenly over the 729 classes of equal
    cost, ordered by multiply-adds; or numbers with commas between them.

    Raises:
        InputError: another text, or more models than there are.
    """
    kind, _, rest = wanted.partition(":")
    allowed = f"all, random:N, spread:N or numbers from 0 to {NUM_MODELS - 1}"
    if kind == "all" and not rest:
        return np.arange(NUM_MODELS)
    if kind in ("random", "spread"):
        limit = NUM_MODELS if kind == "random" else 729
        if not rest.isdigit() or not 0 < int(rest) <= limit:
            raise InputError("--models", wanted, f"{allowed}; N up to {limit}")
        rng = numpy_generator(seed, "models of a table")
        if kind == "random":
            return rng.choice(NUM_MODELS, int(rest), replace=False)
        return _spread(int(rest), rng)
    try:
        return np.array([check_id(int(each)) for each in wanted.split(",")])
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError("--models", wanted, allowed) from error


def _spread(num: int, rng: np.random.Generator) -> Ints:
    models = rng.permutation(NUM_MODELS)
    counts = COUNTS[split(models)].reshape(NUM_MODELS, -1)
    _, first = np.unique(counts, axis=0, return_index=True)  # a random one of each class
    classes = models[first]
    ordered = classes[np.lexsort((classes, multiply_adds(classes)))]
    taken = ordered[np.linspace(0, len(ordered) - 1, num).round().astype(np.int64)]
    return rng.permutation(taken)


def generate(
    path: str | Path,
    recipe: Recipe,
    jobs: Sequence[Job] = (),
    *,
    data: str | Path | None = None,
    workers: int = 1,
    keep: float = 1.0,
    watch: Watch | None = None,
) -> None:
    """Train what is still to be trained, each model and seed once, whoever else is at it.

    Returns when all runs of the recipe are done, those that others have begun included.

    Args:
        path: the SQLite file, made or gone on with.
        recipe: how models are trained.
        jobs: models and seeds to add to those of the file.
        data: of a recipe that brings none.
        workers: processes of one thread each.
        keep: share of runs that go on after each rung (ASHA, arXiv 1810.05934); with 1 all do,
            and rows do not depend on what was done before them.
        watch: called with how many runs are done and how many there are.

    Raises:
        InputError: input that cannot be used; a file made by other values of the recipe.
    """
    if workers < 1:
        raise InputError("--workers", workers, "1 or more")
    if not 0 < keep <= 1:
        raise InputError("--keep", keep, "above 0, at most 1")
    splits = open_data(recipe, data)
    store = Store(path)
    store.add(recipe, jobs)
    store.release()
    tell = watch or (lambda done, total: None)
    tell(*store.progress(recipe.name))
    if workers == 1:
        with one_thread():
            _work(store, recipe, splits, keep, lambda: tell(*store.progress(recipe.name)))
        return
    del splits
    with pool(workers) as executor:
        running = [executor.submit(work, path, recipe, data, keep) for _ in range(workers)]
        while running:
            done, still = wait(running, timeout=2, return_when=FIRST_EXCEPTION)
            for each in done:
                each.result()
            running = list(still)
            tell(*store.progress(recipe.name))


def work(path: str | Path, recipe: Recipe, data: str | Path | None, keep: float) -> None:
    """Train what can be claimed, until all is done."""
    _work(Store(path), recipe, open_data(recipe, data), keep, lambda: None)


def _work(
    store: Store, recipe: Recipe, splits: Splits, keep: float, tell: Callable[[], None]
) -> None:
    """Train what can be claimed; what others have claimed is waited for, lest they die."""
    while True:
        if _one(store, recipe, splits, keep):
            tell()
            continue
        done, total = store.progress(recipe.name)
        if done == total:
            return
        tell()
        if not store.release():
            sleep(_LOOK)


def _one(store: Store, recipe: Recipe, splits: Splits, keep: float) -> bool:
    job = store.claim(recipe.name)
    if job is None:
        return False
    rungs = _rungs(recipe.epochs)

    def stop(epoch: int, curves: Curves) -> bool:
        if keep == 1 or epoch not in rungs:
            return False
        others = store.at_epoch(recipe.name, epoch)
        better = sum(other > curves.validation_correct[-1] for other in others)
        # The first few go on: among so few, a place says nothing.
        return len(others) >= math.ceil(2 / keep) and better >= keep * (len(others) + 1)

    model, seed = job
    try:
        with store.held(recipe.name, job):
            curves = train_model(recipe.build(model, seed), recipe, splits, seed, stop=stop)
    except BaseException:
        store.give_back(recipe.name, job)
        raise
    store.finish(recipe.name, job, curves)
    return True


def _rungs(epochs: int) -> set[int]:
    """Return after which epochs runs may end: none before 55 % of the schedule.

    Earlier, the order of models says too little about their order at the end
    (``docs/results/search.md``).
    """
    return {math.ceil(share * epochs) for share in (0.55, 0.75)} - {epochs}


def promoted(store: Store, recipe: Recipe, share: float, jobs: Sequence[Job]) -> list[int]:
    """Return the share of models that did best on validation data, the best first.

    A model's score is the mean over its seeds of its best epoch.

    Args:
        store: with the runs.
        recipe: how they were made.
        share: of the models, above 0 and at most 1.
        jobs: the runs that count, all of which must be done; later seeds of the models that were
            promoted do not, or the same call would promote others.

    Raises:
        InputError: a run that is not done.
    """
    done = {(m, s): max(c.validation_correct) for m, s, c in store.runs(recipe.name)}
    scores: dict[int, list[int]] = {}
    for job in jobs:
        if job not in done:
            found = f"model {job[0]} with seed {job[1]} still in work elsewhere"
            raise InputError("--top", found, "the same command when that is done")
        scores.setdefault(job[0], []).append(done[job])
    ranked = sorted(scores, key=lambda model: (-float(np.mean(scores[model])), model))
    return ranked[: math.ceil(share * len(ranked))]

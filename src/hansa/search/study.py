"""Blockwise search from a teacher to fine-tuned models, told in figures: for benchmarks."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hansa.errors import InputError
from hansa.models.blox import Blox
from hansa.models.blox_space import NUM_CELLS, NUM_STAGES
from hansa.search.blocks import assemble
from hansa.search.blockwise import BlockFitting, Watch, train_blocks
from hansa.search.fitting import Fitting
from hansa.search.profile import rank_correlation
from hansa.search.rankings import dna, donna, lana
from hansa.search.select import Cap, allowed, top
from hansa.search.spaces import Floats
from hansa.search.teacher import features
from hansa.search.tuning import Samples, fine_tune, scores_of, swap_accuracies
from hansa.seeding import numpy_generator


def blockwise_study(
    teacher: Blox,
    train: Samples,
    validation: Samples,
    test: Samples,
    folder: Path,
    *,
    blocks: BlockFitting | None = None,
    tuning: Fitting | None = None,
    caps: Sequence[Cap] = (),
    cells: Iterable[int] = range(NUM_CELLS),
    num_random: int = 8,
    seed: int = 0,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train the blocks, fine-tune random models and those that each ranking puts first.

    DONNA is fitted on the random models, and all are chosen by validation data.

    Args:
        teacher: a trained network.
        train: samples.
        validation: samples.
        test: samples that nothing is chosen by.
        folder: of the blocks; those that are there already are kept.
        blocks: how they are trained.
        tuning: how models are fine-tuned.
        caps: what all models keep to.
        cells: that the space is narrowed to; all 45 as a rule.
        num_random: models drawn from all that keep to the caps.
        seed: of all draws.
        watch: told after every block.

    Returns:
        ``teacher`` (figures on test data), ``cpu_seconds`` by phase, ``correlation`` (Spearman,
        of each ranking with the validation accuracy of the random models after fine-tuning; that
        of ``donna`` is on models it was fitted on) and ``models``: rows of ``chosen_by``,
        ``model``, and accuracy before and after fine-tuning.

    Raises:
        InputError: no model keeps to the caps, or fewer random ones than DONNA needs.
    """
    chosen = sorted(set(cells))
    if num_random <= NUM_STAGES:
        raise InputError("num_random", num_random, f"at least {NUM_STAGES + 1}")
    seconds, start = {}, time.process_time()
    library = train_blocks(
        teacher,
        train[0],
        validation[0],
        folder,
        blocks,
        seed,
        which=[(stage, cell) for stage in range(NUM_STAGES) for cell in chosen],
        watch=watch,
    )
    seconds["blocks"], start = time.process_time() - start, time.process_time()
    which = [(stage, cell) for stage in range(NUM_STAGES) for cell in chosen]
    held = features(teacher, validation[0])
    swapped = swap_accuracies(library, teacher, held, validation[1], which)
    seconds["swaps"] = time.process_time() - start
    own = scores_of(teacher, validation)["accuracy"]

    # What is outside of the cells that are looked at costs more than anything allows.
    missing = np.isnan(library.scores["nsr"])
    missing[:, [cell for cell in range(NUM_CELLS) if cell not in chosen]] = True
    within = [*caps, Cap(missing.astype(np.float64), 0.5, name="cells outside")]
    keep = np.flatnonzero(allowed(within, NUM_CELLS**NUM_STAGES))
    rng = numpy_generator(seed, "blockwise study")
    random = rng.choice(keep, min(num_random, len(keep)), replace=False).tolist()
    losses = {name: np.where(missing, 1.0, score) for name, score in library.scores.items()}
    rankings = {f"dna {name}": dna(score) for name, score in losses.items()}
    rankings["lana"] = lana(np.where(missing, 0.0, swapped), own)

    rows: list[dict[str, Any]] = []
    start = time.process_time()

    def tuned(model: int, chosen_by: str) -> float:
        known = [row for row in rows if row["model"] == model]
        row = {**known[0], "chosen_by": chosen_by} if known else _tuned(model, chosen_by)
        rows.append(row)
        return float(row["validation"])

    def _tuned(model: int, chosen_by: str) -> dict[str, Any]:
        network = assemble(library, model)
        before = scores_of(network, test)["accuracy"]
        found = fine_tune(network, teacher, train, validation, tuning, seed)
        return {
            "chosen_by": chosen_by,
            "model": model,
            "before": before,
            "validation": found.figures["accuracy"],
            "test": scores_of(network, test)["accuracy"],
        }

    reached = np.array([tuned(model, "random") for model in random])
    fitted = donna(np.log(losses["nsr"].clip(1e-9, 1e9)), random, reached)
    rankings["donna"] = fitted.ranking()
    for name, ranking in rankings.items():
        tuned(int(top(ranking, within)[0]), name)
    seconds["fine-tuning"] = time.process_time() - start
    return {
        "teacher": scores_of(teacher, test),
        "cpu_seconds": seconds,
        "correlation": {name: _spearman(each[random], reached) for name, each in rankings.items()},
        "models": rows,
    }


def _spearman(first: Floats, second: Floats) -> float:
    """Return the rank correlation, 0 where all values of one are equal."""
    return float(np.nan_to_num(rank_correlation(first, second)))

"""What blocks say about all models: one number each, larger where better is expected.

Each ranking is a float64 [91125] in ascending order of the models' numbers. ``select.top`` gives
the best of them under caps, and a searcher takes one as its prior.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hansa.errors import InputError
from hansa.models.blox_space import Ints
from hansa.search.select import totals
from hansa.search.spaces import Floats


def dna(losses: Floats) -> Floats:
    """Return the ranking of DNA (arXiv 1911.13053, section 3.3): the sum of block losses, negated.

    Args:
        losses: of every block on validation data, float64 [3, 45].
    """
    return -totals(losses)


def lana(accuracies: Floats, teacher: float) -> Floats:
    """Return the ranking of LANA (arXiv 2107.10624): the teacher's accuracy and all changes of it.

    A change is what the accuracy loses or gains where one stage of the teacher is replaced by a
    block; LANA adds them up.

    Args:
        accuracies: of the teacher with one stage replaced, float64 [3, 45], see
            ``tuning.swap_accuracies``.
        teacher: its own accuracy on the same data.
    """
    return teacher + totals(accuracies - teacher)


@dataclass(frozen=True)
class Donna:
    """The accuracy predictor of DONNA (arXiv 2012.08859): linear in the quality of blocks.

    Attributes:
        quality: of every block, float64 [3, 45].
        weights: of each stage's quality, float64 [3].
        constant: the rest.
        correlation: Pearson's, of predicted with true accuracies of the models it was fitted on;
            no measure of how it does on others.
    """

    quality: Floats
    weights: Floats
    constant: float
    correlation: float

    def ranking(self) -> Floats:
        """Return the predicted accuracy of every model."""
        return self.constant + totals(self.weights[:, None] * self.quality)


def donna(quality: Floats, models: Ints | Sequence[int], accuracies: Floats) -> Donna:
    """Fit the predictor on a few trained models by least squares.

    Args:
        quality: noise-to-signal ratio of every block, or its logarithm, float64 [3, 45].
        models: numbers of the trained models, int64 [n].
        accuracies: what they reached, float64 [n].

    Raises:
        InputError: fewer models than the four coefficients, or numbers that are none.
    """
    slots, choices = np.asarray(quality).shape
    numbers, reached = np.asarray(models, dtype=np.int64), np.asarray(accuracies, dtype=np.float64)
    if len(numbers) != len(reached) or len(np.unique(numbers)) <= slots:
        found = f"{len(numbers)} models, {len(reached)} accuracies"
        raise InputError("models", found, f"at least {slots + 1} different ones, one accuracy each")
    digits = numbers[:, None] // choices ** np.arange(slots)[::-1] % choices
    seen = quality[np.arange(slots), digits]
    if not (np.isfinite(seen).all() and np.isfinite(reached).all()):
        raise InputError("quality and accuracies", "an infinite one, or nan", "finite numbers")
    rows = np.column_stack([seen, np.ones(len(seen))])
    found, *_ = np.linalg.lstsq(rows, reached)
    fitted = rows @ found
    flat = not (np.ptp(fitted) and np.ptp(reached))
    correlation = 0.0 if flat else float(np.corrcoef(fitted, reached)[0, 1])
    return Donna(np.asarray(quality), found[:-1], float(found[-1]), correlation)

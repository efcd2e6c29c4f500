"""What assembled models are worth: fine-tuned by distillation, or swapped into the teacher."""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hansa.models.blox import Blox
from hansa.processes import one_thread
from hansa.search.blocks import ALL, Blocks
from hansa.search.distillation import distillation_loss
from hansa.search.fitting import Fitted, Fitting, fit
from hansa.search.spaces import Floats
from hansa.search.teacher import Features, evaluating, logits_after

Samples = tuple[torch.Tensor, torch.Tensor]
"""Inputs float32 [n, channels, side, side] and labels int64 [n]."""
_BATCH = 256


def fine_tune(
    model: nn.Module,
    teacher: nn.Module | None,
    train: Samples,
    validation: Samples,
    options: Fitting | None = None,
    seed: int = 0,
    share: float = 0.9,
) -> Fitted:
    """Train a whole model in place by end-to-end distillation, and leave its best weights in it.

    The teacher's logits are computed once, so inputs are not augmented. The best weights are
    those of the evaluation with the largest accuracy on validation data, of equal ones that with
    the smaller cross entropy.

    Args:
        model: what is trained, such as what ``assemble`` returns.
        teacher: what it follows; None trains on labels alone.
        train: samples.
        validation: samples that the best weights are chosen by.
        options: steps, rate, batches.
        seed: of the order of samples.
        share: of the teacher in the loss, see ``distillation_loss``.

    Returns:
        Weights, and ``accuracy`` (share correct, 0 to 1) and ``loss`` on validation data.
    """
    inputs, labels = train

    with one_thread():
        targets = None if teacher is None else logits_of(teacher, inputs)

        def loss_of(chosen: torch.Tensor) -> torch.Tensor:
            logits = model(inputs[chosen])
            if targets is None:
                return F.cross_entropy(logits, labels[chosen])
            return distillation_loss(logits, targets[chosen], labels[chosen], share)

        return fit(
            model,
            loss_of,
            len(labels),
            lambda: scores_of(model, validation),
            lambda figures: (figures["accuracy"], -figures["loss"]),
            options or Fitting(),
            seed,
            "fine-tuning order",
        )


def logits_of(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return a model's logits [n, classes] in evaluation mode."""
    with evaluating(model):
        return torch.cat([model(part) for part in inputs.split(_BATCH)])


def scores_of(model: nn.Module, samples: Samples) -> dict[str, float]:
    """Return ``accuracy`` (share correct) and ``loss`` (cross entropy) of a model."""
    return _scores(logits_of(model, samples[0]), samples[1])


def swap_accuracies(
    blocks: Blocks,
    teacher: Blox,
    held: Features,
    labels: torch.Tensor,
    which: Iterable[tuple[int, int]] = ALL,
) -> Floats:
    """Return the teacher's accuracy after one of its stages was replaced by a block, for each.

    Args:
        blocks: trained blocks.
        teacher: what they were trained against.
        held: its features of validation data.
        labels: of that data, int64 [n].
        which: (stage, cell) of the blocks that are looked at.

    Returns:
        Share correct, float64 [3, 45]; nan for blocks that are not looked at.

    Raises:
        InputError: a block is missing.
    """
    found = np.full(blocks.scores["mse"].shape, np.nan)
    with one_thread(), evaluating(teacher):
        for stage, cell in which:
            block = blocks.stage(stage, cell)
            parts = held.maps[stage].split(_BATCH)
            logits = torch.cat([logits_after(teacher, stage, block(part)) for part in parts])
            found[stage, cell] = _scores(logits, labels)["accuracy"]
    return found


def _scores(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    return {
        "accuracy": float((logits.argmax(1) == labels).double().mean()),
        "loss": float(F.cross_entropy(logits, labels)),
    }

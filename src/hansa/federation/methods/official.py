"""What the released code of FedSelect does otherwise than the method, each under a name.

The code is lapisrocks/fedselect, commit 0949f8a. A quirk changes numbers; what in that code only
crashes, misreports or deals data oddly is listed in ``docs/fedselect.md`` and not reproduced.
"""

from typing import Literal, get_args

import torch

from hansa.errors import InputError
from hansa.federation.message import Tensors
from hansa.federation.methods.base import Work
from hansa.federation.methods.masks import Masks
from hansa.federation.node import Setup
from hansa.models.task import Batch

Quirk = Literal[
    "late-masks",
    "overshoot",
    "ties",
    "holes",
    "weights-only",
    "unshared-names",
    "empty-pass",
    "frozen-norms",
    "misaligned-masks",
]
"""
``late-masks``
    masks change after rounds 1 + period, 1 + 2 * period, ... and never after the first.
``overshoot``
    the limit is tested before growth only: a tensor grows while its share is not above it.
``ties``
    every entry promoted that changed at least as much as the entry at ``round((1 - rate) * n)`` of
    the n shared ones in rising order; an index past the end is an error.
``holes``
    the server holds zero where nobody shares.
``weights-only``
    only tensors with "weight" in their name have personal entries.
``unshared-names``
    parameters with neither "weight" nor "bias" in their name never leave their client.
``empty-pass``
    the personal pass is made, and moves nothing, while the mask is empty.
``frozen-norms``
    from the second round on training leaves BatchNorm (and dropout) as in evaluation.
``misaligned-masks``
    masks are counted off over the parameters that have a gradient, so one without shifts those
    of all that follow.
"""

QUIRKS: tuple[Quirk, ...] = get_args(Quirk)


def grow_with_ties(mask: torch.Tensor, change: torch.Tensor, rate: float) -> torch.Tensor:
    """Return a mask grown by a threshold instead of a quota (``ties``).

    Raises:
        InputError: the threshold's position lies past the last shared entry, where the released
            code ends in an IndexError.
    """
    candidates = change[~mask].sort().values
    index = round((1 - rate) * len(candidates))
    if index >= len(candidates):
        raise InputError(
            "method.quirks",
            f"'ties' with {len(candidates)} shared entries in a tensor at rate {rate}",
            "tensors with more entries, a higher rate, or quirks without 'ties'",
        )
    return mask | (change >= candidates[index])


def misaligned(setup: Setup, work: Work, batch: Batch, masks: Tensors) -> Masks:
    """Return the masks as they fall on the parameters that have a gradient.

    Raises:
        InputError: a mask falls on a parameter of another shape.
    """
    gradients, _, _ = setup.task.gradients(work["params"], work["buffers"], batch)
    with_gradient = [name for name, gradient in gradients.items() if gradient is not None]
    shifted = dict(masks)
    for name, mask in zip(with_gradient, masks.values(), strict=False):
        if mask.shape != masks[name].shape:
            raise InputError(
                "method.quirks",
                f"'misaligned-masks', by which {name} of shape {tuple(masks[name].shape)} gets a "
                f"mask of shape {tuple(mask.shape)}",
                "a model all of whose parameters have gradients",
            )
        shifted[name] = mask
    return shifted

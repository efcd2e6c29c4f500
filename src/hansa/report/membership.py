"""What a model gives away of its training data: the attack that thresholds losses.

Yeom et al., "Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting" (CSF 2018),
Section 3.2: whoever knows a sample guesses that it was trained on if the model's loss on it is
small. It is the weakest attack worth naming, and so a lower bound: a model that resists it may
still give way to another. What bounds every attack is epsilon, by ``advantage_bound``.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from hansa.data.clients import Client, Samples
from hansa.errors import InputError
from hansa.models.modes import in_mode
from hansa.models.objective import CLASSIFICATION, Objective

_BATCH = 512


@dataclass(frozen=True)
class Membership:
    """How well losses tell members from non-members.

    Attributes:
        advantage: the largest true-positive rate less false-positive rate over all thresholds. It
            is chosen on the samples that it is measured on, so that chance alone makes it positive.
        advantage_fixed: the same at Yeom's threshold, the mean loss of the members; 0 by chance.
        auc: the chance that a member's loss is smaller than a non-member's, ties half; 0.5 by
            chance.
        tpr_at_1: the largest true-positive rate at a false-positive rate of at most 1 %.
        members: their number.
        others: the number of non-members.
    """

    advantage: float
    advantage_fixed: float
    auc: float
    tpr_at_1: float
    members: int
    others: int


def attack(members: torch.Tensor, others: torch.Tensor) -> Membership:
    """Return how well a threshold on the loss tells members from others.

    Args:
        members: losses of samples that were trained on [n].
        others: losses of samples of the same kind that were not [m].

    Raises:
        InputError: one of them is empty, or holds a loss that is NaN.
    """
    inside, outside = (np.sort(losses.double().numpy()) for losses in (members, others))
    for name, losses in (("members", inside), ("others", outside)):
        if not len(losses) or np.isnan(losses).any():
            raise InputError(name, "no losses, or such as are no numbers", "at least one loss")
    # Guessing "member" at or below a threshold: it is one of the losses, or below all of them.
    thresholds = np.unique(np.concatenate([[-np.inf], inside, outside]))
    true, false = (
        np.searchsorted(losses, thresholds, side="right") / len(losses)
        for losses in (inside, outside)
    )
    at = float(inside.mean())
    fixed = (inside <= at).mean() - (outside <= at).mean()
    below = np.searchsorted(inside, outside, side="left").sum()
    equal = np.searchsorted(inside, outside, side="right").sum() - below
    return Membership(
        advantage=float((true - false).max()),
        advantage_fixed=float(fixed),
        auc=float((below + equal / 2) / (len(inside) * len(outside))),
        tpr_at_1=float(true[false <= 0.01].max()),
        members=len(inside),
        others=len(outside),
    )


def losses(
    model: nn.Module, samples: Samples, objective: Objective = CLASSIFICATION
) -> torch.Tensor:
    """Return the loss of every sample [n], the model as in evaluation.

    Args:
        model: it gives what the objective takes.
        samples: inputs and labels.
        objective: classification by default; a sequence's loss is the mean over its tokens.
    """
    found = []
    with torch.no_grad(), in_mode(model, training=False):
        for inputs, labels in zip(*(part.split(_BATCH) for part in samples), strict=True):
            logits = model(inputs)
            for one, label in zip(logits, labels, strict=True):
                found.append(objective.loss(one[None], label[None], None)[0])
    return torch.stack(found) if found else torch.zeros(0)


def membership(
    model: nn.Module, clients: Iterable[Client], objective: Objective = CLASSIFICATION
) -> Membership:
    """Attack a model: members are the clients' training samples, the others their test samples.

    Args:
        model: that of a run or a bundle.
        clients: who trained it.
        objective: what it was trained by.

    Raises:
        InputError: no client has test data, or a loss is NaN.
    """
    held = list(clients)
    inside = [losses(model, client.batch("train"), objective) for client in held]
    outside = [losses(model, client.batch("test"), objective) for client in held]
    return attack(torch.cat(inside), torch.cat(outside))


def advantage_bound(epsilon: float, delta: float) -> float:
    """Return the largest advantage that any attack can have against (epsilon, delta) privacy.

    (e^epsilon - 1 + 2 delta) / (e^epsilon + 1): Humphries et al., "Investigating Membership
    Inference Attacks under Data Dependencies" (CSF 2023), for one record of the unit that epsilon
    is about.
    """
    if math.isinf(epsilon):
        return 1.0
    return min(1.0, (math.expm1(epsilon) + 2 * delta) / (math.exp(epsilon) + 1))

"""Losses by which a student follows a teacher (Blox, arXiv 2210.07271, section 5)."""

import torch
import torch.nn.functional as F

from hansa.errors import InputError

BLOCK_LOSSES = ("mse", "nsr")


def channel_variance(maps: torch.Tensor) -> torch.Tensor:
    """Return the variance of every channel over samples and positions: [n, C, S, S] to [C]."""
    return maps.var((0, 2, 3), correction=0)


def channel_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of every channel, [C], of maps [n, C, S, S]."""
    return (student - teacher).square().mean((0, 2, 3))


def block_loss(name: str, error: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Return a block's loss from errors by channel.

    ``mse`` is their mean. ``nsr``, the noise-to-signal ratio of DONNA (arXiv 2012.08859), is the
    mean of error / variance, so that every channel counts alike, whatever its scale.

    Args:
        name: one of ``BLOCK_LOSSES``.
        error: of every channel, [C].
        variance: of the teacher's channels, [C]. Those below a hundredth of the mean variance,
            such as a channel whose ReLU hardly opens, are divided by that instead: their own
            would make them count more than all the others.

    Raises:
        InputError: another name.
    """
    if name == "mse":
        return error.mean()
    if name != "nsr":
        raise InputError("loss", repr(name), " or ".join(map(repr, BLOCK_LOSSES)))
    floor = (variance.mean() / 100).clamp(min=1e-12)
    return (error / variance.maximum(floor)).mean()


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, share: float = 0.9
) -> torch.Tensor:
    """Return share x KL(teacher || student) + (1 - share) x cross entropy, mean over samples.

    The temperature is 1. The released code of Blox makes the target of the student's own logits;
    here it is the teacher's, as the formula says.

    Args:
        student: logits [n, classes].
        teacher: logits [n, classes].
        labels: int64 [n].
        share: of the teacher.
    """
    divergence = F.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
    )
    return share * divergence + (1 - share) * F.cross_entropy(student, labels)

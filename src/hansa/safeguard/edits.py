"""Attacks that train nothing: what rounding, pruning, noise and mixing leave of a safeguard."""

from collections.abc import Mapping

import torch
from torch import nn

from hansa.safeguard.redteam_options import Edit


@torch.no_grad()
def edit(
    model: nn.Module,
    how: Edit,
    rng: torch.Generator,
    unprotected: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Change a model's weights in place.

    Matrices are rounded, pruned and noised, which leaves norms and biases as they are; all
    parameters are mixed.

    Args:
        model: the model.
        how: what is done.
        rng: draws the noise.
        unprotected: the parameters of the model without a safeguard by name, for ``merge``.
    """
    for name, parameter in model.named_parameters():
        if how.kind == "merge":
            if unprotected is None:
                raise ValueError("nothing to merge with")
            parameter.lerp_(unprotected[name].to(parameter), how.amount)
        elif parameter.dim() > 1:
            if how.kind == "quantise":
                parameter.copy_(quantised(parameter, int(how.amount)))
            elif how.kind == "prune":
                parameter.copy_(pruned(parameter, how.amount))
            else:
                parameter.copy_(noised(parameter, how.amount, rng))


def quantised(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Return a weight rounded to the nearest of 2^bits - 1 even steps in each row.

    Steps are symmetric about zero and reach to the row's largest size.
    """
    most = 2 ** (bits - 1) - 1
    step = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.dim() - 1)) / most
    rounded = (weight / step).round().clamp(-most, most) * step
    return torch.where(step > 0, rounded, weight)


def pruned(weight: torch.Tensor, share: float) -> torch.Tensor:
    """Return a weight whose smallest entries, this share of them, are zero."""
    num = round(share * weight.numel())
    gone = weight.flatten().abs().argsort(stable=True)[:num]
    return weight.flatten().index_fill(0, gone, 0.0).view_as(weight)


def noised(weight: torch.Tensor, amount: float, rng: torch.Generator) -> torch.Tensor:
    """Return a weight with Gaussian noise of this share of its own standard deviation."""
    noise = torch.randn(weight.shape, generator=rng).to(weight)
    return weight + amount * weight.std(correction=0) * noise

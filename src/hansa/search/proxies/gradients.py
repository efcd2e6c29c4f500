"""Proxies by the gradient of the loss at the first weights, in training mode.

Only the weights of convolutions and linear layers count, no biases and no norms. The gradient is
the mean over the samples of all batches, except in ``zico``, which compares batches.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from hansa.errors import InputError
from hansa.models.derivatives import derivatives

Batch = tuple[torch.Tensor, torch.Tensor]


def layers(module: nn.Module) -> list[nn.Module]:
    """Return a network's convolutions and linear layers."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [each for each in module.modules() if isinstance(each, kinds)]


def weights(module: nn.Module) -> list[torch.Tensor]:
    """Return the weights of a network's convolutions and linear layers, each once."""
    found = {id(each.weight): each.weight for each in layers(module)}
    return [weight for weight in found.values() if isinstance(weight, torch.Tensor)]


def grad_norm(module: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the sum over layers of ||dL/dw||."""
    return float(sum(gradient.norm().item() for gradient in _gradient(module, batches)))


def snip(module: nn.Module, batches: Sequence[Batch]) -> float:
    """Return sum |w dL/dw| (Lee et al., "SNIP", arXiv 1810.02340)."""
    pairs = zip(weights(module), _gradient(module, batches), strict=True)
    return float(sum((w.detach() * gradient).abs().sum().item() for w, gradient in pairs))


def grasp(module: nn.Module, batches: Sequence[Batch]) -> float:
    """Return sum -w (H g) for Hessian H and gradient g (Wang et al., "GraSP", arXiv 2002.07376)."""
    chosen, vector = weights(module), _gradient(module, batches)
    total, count = 0.0, _count(batches)
    for inputs, labels in batches:
        loss = F.cross_entropy(module(inputs), labels)
        first = derivatives(loss, chosen, create_graph=True)
        slope = torch.stack([(g * v).sum() for g, v in zip(first, vector, strict=True)]).sum()
        product = derivatives(slope, chosen) if slope.requires_grad else vector
        share = len(labels) / count
        for weight, each in zip(chosen, product, strict=True):
            total -= share * (weight.detach() * each).sum().item()
    return total


def fisher(module: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the sum over output channels of 1/2 mean_b (sum over positions of a dL/da)^2.

    a is what a layer returns before any norm (Turner et al., "BlockSwap", arXiv 1906.04113). L is
    the mean loss of a batch. A channel counts once; the code of "Zero-Cost Proxies" counts it once
    for each of its weights.
    """
    outputs: list[torch.Tensor] = []

    def keep(layer: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        outputs.append(output)
        return output.clone()  # what follows may write into it

    hooks = [layer.register_forward_hook(keep) for layer in layers(module)]
    total, count = 0.0, _count(batches)
    for inputs, labels in batches:
        outputs.clear()
        loss = F.cross_entropy(module(inputs), labels)
        slopes = derivatives(loss, outputs)
        for output, slope in zip(outputs, slopes, strict=True):
            by_channel = (output.detach() * slope).flatten(2 if output.dim() > 2 else 1)
            if output.dim() > 2:
                by_channel = by_channel.sum(2)
            total += 0.5 * by_channel.square().mean(0).sum().item() * len(labels) / count
    for hook in hooks:
        hook.remove()
    return total


def zico(module: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the sum over layers of log(sum_w mean_b |g| / std_b g), b the batches.

    Li et al., "ZiCo", ICLR 2023, arXiv 2301.11300. Weights whose gradient is the same in all
    batches are left out, and layers of nothing else.

    Raises:
        InputError: fewer than two batches.
    """
    if len(batches) < 2:
        raise InputError("batches", len(batches), "two or more for zico")
    by_batch = [_gradient(module, [batch]) for batch in batches]
    total = 0.0
    for gradients in zip(*by_batch, strict=True):
        stacked = torch.stack(gradients).double()
        deviation = stacked.std(0, correction=0)
        varies = deviation > 0
        ratio = (stacked.abs().mean(0)[varies] / deviation[varies]).sum().item()
        if ratio > 0:
            total += math.log(ratio)
    return total


def _count(batches: Sequence[Batch]) -> int:
    return sum(len(labels) for _, labels in batches)


def _gradient(module: nn.Module, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Return the mean gradient by the weights of layers."""
    chosen, count = weights(module), _count(batches)
    total = [torch.zeros_like(weight) for weight in chosen]
    for inputs, labels in batches:
        found = derivatives(F.cross_entropy(module(inputs), labels), chosen)
        for sum_, gradient in zip(total, found, strict=True):
            sum_.add_(gradient, alpha=len(labels) / count)
    return [each.detach() for each in total]

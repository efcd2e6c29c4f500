"""Proxies that see no data: the flow through a network, its size, its weights."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from hansa.models.derivatives import derivatives
from hansa.search.proxies.gradients import Batch, layers, weights


def synflow(module: nn.Module, batches: Sequence[Batch]) -> float:
    """Return log sum |w dR/dw| for R the sum of outputs on ones, all parameters by their size.

    Tanaka et al., "Pruning neural networks without any data", arXiv 2006.05467. Norms pass on what
    they are given, and all is float64, since R grows fast with depth. Minus infinity where nothing
    flows. It measures depth first.
    """
    own = module.double().eval()
    with torch.no_grad():
        for tensor in own.state_dict().values():
            tensor.abs_()
    for each in own.modules():
        if isinstance(each, _NormBase | nn.GroupNorm | nn.LayerNorm):
            each.register_forward_hook(lambda _, inputs, __: inputs[0])
    ones = torch.ones_like(batches[0][0][:1], dtype=torch.float64)
    chosen = weights(own)
    pairs = zip(chosen, derivatives(own(ones).sum(), chosen), strict=True)
    total = sum((weight.detach() * slope).abs().sum().item() for weight, slope in pairs)
    return math.log(total) if total > 0 else -math.inf


def params(module: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the number of parameters."""
    return float(sum(parameter.numel() for parameter in module.parameters()))


def flops(module: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the multiply-adds of convolutions and linear layers for one input."""
    total = 0

    def add(layer: nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal total
        fan_in = layer.weight[0].numel()  # type: ignore[index]
        total += output.numel() * fan_in

    for layer in layers(module):
        layer.register_forward_hook(add)
    with torch.no_grad():
        module.eval()(batches[0][0][:1])
    return float(total)


def l2_norm(module: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the sum over layers of ||w||."""
    return float(sum(weight.detach().norm().item() for weight in weights(module)))

"""A model with fewer channels than its class builds: how many, and how to get there again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from hansa.errors import InputError

Channels = Mapping[str, Mapping[str, int]]
"""Layer -> its sizes by their names in PyTorch: in_channels, out_channels, groups, ..."""

_SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    _ConvNd: ("in_channels", "out_channels", "groups"),
    nn.Linear: ("in_features", "out_features"),
    _BatchNorm: ("num_features",),
}
RESIZABLE = tuple(_SIZES)


def channels_of(model: nn.Module) -> dict[str, dict[str, int]]:
    """Return the sizes of every convolution, linear layer and BatchNorm of a model."""
    return {
        path: {key: getattr(module, key) for key in _keys(module)}
        for path, module in model.named_modules()
        if isinstance(module, RESIZABLE)
    }


def resize(model: nn.Module, channels: Channels) -> None:
    """Cut a model's layers to given sizes, in place; of each tensor the first entries stay.

    Raises:
        InputError: a layer that is not there, or sizes that it cannot be cut to.
    """
    layers = dict(model.named_modules())
    for path, sizes in channels.items():
        module = layers.get(path)
        key = f"architecture.channels.{path}"
        if not isinstance(module, RESIZABLE):
            raise InputError(key, "a layer that the model does not have", "its own layers")
        if set(sizes) != set(_keys(module)) or not all(
            type(size) is int and 0 < size <= getattr(module, name) for name, size in sizes.items()
        ):
            allowed = {name: getattr(module, name) for name in _keys(module)}
            raise InputError(key, dict(sizes), f"at most {allowed}")
        for name, size in sizes.items():
            setattr(module, name, size)
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or not tensor.dim():
                continue
            cut = tensor.detach()[tuple(slice(size) for size in _shape(module, tensor))].clone()
            if isinstance(tensor, nn.Parameter):
                module._parameters[name] = nn.Parameter(cut, tensor.requires_grad)
            else:
                module._buffers[name] = cut


def _keys(module: nn.Module) -> tuple[str, ...]:
    return next(keys for kind, keys in _SIZES.items() if isinstance(module, kind))


def _shape(module: Any, tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the shape that a tensor of a layer has at the layer's sizes."""
    if isinstance(module, nn.Linear):
        whole: tuple[int, ...] = (module.out_features, module.in_features)
    elif isinstance(module, _BatchNorm):
        whole = (module.num_features,)
    else:
        first, second = module.out_channels, module.in_channels // module.groups
        if module.transposed:
            first, second = module.in_channels, module.out_channels // module.groups
        if tensor.dim() == 1:
            return (module.out_channels,)
        return (first, second, *tensor.shape[2:])
    return whole[: tensor.dim()]

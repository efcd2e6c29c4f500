"""Masks as part of a model.

A mask is a parametrization (``torch.nn.utils.parametrize``): whoever reads the weight gets it
masked, and its gradient is zero where the mask is. Since masked entries start at zero, momentum and
weight decay find nothing there to move.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from hansa.errors import InputError


class Mask(nn.Module):
    """Zero where the mask is False.

    Args:
        mask: bool tensor of the weight's shape, True where an entry is kept.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask: torch.Tensor
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the masked weight."""
        return torch.where(self.mask, weight, 0.0)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """Return what is stored for a weight that is set."""
        return self.forward(weight)


def attach(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> nn.Module:
    """Make masks part of a model, in place, and return it.

    It can then be copied, saved by ``state_dict``, called by ``functional_call``, mapped by
    ``vmap`` and trained by any optimizer; make the optimizer after this. In the state a masked
    ``layer.weight`` is ``layer.parametrizations.weight.original`` and ``....0.mask``.

    Args:
        model: any module.
        masks: parameter name -> bool tensor, True where an entry is kept.

    Raises:
        InputError: a name or shape that the model does not have, a model that has masks already,
            or a tied parameter.
    """
    if masks_of(model):
        raise InputError("model", "masks already attached", "a model without; finalise it first")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = tied_parameters(model)
    for name, mask in masks.items():
        if name not in parameters:
            raise InputError(f"masks.{name}", "no such parameter", ", ".join(list(parameters)[:6]))
        parameter = parameters[name]
        if mask.shape != parameter.shape or mask.dtype is not torch.bool:
            found = f"{mask.dtype} {tuple(mask.shape)}"
            raise InputError(f"masks.{name}", found, f"torch.bool {tuple(parameter.shape)}")
        if id(parameter) in tied:
            raise InputError(f"masks.{name}", "a tied parameter", "one of its own; exclude it")
    for name, mask in masks.items():
        owner, _, attribute = name.rpartition(".")
        device = parameters[name].device
        parametrize.register_parametrization(
            model.get_submodule(owner), attribute, Mask(mask.detach().clone().to(device))
        )
    return model


def tied_parameters(model: nn.Module) -> set[int]:
    """Return the ids of parameters that several modules, or several names of one, hold."""
    held = [
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    ]
    return {key for key, times in Counter(held).items() if times > 1}


def masks_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the masks that are part of a model: parameter name -> bool tensor."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for name, steps in module.parametrizations.items():
            for step in steps:
                if isinstance(step, Mask):
                    found[f"{path}.{name}" if path else name] = step.mask
    return found


def finalise(model: nn.Module) -> dict[str, torch.Tensor]:
    """Make a model's masks permanent, in place: plain weights with zeros. Return the masks."""
    masks = masks_of(model)
    for name in masks:
        owner, _, attribute = name.rpartition(".")
        parametrize.remove_parametrizations(
            model.get_submodule(owner), attribute, leave_parametrized=True
        )
    return masks

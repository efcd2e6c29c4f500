"""What a phase that was interrupted goes on from: one file, there whole or not at all."""

import json
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hansa.errors import InputError
from hansa.files import write_atomic

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def keep(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: Sequence[dict[str, float]],
    rank: int = 0,
) -> None:
    """Write parameters, AdamW's moments, and the history that the number of steps is told by."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"parameter/{name}"] = full(parameter)
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}/{name}"] = full(value)
    if rank == 0:
        held = {name: tensor.contiguous() for name, tensor in tensors.items()}
        about = {"history": json.dumps(list(history))}
        write_atomic(path, safetensors.torch.save(held, about))


def take(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """Put what ``keep`` wrote into a model and its optimizer, and return the history.

    Raises:
        InputError: a file that is none, or that of another model.
    """
    try:
        with safe_open(path, "pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            history: list[dict[str, float]] = json.loads(file.metadata()["history"])
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError(str(path), "no checkpoint", "a checkpoint, or no file") from error
    for name, parameter in model.named_parameters():
        value = held.get(f"parameter/{name}")
        if value is None or value.shape != parameter.shape:
            raise InputError(str(path), "another model's checkpoint", "this model's, or no file")
        with torch.no_grad():
            parameter.copy_(_like(value, parameter))
        state = {moment: held.get(f"{moment}/{name}") for moment in _MOMENTS}
        if state["step"] is not None:
            optimizer.state[parameter] = {
                moment: value if moment == "step" else _like(value, parameter)
                for moment, value in state.items()
                if value is not None
            }
    return history


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whole and on the CPU, where ranks hold parts of it."""
    whole = tensor.detach()
    return (whole.full_tensor() if isinstance(whole, DTensor) else whole).cpu().clone()


def _like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)

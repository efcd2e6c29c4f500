"""Tensors from bytes: safetensors and nothing else, so that no file of tensors runs code."""

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from hansa.untrusted import read_bytes


def tensors_of(data: bytes) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file by name.

    The library compares the sizes that a header declares with the bytes that follow it, before it
    hands out anything, so no more is held than the bytes are long.

    Raises:
        ValueError: the bytes are no such file, or hold a type of numbers that PyTorch has not.
    """
    try:
        found: dict[str, torch.Tensor] = safetensors.torch.load(data)
    except (SafetensorError, OverflowError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"malformed tensors: {error}") from error
    return found


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by name.

    Raises:
        OSError: it cannot be read, or is no ordinary file.
        ValueError: it holds something else.
    """
    return tensors_of(read_bytes(path))

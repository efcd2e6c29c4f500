"""What runs a model: PyTorch, or onnxruntime on the model's export."""

from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import nn

from hansa.errors import InputError
from hansa.models.onnx import TOLERANCE, check_packages, difference, runner, to_onnx
from hansa.search.profile.rounds import Runner


def torch_runner(module: nn.Module, inputs: torch.Tensor, threads: int) -> Runner:
    """Return what runs a module in evaluation mode on its inputs, without gradients.

    The number of threads is the process's: whoever measures sets it.
    """
    module = module.to(inputs.dtype).eval()

    def run() -> torch.Tensor:
        with torch.inference_mode():
            outputs: torch.Tensor = module(inputs)
        return outputs

    return run


def onnx_runner(module: nn.Module, inputs: torch.Tensor, threads: int) -> Runner:
    """Return what runs a module's ONNX export in onnxruntime, once its outputs were compared.

    Raises:
        InputError: packages are missing, inputs are not float32, or outputs differ by over 1e-4.
    """
    check_packages("backend", "torch")
    if inputs.dtype != torch.float32:
        found = f"onnxruntime with inputs of {inputs.dtype}"
        raise InputError("backend", found, "float32, or torch")
    module = module.eval()
    run = runner(to_onnx(module, inputs), threads)
    far = difference(run, module, inputs)
    if not far <= TOLERANCE:
        found = f"onnxruntime, whose outputs differ from PyTorch's by {far:.2g}"
        raise InputError("backend", found, f"at most {TOLERANCE} relative to the largest")
    return lambda: run(inputs)


BACKENDS: dict[str, Callable[[nn.Module, torch.Tensor, int], Runner]] = {
    "torch": torch_runner,
    "onnxruntime": onnx_runner,
}


def backend_version(name: str) -> str:
    """Return the version of a backend's package."""
    return version(name)

"""What runs a model: PyTorch, or onnxruntime on the model's export."""

import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import nn

from hansa.errors import InputError
from hansa.search.profile.rounds import Runner

_TOLERANCE = 1e-4  # of the export's outputs, relative to the largest or to 1


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
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        found = f"onnxruntime, without the package {error.name!r}"
        raise InputError("backend", found, "pip install hansa[search], or torch") from error
    if inputs.dtype != torch.float32:
        found = f"onnxruntime with inputs of {inputs.dtype}"
        raise InputError("backend", found, "float32, or torch")
    module = module.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own use of what PyTorch deprecates
        program: Any = torch.onnx.export(module, (inputs,), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: inputs.numpy()}

    def run() -> Any:
        return session.run(None, feed)[0]

    with torch.inference_mode():
        expected = module(inputs).numpy()
    difference = float(np.abs(run() - expected).max())
    if not difference <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        found = f"onnxruntime, whose outputs differ from PyTorch's by {difference:.2g}"
        raise InputError("backend", found, f"at most {_TOLERANCE} relative to the largest")
    return run


BACKENDS: dict[str, Callable[[nn.Module, torch.Tensor, int], Runner]] = {
    "torch": torch_runner,
    "onnxruntime": onnx_runner,
}


def backend_version(name: str) -> str:
    """Return the version of a backend's package."""
    return version(name)

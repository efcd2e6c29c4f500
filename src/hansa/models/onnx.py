"""Models for other runtimes: their form in ONNX, what runs it, and whether it says the same."""

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from hansa.errors import InputError, first_line

OPSET = 18
"""Version of ONNX's operators in which models are written."""
TOLERANCE = 1e-4
"""Most difference of outputs from PyTorch's, relative to the largest of them or to 1."""
Outputs = np.ndarray[Any, np.dtype[np.float32]]
Runs = Callable[[torch.Tensor], Outputs]


def check_packages(key: str, instead: str) -> None:
    """Refuse work for which packages are missing.

    Args:
        key: what asked for it.
        instead: what would need none of them.

    Raises:
        InputError: naming the first that is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        found = f"onnxruntime, without the package {error.name!r}"
        raise InputError(key, found, f"pip install hansa[search], or {instead}") from error


def to_onnx(
    module: nn.Module,
    inputs: torch.Tensor,
    sizes: Mapping[int, Any] | None = None,
    about: Mapping[str, str] | None = None,
) -> bytes:
    """Return a module in ONNX, from ``inputs`` to ``logits``, as it is in evaluation mode.

    Args:
        module: the module, which is put into evaluation mode.
        inputs: what it is followed on.
        sizes: dimension of the inputs -> ``torch.export.Dim``, where it may be another one.
        about: what is to stand in the model's metadata.

    Raises:
        InputError: a module that cannot be written so.
    """
    module = module.eval()
    # It warns of every library that is not there and that no model here uses.
    told = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = told.level
    told.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own use of what PyTorch deprecates
            program: Any = torch.onnx.export(
                module,
                (inputs,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["inputs"],
                output_names=["logits"],
                dynamic_shapes=(dict(sizes),) if sizes else None,
            )
        proto = program.model_proto
        for key, value in (about or {}).items():
            proto.metadata_props.add(key=key, value=value)
        written: bytes = proto.SerializeToString()
    # What cannot be written is one of these; so is a model of more than 2 GB.
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(
            "model", f"one that ONNX has no form for ({first_line(error)})", "another model"
        ) from error
    finally:
        told.setLevel(level)
    return written


def runner(written: bytes, threads: int = 1) -> Runs:
    """Return what runs a model in onnxruntime, from inputs to logits.

    Args:
        written: what ``to_onnx`` returned.
        threads: of the processor.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"])

    def run(inputs: torch.Tensor) -> Outputs:
        outputs: Outputs = session.run(None, {"inputs": inputs.numpy()})[0]
        return outputs

    return run


def difference(run: Runs, module: nn.Module, inputs: torch.Tensor) -> float:
    """Return the largest difference of outputs from the module's own; infinite where shapes differ.

    It is relative to the largest output, where that is above 1.
    """
    with torch.inference_mode():
        expected = module(inputs).numpy()
    found = run(inputs)
    if found.shape != expected.shape:
        return float("inf")
    largest = max(1.0, float(np.abs(expected).max()))
    return float(np.abs(found - expected).max()) / largest

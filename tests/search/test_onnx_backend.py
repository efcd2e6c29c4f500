"""Models in onnxruntime give PyTorch's outputs, or none."""

import sys
from importlib.metadata import version

import pytest
import torch
from torch import nn

from hansa.errors import InputError
from hansa.search.profile import ProfileOptions, profile
from hansa.search.profile.backends import BACKENDS, onnx_runner, torch_runner

_NEEDED = ("onnx", "onnxruntime", "onnxscript")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _NEEDED:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"the package 'onnx'.*pip install hansa\[search\]"):
        onnx_runner(network(), torch.zeros(1, 1, 4, 4), 1)


@pytest.mark.slow(25)
def test_outputs_are_those_of_pytorch() -> None:
    for name in _NEEDED:
        pytest.importorskip(name)
    module, inputs = network(), torch.randn(2, 1, 4, 4)
    made = torch.from_numpy(onnx_runner(module, inputs, 1)())
    assert torch.allclose(made, module.eval()(inputs), atol=1e-5)
    with pytest.raises(InputError, match="bfloat16"):
        onnx_runner(network(), inputs.bfloat16(), 1)


def test_rows_name_their_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what stands in for an export, which takes seconds."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(BACKENDS, "onnxruntime", torch_runner)
    options = ProfileOptions(device="box", backend="onnxruntime", batches=(2,), force=True)
    (row,) = profile([(3, network)], (1, 4, 4), options.model_copy(update={"retries": 0}))
    assert row.key == (3, "box", "onnxruntime", 2, 1, "float32")
    assert row.backend_version == version("onnxruntime")


def test_other_outputs_are_refused() -> None:
    for name in _NEEDED:
        pytest.importorskip(name)

    class Turns(nn.Module):
        """Adds one only while it is not being traced."""

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs if torch.compiler.is_compiling() else inputs + 1

    with pytest.raises(InputError, match=r"outputs differ from PyTorch's by 1"):
        onnx_runner(Turns(), torch.zeros(1, 2), 1)

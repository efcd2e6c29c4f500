"""Proxies by how differently a network treats the samples, in training mode, without labels.

The samples of all batches go through the network together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hansa.search.proxies.gradients import Batch

_SMALL = 1e-5  # added to eigenvalues, as in arXiv 2101.08134


def jacob_cov(module: nn.Module, batches: Sequence[Batch]) -> float:
    """Return -sum(log(v + k) + 1/(v + k)), k = 1e-5, over eigenvalues v of a correlation matrix.

    It is that of the samples' derivatives d(sum of logits)/dx (Mellor et al., "Neural Architecture
    Search without Training", first version, arXiv 2006.04647v1). nan where one has no variance.
    """
    inputs = _together(batches).clone().requires_grad_(True)
    (slopes,) = torch.autograd.grad(module(inputs).sum(), inputs)
    rows = slopes.flatten(1).double()
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True)
    correlation = rows @ rows.T
    if not correlation.isfinite().all():
        return float("nan")
    values = torch.linalg.eigvalsh(correlation).clamp(min=0) + _SMALL
    return -float((values.log() + 1 / values).sum().item())


def naswot(module: nn.Module, batches: Sequence[Batch]) -> float:
    """Return log |det K|, K[i, j] = how many ReLUs are on or off alike for samples i and j.

    Mellor et al., "Neural Architecture Search without Training", ICML 2021, arXiv 2006.04647.
    Every ReLU counts, be it a module or a call. Minus infinity where two samples are not told
    apart, as without any ReLU.
    """
    inputs = _together(batches)
    with torch.no_grad(), _Agreement(len(inputs)) as agreement:
        module(inputs)
    return float(torch.linalg.slogdet(agreement.kernel).logabsdet.item())


def _together(batches: Sequence[Batch]) -> torch.Tensor:
    return torch.cat([inputs for inputs, _ in batches]).detach()


class _Agreement(TorchDispatchMode):
    """Adds up, over the ReLUs inside the block, how many units agree for each two samples."""

    _relus = (
        torch.ops.aten.relu.default,
        torch.ops.aten.relu_.default,
        torch.ops.aten.hardtanh.default,  # ReLU6
        torch.ops.aten.hardtanh_.default,
    )

    def __init__(self, num: int) -> None:
        super().__init__()
        self.kernel = torch.zeros(num, num, dtype=torch.float64)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in self._relus:
            on = (output > 0).flatten(1).double()
            self.kernel += (on @ on.T + (1 - on) @ (1 - on).T).to(self.kernel.device)
        return output

"""SWAT in a federation: sparse local training, everything sent.

Raihan and Aamodt, "Sparse Weight Activation Training", NeurIPS 2020; the "full model" rows of
Qiu et al., "ZeroFL: Efficient On-Device Training for Federated Learning with Local Sparsity",
ICLR 2022 (arXiv 2208.02507), Table 1.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from hansa.federation.message import Tensors
from hansa.federation.methods.sparse import SparseTraining
from hansa.federation.node import Setup
from hansa.sparse.convert import SparseModel, sparsify
from hansa.sparse.thresholds import keep, threshold


class Swat(SparseTraining):
    """FedAvg whose clients compute with each layer's largest weights, and move all of them.

    The common model stays dense; it is evaluated with the largest (1 - sparsity) weights of every
    sparse layer, as it was trained.
    """

    name: ClassVar[str] = "swat"
    sparsity: float = Field(0.9, ge=0, lt=1, strict=True)
    """Share of each sparse layer's weights that is not used."""
    inputs: float | None = Field(None, ge=0, lt=1, strict=True)
    """Share of a layer's inputs that the weight's gradient leaves out; by default ``sparsity``."""
    gradient: Literal["swat", "mask"] = "swat"
    """``mask``: weights that are not used get no gradient. Faster, and no longer SWAT."""

    def sparsified(self, model: nn.Module, batch_size: int) -> SparseModel:
        """Return the model with layers of this sparsity."""
        return sparsify(
            model,
            self.sparsity,
            inputs=self.inputs,
            sparse=self.sparse,
            refresh=self.refresh,
            fixed=self.gradient == "mask",
            path=self.path,
            batch_size=batch_size,
        )

    def evaluated(self, setup: Setup, weights: Tensors) -> dict[str, torch.Tensor]:
        """Return the largest weights of each layer, and zeros."""
        return {name: largest(weight, self.sparsity) for name, weight in weights.items()}


def largest(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Return a tensor with its largest entries, and zeros."""
    return torch.where(keep(weight, threshold(weight, sparsity)), weight, 0.0)

"""Scorers by the gradient or curvature at the initial weights, and those that see no data."""

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch.func import functional_call

from hansa.errors import InputError
from hansa.models.derivatives import derivatives
from hansa.models.task import Tensors
from hansa.pruning.objective import Batch, Objective, mean
from hansa.pruning.scorer import GradientScorer, Scorer
from hansa.seeding import generator


class Snip(GradientScorer):
    """|weight x gradient|: Lee et al., "SNIP", ICLR 2019, arXiv 1810.02340, equation 6.

    With several iterations it is Iterative SNIP (de Jorge et al., arXiv 2006.09081, section 4):
    scored again on what is left, and never taking back.
    """

    name: ClassVar[str] = "snip"
    batches: int = Field(1, ge=1, strict=True)
    """Batches over which the gradient is averaged."""

    @property
    def num_batches(self) -> int:
        """Batches that one scoring takes."""
        return self.batches

    def derivative(self, objective: Objective, batches: Sequence[Batch]) -> Tensors:
        """Return the mean gradient."""
        return mean((objective.gradient(objective.params, b), len(b[1])) for b in batches)


class Force(Snip):
    """|initial weight x gradient of the masked network|: FORCE, arXiv 2006.09081, section 4.

    Pruned weights take part in the gradient and may come back. With one iteration it is SNIP.
    """

    name: ClassVar[str] = "force"
    nested: ClassVar[bool] = False


class Grasp(Scorer):
    """Weight x (Hessian x gradient): Wang et al., "GraSP", ICLR 2020, arXiv 2002.07376, section 4.

    Signed: kept are the weights whose removal would lessen the gradient's norm most. Gradient and
    Hessian are those of the prunable weights alone.
    """

    name: ClassVar[str] = "grasp"
    batches: int = Field(1, ge=1, strict=True)
    """Batches over which gradient and product are averaged."""
    temperature: float = Field(200.0, gt=0)
    """Divides the logits."""

    @property
    def num_batches(self) -> int:
        """Batches that one scoring takes."""
        return self.batches

    def scores(self, objective: Objective, batches: Sequence[Batch], seed: int = 0) -> Tensors:
        """Return weight x (Hessian x gradient)."""
        params = objective.params
        soft = objective.tempered(self.temperature)
        gradient = mean((soft.gradient(params, b), len(b[1])) for b in batches)
        chosen = set(objective.names)
        vector = {n: g if n in chosen else torch.zeros_like(g) for n, g in gradient.items()}
        product = mean((soft.product(params, vector, b), len(b[1])) for b in batches)
        return {name: params[name] * product[name] for name in objective.names}


class SynFlow(Scorer):
    """How much each weight takes part in the flow from input to output, without data.

    Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic
    flow", NeurIPS 2020, arXiv 2006.05467, section 6: all weights by their absolute value, an input
    of ones, evaluation mode; the score is |dR/dw w| for R the sum of the outputs. It is meant for
    many iterations. Computed in float64, since R grows fast with depth and width. The flow is
    conserved from layer to layer where normalisation is linear, as BatchNorm in evaluation mode;
    GroupNorm and LayerNorm rescale it, so there the scores of layers are less comparable.
    """

    name: ClassVar[str] = "synflow"
    needs_data: ClassVar[bool] = False

    @property
    def num_batches(self) -> int:
        """One batch, of which only the shape of an input is used."""
        return 1

    def scores(self, objective: Objective, batches: Sequence[Batch], seed: int = 0) -> Tensors:
        """Return |dR/dw w| in float64.

        Raises:
            InputError: inputs that are no real numbers, or a flow too large for float64.
        """
        inputs = batches[0][0]
        if not inputs.is_floating_point():
            raise InputError("method", f"synflow on inputs of {inputs.dtype}", "real inputs")
        model = copy.deepcopy(objective.model).double().eval()
        params = {n: p.detach().double().abs() for n, p in model.named_parameters()}
        params |= {n: p.double().abs() for n, p in objective.params.items()}
        params = {n: p.requires_grad_() for n, p in params.items()}
        buffers = {n: b.abs() if b.is_floating_point() else b for n, b in model.named_buffers()}
        ones = torch.ones((1, *inputs.shape[1:]), dtype=torch.float64, device=inputs.device)
        flow = functional_call(model, {**params, **buffers}, (ones,)).sum()
        if not flow.isfinite():
            raise InputError("method", f"synflow with a flow of {flow.item()}", "another method")
        chosen = [params[name] for name in objective.names]
        found = derivatives(flow, chosen)
        return {
            name: (weight * derivative).abs().detach()
            for name, weight, derivative in zip(objective.names, chosen, found, strict=True)
        }


class Magnitude(Scorer):
    """|weight|."""

    name: ClassVar[str] = "magnitude"
    needs_data: ClassVar[bool] = False

    def scores(self, objective: Objective, batches: Sequence[Batch], seed: int = 0) -> Tensors:
        """Return |weight|."""
        return {name: objective.params[name].abs() for name in objective.names}


class Random(Scorer):
    """A number drawn for each weight."""

    name: ClassVar[str] = "random"
    needs_data: ClassVar[bool] = False

    def scores(self, objective: Objective, batches: Sequence[Batch], seed: int = 0) -> Tensors:
        """Return uniform numbers, the same in every iteration."""
        return {
            name: torch.rand(p.shape, generator=generator(seed, "prune", name)).to(p.device)
            for name, p in objective.params.items()
            if name in objective.names
        }

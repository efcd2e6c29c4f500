"""RMU: steer one layer's states of restricted text to a random vector (Li et al., 2403.03218)."""

from typing import Literal

import torch
from pydantic import Field

from hansa.errors import InputError
from hansa.safeguard.losses import steering
from hansa.safeguard.models import layers_of, width_of
from hansa.safeguard.phases.base import Phase
from hansa.safeguard.setup import Advance, Metrics, Setup


class RMU(Phase):
    """Representation Misdirection for Unlearning."""

    kind: Literal["rmu"] = "rmu"
    layer: int | None = Field(None, ge=0, strict=True)
    """The layer that is steered, from 0; by default the middle one. It and the two before it are
    trained."""
    coefficient: float = Field(20.0, gt=0)
    """Length of the random vector."""
    alpha: float = Field(100.0, ge=0)
    """What keeping the states of retained text counts."""

    def begin(self, setup: Setup) -> Advance:
        """Return a step on both, of which three layers keep the gradient."""
        layers = layers_of(setup.model)
        layer = len(layers) // 2 if self.layer is None else self.layer
        if layer >= len(layers):
            raise InputError("phases.layer", layer, f"0 to {len(layers) - 1}")
        trained = {
            id(p) for part in list(layers)[max(0, layer - 2) : layer + 1] for p in part.parameters()
        }
        width = width_of(setup.model)
        target = torch.rand(width, generator=setup.rng("target")).to(setup.device)
        target = self.coefficient * target / target.norm()

        def advance(step: int) -> Metrics:
            rows = setup.rows("forget", self.batch_size, step)
            steered = steering(setup.run(rows, hidden=True).hidden[layer + 1], target, rows)
            steered.backward()
            rows = setup.rows("retain", self.batch_size, step)
            wanted = setup.refer(rows, hidden=True).hidden[layer + 1]
            kept = steering(setup.run(rows, hidden=True).hidden[layer + 1], wanted, rows)
            (self.alpha * kept).backward()
            for parameter in setup.params:
                if id(parameter) not in trained:
                    parameter.grad = None
            return {"steering": steered.item(), "retain": kept.item()}

        return advance

    def step_cost(self) -> float:
        """Return 2 1/3: the reference's forward pass is a third of a step."""
        return 2 + 1 / 3

"""Unlearn, noise, distil: after UNDO (Lee et al., arXiv 2506.06278).

A first phase hides what a model knows; the weights still hold it, which is why a few steps bring
it back. Here they are mixed with noise, and the result learns again what the hidden model *says*:
what it did not say is not in the lesson.
"""

import copy
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from hansa.errors import InputError
from hansa.safeguard.losses import distance
from hansa.safeguard.phases.base import Phase, Rate, Share, Size, Steps
from hansa.safeguard.setup import Advance, Metrics, Setup


class NoiseDistil(Phase):
    """Weights become (1 - noise) W + noise N, and are then distilled from the model before."""

    kind: Literal["noise_distil"] = "noise_distil"
    noise: float = Field(0.6, ge=0, le=1)
    """Share of the noise; with 1 the student starts from nothing."""
    forget: float = Field(0.0, ge=0, lt=1)
    """Share of each batch that is restricted text, where the teacher is to be followed, too."""
    steps: Steps = 600
    lr: Rate = 2e-3
    warm_up: Steps = 50
    lr_end: Share = 0.02
    batch_size: Size = 64

    def prepare(self, setup: Setup) -> None:
        """Mix the matrices with noise of Xavier's deviation (Glorot and Bengio, 2010)."""
        with torch.no_grad():
            for number, parameter in enumerate(setup.params):
                if parameter.dim() < 2:
                    continue
                noise = torch.empty(parameter.shape)
                nn.init.xavier_normal_(noise, generator=setup.rng("noise", number))
                parameter.lerp_(noise.to(parameter), self.noise)

    def begin(self, setup: Setup) -> Advance:
        """Return a step towards the model as the phase finds it."""
        if setup.ranks > 1:
            raise InputError("phases.kind", "'noise_distil' on several processes", "one process")
        teacher = copy.deepcopy(setup.model).requires_grad_(False).eval()
        other = round(self.forget * self.batch_size)

        def advance(step: int) -> Metrics:
            rows = setup.rows("retain", self.batch_size - other, step)
            if other:
                rows = rows.joined(setup.rows("forget", other, step))
            with torch.no_grad():
                wanted = teacher(input_ids=rows.tokens, attention_mask=rows.mask.long()).logits
            loss = distance(setup.run(rows).logits, wanted, rows)
            loss.backward()
            return {"distance": loss.item()}

        return advance

    def step_cost(self) -> float:
        """Return 1 1/3: the teacher's forward pass is a third of a step."""
        return 1 + 1 / 3

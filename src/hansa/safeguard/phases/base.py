"""The contract of a phase: it adds one step's gradients, and the loop does the rest."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.distributed.tensor import DTensor

from hansa.safeguard.losses import drift, next_token
from hansa.safeguard.setup import Advance, Metrics, Setup

# As types, since a default of a phase's own would drop limits that stand with the field.
Steps = Annotated[int, Field(ge=0, strict=True)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Size = Annotated[int, Field(ge=1, strict=True)]
Share = Annotated[float, Field(ge=0, le=1)]


class Phase(BaseModel, ABC):
    """A part of a safeguard's training, a frozen value of options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    """What a configuration calls it."""
    steps: Steps = 150
    """Optimizer steps."""
    lr: Rate = 1e-3
    """Rate of AdamW, which is reached after the warm-up."""
    warm_up: Steps = 15
    """Steps of linear warm-up."""
    lr_end: Share = 1.0
    """Share of the rate that is left at the last step, falling linearly from the first."""
    batch_size: Size = 32
    """Rows of each batch of what is kept, and of what is not."""
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False)
    max_norm: float | None = Field(None, gt=0)
    """Most that the norm of the whole gradient may be; more is scaled down."""

    is_pretraining: ClassVar[bool] = False
    """Whether it makes the model that a safeguard starts from, and is no part of the safeguard."""

    @abstractmethod
    def begin(self, setup: Setup) -> Advance:
        """Return what advances by one step; the model is as the phase finds it."""

    def prepare(self, setup: Setup) -> None:
        """Change the model before the first step; a phase that is resumed does not."""

    def cost(self) -> float:
        """Return what the phase costs, in plain steps: forward and backward of one batch each."""
        return self.steps * self.step_cost()

    @abstractmethod
    def step_cost(self) -> float:
        """Return what one of its steps costs, in plain steps."""

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, by its number from 0."""
        warm = min(1.0, (step + 1) / self.warm_up) if self.warm_up else 1.0
        return self.lr * warm * (1 - (1 - self.lr_end) * step / max(1, self.steps))


def retain(
    setup: Setup,
    size: int,
    step: int,
    *,
    weight: float = 1.0,
    representations: bool = False,
    with_padding: bool = False,
) -> Metrics:
    """Add the gradient of what should be kept, and tell its parts.

    It is the cross-entropy of retained text, and with ``representations`` how far hidden states
    have drifted from the reference's (TAR, section 3.2).
    """
    rows = setup.rows("retain", size, step)
    found = setup.run(rows, hidden=representations)
    loss = next_token(found.logits, rows)
    metrics = {"retain": loss.item()}
    if representations:
        wanted = setup.refer(rows, hidden=True)
        moved = drift(found.hidden, wanted.hidden, rows, with_padding)
        metrics["drift"] = moved.item()
        loss = loss + moved
    (weight * loss).backward()
    return metrics


def norm(tensors: Iterable[torch.Tensor]) -> float:
    """Return the Euclidean norm of tensors together, of all ranks' parts of them."""
    whole = torch.nn.utils.get_total_norm(list(tensors))
    return float(whole.full_tensor() if isinstance(whole, DTensor) else whole)


def gradients(setup: Setup) -> list[torch.Tensor]:
    """Return the gradients that there are."""
    return [p.grad for p in setup.params if p.grad is not None]

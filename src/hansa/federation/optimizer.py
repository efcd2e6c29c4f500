"""Local optimizers as pure functions of tensors, so that clients can be stepped in stacks.

A mask restrains the update itself and the optimizer's memory, not only the gradient: momentum and
weight decay never move a masked entry.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hansa.federation.message import Tensors

Memory = dict[str, dict[str, torch.Tensor]]


class Training(BaseModel):
    """How a client trains: the optimizer and the size of one round's local work."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0, allow_inf_nan=False, strict=True)
    """Learning rate."""
    lr_end: float | None = Field(None, gt=0, allow_inf_nan=False, strict=True)
    """Learning rate of round ``lr_rounds``, to which it falls by one factor per round."""
    lr_rounds: int | None = Field(None, ge=2, strict=True)
    """Rounds in which it does so; from then on it stays at ``lr_end``."""
    momentum: float = Field(0.0, ge=0, lt=1, strict=True)
    """Momentum of SGD; reset at the start of every round, as all optimizer memory is."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, strict=True)
    """L2 penalty (sgd, adam) or decoupled decay (adamw)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's two moments."""
    epsilon: float = Field(1e-8, gt=0, allow_inf_nan=False, strict=True)
    """Added to Adam's denominator."""
    clip_norm: float | None = Field(None, gt=0, allow_inf_nan=False, strict=True)
    """Euclidean norm over all gradients, of masked entries as well, to which they are cut down."""
    epochs: int = Field(1, ge=1, lt=2**31, strict=True)
    """Local passes over a client's training data per round."""
    steps: int | None = Field(None, ge=1, lt=2**31, strict=True)
    """Local steps that stand for one such pass: so many full batches, and each round goes on where
    the one before it ended, whether the client was asked in that or not. By default a pass is one
    over all data."""
    batch_size: int = Field(32, ge=1, lt=2**31, strict=True)
    """Samples per local step; the last batch of an epoch may be smaller."""

    @model_validator(mode="after")
    def _fits(self) -> "Training":
        if self.momentum and self.optimizer != "sgd":
            raise ValueError("momentum belongs to optimizer 'sgd'; Adam has betas")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must lie in [0, 1)")
        if (self.lr_end is None) != (self.lr_rounds is None):
            raise ValueError("lr_end and lr_rounds go together")
        return self

    def batches(self, samples: int) -> int:
        """Return the local steps of one pass over a client's training samples."""
        if not samples:
            return 0
        return self.steps or -(-samples // self.batch_size)

    def rate(self, number: int) -> float:
        """Return the learning rate of a round t of T: lr (lr_end / lr)^((t - 1) / (T - 1)).

        It is exactly ``lr`` in the first round, and exactly ``lr_end`` in the last one.
        """
        if self.lr_end is None or self.lr_rounds is None:
            return self.lr
        if number >= self.lr_rounds:
            return self.lr_end
        part = (max(number, 1) - 1) / (self.lr_rounds - 1)
        return float(self.lr * (self.lr_end / self.lr) ** part)

    def memory(self, params: Tensors) -> Memory:
        """Return the optimizer's memory before its first step, by name of its part."""
        if self.optimizer == "sgd":
            return {"momentum": _zeros(params)} if self.momentum else {}
        return {"first": _zeros(params), "second": _zeros(params)}

    def update(
        self,
        params: Tensors,
        gradients: Mapping[str, torch.Tensor | None],
        memory: Mapping[str, Tensors],
        mask: Tensors | None = None,
        phase: str = "train",
        rate: torch.Tensor | None = None,
    ) -> tuple[dict[str, torch.Tensor], Memory]:
        """Return parameters and memory after one step.

        Args:
            params: name -> parameter.
            gradients: name -> gradient of equal shape, or None where there is none; a parameter
                without gradient stays as it is.
            memory: what the previous step returned, at first ``memory(params)``.
            mask: name -> bool tensor, True where an entry may move; everything moves without one.
            phase: Adam's bias correction counts the steps of each phase apart, since an entry
                that a phase masks does not live through its steps.
            rate: the learning rate as a tensor, where it is not ``lr`` in every round.
        """
        if self.clip_norm is not None:
            gradients = _clipped(gradients, self.clip_norm)
        out = dict(params)
        new: Memory = {part: dict(tensors) for part, tensors in memory.items()}
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            held = {part: tensors[name] for part, tensors in memory.items() if name in tensors}
            counter = f"{phase}:{name}"
            step = new.get("steps", {}).get(counter, torch.zeros((), dtype=torch.float64)) + 1
            value, after = self._step(params[name], gradient, held, step, rate)
            if mask is not None:
                free = mask[name]
                value = torch.where(free, value, params[name])
                after = {part: torch.where(free, t, held[part]) for part, t in after.items()}
            out[name] = value
            for part, tensor in after.items():
                new[part][name] = tensor
            if self.optimizer != "sgd":
                new.setdefault("steps", {})[counter] = step
        return out, new

    def _step(
        self,
        value: torch.Tensor,
        gradient: torch.Tensor,
        held: Tensors,
        step: torch.Tensor,
        rate: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        lr = self.lr if rate is None else rate.to(value.dtype)
        if self.optimizer == "adamw":
            value = value * (1 - lr * self.weight_decay)
        elif self.weight_decay:
            gradient = gradient + self.weight_decay * value
        if self.optimizer == "sgd":
            if not self.momentum:
                return _minus(value, gradient, lr), {}
            momentum = torch.add(gradient, held["momentum"], alpha=self.momentum)
            return _minus(value, momentum, lr), {"momentum": momentum}
        first = self.betas[0] * held["first"] + (1 - self.betas[0]) * gradient
        second = self.betas[1] * held["second"] + (1 - self.betas[1]) * gradient**2
        unbiased = (second / (1 - self.betas[1] ** step)).sqrt() + self.epsilon
        change = first / (1 - self.betas[0] ** step) / unbiased
        return value - lr * change, {"first": first, "second": second}


def _minus(value: torch.Tensor, change: torch.Tensor, lr: float | torch.Tensor) -> torch.Tensor:
    if isinstance(lr, torch.Tensor):
        return value - lr * change
    return torch.sub(value, change, alpha=lr)


def _clipped(
    gradients: Mapping[str, torch.Tensor | None], most: float
) -> dict[str, torch.Tensor | None]:
    """Return gradients whose common norm is at most ``most``."""
    norms = [torch.linalg.vector_norm(g) for g in gradients.values() if g is not None]
    if not norms:
        return dict(gradients)
    scale = (most / torch.linalg.vector_norm(torch.stack(norms))).clamp(max=1.0)
    return {name: g if g is None else g * scale for name, g in gradients.items()}


def _zeros(params: Tensors) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in params.items()}

"""The attackers that TAR trains against: what they train on, at which rate, and how."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from hansa.errors import InputError
from hansa.safeguard.models import layers_of

Schedule = Literal["constant", "warm_up", "cosine"]
Optimizer = Literal["adamw", "adam", "sgd", "adagrad", "adadelta"]
OPTIMIZERS: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
}


class Adversary(BaseModel):
    """A kind of attacker, of which one is drawn for each inner loop."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Literal["restricted", "benign", "switch"] = "restricted"
    """What it trains on; ``switch`` begins with retained text and goes on with restricted text,
    from step floor(Beta(6, 3) K) on."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """How often it is drawn, relative to the others."""
    lrs: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        (2e-6, 2e-5, 4e-5), min_length=1
    )
    """Learning rates, of which one is drawn."""
    schedule: Schedule = "constant"
    optimizer: Optimizer = "adamw"
    rank: int | None = Field(None, ge=1, strict=True)
    """Rank of the adapters that it trains; by default it trains every weight."""


@dataclass(frozen=True)
class Drawn:
    """One attacker.

    Attributes:
        adversary: its kind.
        lr: its learning rate.
        benign: how many of its first steps are on retained text.
        steps: how many it takes.
    """

    adversary: Adversary
    lr: float
    benign: int
    steps: int

    def rate(self, step: int) -> float:
        """Return its learning rate at a step, by its number from 0."""
        return self.lr * scheduled(self.adversary.schedule, step, self.steps)


def draw(adversaries: Sequence[Adversary], steps: int, seed: int) -> Drawn:
    """Draw an attacker; every process that has the seed draws the same."""
    rng = random.Random(seed)  # noqa: S311 no secret
    chosen = rng.choices(adversaries, [each.weight for each in adversaries])[0]
    lr = rng.choice(chosen.lrs)
    benign = {"restricted": 0, "benign": steps}.get(chosen.data, int(rng.betavariate(6, 3) * steps))
    return Drawn(chosen, lr, benign, steps)


def scheduled(schedule: Schedule, step: int, steps: int) -> float:
    """Return what a rate is multiplied by at a step, by its number from 0.

    A warm-up takes the first tenth of the steps; a cosine falls to nothing after a warm-up.
    """
    warm = max(1, steps // 10)
    if schedule == "constant":
        return 1.0
    if step < warm or schedule == "warm_up":
        return min(1.0, (step + 1) / warm)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def optimizer_of(
    kind: str, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.01
) -> torch.optim.Optimizer:
    """Return one of ``OPTIMIZERS``; the decay is AdamW's alone, and SGD has Nesterov's momentum."""
    options: dict[str, Any] = {}
    if kind == "sgd":
        options = {"momentum": 0.9, "nesterov": True}
    elif kind == "adamw":
        options = {"weight_decay": weight_decay}
    made: torch.optim.Optimizer = OPTIMIZERS[kind](params, lr=lr, **options)
    return made


class Tampering:
    """An attacker at work: it moves a model's parameters along their gradients.

    Args:
        model: the model.
        drawn: the attacker.
        rng: draws the first values of adapters.

    Raises:
        InputError: adapters for a model without linear layers.
    """

    def __init__(self, model: nn.Module, drawn: Drawn, rng: torch.Generator) -> None:
        self._drawn = drawn
        self._adapters: list[_Adapter] = []
        trained = [p for p in model.parameters() if p.requires_grad]
        if rank := drawn.adversary.rank:
            self._adapters = [
                _Adapter(parameter, rank, rng)
                for name, parameter in layers_of(model).named_parameters()
                if parameter.requires_grad and parameter.dim() == 2 and name.endswith("weight")
            ]
            if not self._adapters:
                raise InputError("phases.adversaries.rank", rank, "a model with linear layers")
            trained = [part for each in self._adapters for part in (each.down, each.up)]
        kind = drawn.adversary.optimizer
        self._optimizer = optimizer_of(kind, trained, drawn.lr)

    def step(self, number: int) -> None:
        """Take one step, by its number from 0, along the gradients that the parameters have."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._drawn.rate(number)
        for adapter in self._adapters:
            adapter.take()
        self._optimizer.step()
        for adapter in self._adapters:
            adapter.put()


class _Adapter:
    """W + 2 B A of one weight W, as LoRA trains it, without a second module in the model.

    The gradients of A and B follow from that of the weight as a whole, so that a loss after the
    attack has its gradient at the weight, where the defender needs it.
    """

    def __init__(self, weight: torch.Tensor, rank: int, rng: torch.Generator) -> None:
        self._weight, self._base = weight, weight.detach().clone()
        self.down = nn.Parameter(torch.empty(rank, weight.shape[1]).to(weight))
        bound = 1 / math.sqrt(weight.shape[1])  # as the library peft draws it
        self.down.data.copy_(torch.empty(self.down.shape).uniform_(-bound, bound, generator=rng))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank).to(weight))

    def take(self) -> None:
        gradient = self._weight.grad
        if gradient is not None:
            self.down.grad = 2 * self.up.detach().T @ gradient
            self.up.grad = 2 * gradient @ self.down.detach().T

    def put(self) -> None:
        with torch.no_grad():
            self._weight.copy_(self._base).addmm_(self.up, self.down, alpha=2)

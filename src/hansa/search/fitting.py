"""The loop that blocks and assembled models are trained by; the best weights are kept."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from hansa.models.task import Tensors
from hansa.seeding import generator


class Fitting(BaseModel):
    """How a module is trained: SGD with momentum and a rate that falls to 0 along a cosine.

    Attributes:
        steps: of the optimizer.
        batch_size: samples of a step; a pass over the data leaves out what does not fill one.
        lr: the first step's learning rate.
        momentum: of SGD.
        nesterov: whether momentum looks ahead.
        weight_decay: times the weights, added to their gradient.
        clip: largest norm of the gradient of all weights together; None leaves it as it is.
        evaluations: how often the module is looked at, evenly over the steps, the last included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(100, ge=1)
    batch_size: int = Field(32, ge=2)  # BatchNorm needs two
    lr: float = Field(0.05, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(5e-4, ge=0)
    clip: float | None = Field(None, gt=0)
    evaluations: int = Field(4, ge=1)


@dataclass(frozen=True)
class Fitted:
    """What training found.

    Attributes:
        weights: parameters and buffers at the best evaluation.
        figures: of that evaluation, by name.
        step: the number of steps before it.
    """

    weights: Tensors
    figures: dict[str, float]
    step: int


def fit(
    module: nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    num_samples: int,
    evaluate: Callable[[], dict[str, float]],
    worth: Callable[[dict[str, float]], tuple[float, ...]],
    options: Fitting,
    seed: int,
    *purpose: str | int,
) -> Fitted:
    """Train a module in place and leave in it the weights of the best evaluation.

    Args:
        module: what is trained.
        loss_of: positions of a batch's samples, int64 [batch] -> the loss to descend.
        num_samples: that positions are drawn from, pass after pass without replacement.
        evaluate: figures of the module as it is, called in evaluation mode without gradients.
        worth: of figures; the largest is the best, the earlier one where two are equal. A figure
            that is no number, as of a module that diverged, is infinite there.
        options: steps, rate, batches.
        seed: of the order of samples.
        purpose: of that stream.
    """
    optimizer = torch.optim.SGD(
        module.parameters(),
        options.lr,
        options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov and options.momentum > 0,
    )
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    marks = {options.steps * k // options.evaluations for k in range(1, options.evaluations + 1)}
    size = min(options.batch_size, num_samples)
    order: list[torch.Tensor] = []
    number = 0
    best: Fitted | None = None
    for step in range(1, options.steps + 1):
        if not order:
            rng = generator(seed, *purpose, number)
            chosen = torch.randperm(num_samples, generator=rng)[: num_samples // size * size]
            order, number = list(chosen.split(size)), number + 1
        module.train()
        optimizer.zero_grad()
        loss_of(order.pop(0)).backward()
        if options.clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), options.clip)
        optimizer.step()
        falling.step()
        if step not in marks:
            continue
        module.eval()
        with torch.no_grad():
            found = evaluate()
        figures = {name: math.inf if math.isnan(each) else each for name, each in found.items()}
        if best is None or worth(figures) > worth(best.figures):
            weights = {name: value.clone() for name, value in module.state_dict().items()}
            best = Fitted(weights, figures, step)
    assert best is not None  # noqa: S101 - the last step is always a mark
    module.load_state_dict(best.weights)
    module.eval()
    return best

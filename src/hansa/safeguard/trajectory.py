"""One simulated attack, and the gradient of the tamper-resistance loss along it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from hansa.safeguard.adversaries import Drawn, Tampering
from hansa.safeguard.setup import Metrics

Loss = Callable[[], torch.Tensor]
"""A scalar loss of the model as it is."""
Harm = Callable[[int], torch.Tensor]
"""An attacker's scalar loss at one of its steps, by its number from 0."""


def attack(
    model: nn.Module,
    drawn: Drawn,
    harm: Harm,
    resist: Loss,
    points: Mapping[int, float],
    into: Sequence[torch.Tensor],
    rng: torch.Generator,
) -> Metrics:
    """Let an attacker train a model, and take the gradient of another loss meanwhile.

    The model is afterwards as it was, bit for bit, and has no gradients. Beside the attacker's
    own memory this takes one copy of the parameters.

    Args:
        model: the model; parameters that require no gradient are nobody's.
        drawn: the attacker.
        harm: what it descends.
        resist: the loss whose gradient is taken, right after a step.
        points: numbers of the steps, from 0, after which that is -> what each counts.
        into: where the gradients are added up, one for each parameter that requires one.
        rng: draws the first values of an attacker's adapters.

    Returns:
        The attacker's loss at its first and last step, and the other loss at its first and last
        point; more where any was not finite (``diverged`` 1).
    """
    params = [p for p in model.parameters() if p.requires_grad]
    harms, resists = [], []
    with _restored(model, params):
        attacker = Tampering(model, drawn, rng)
        for k in range(drawn.steps):
            _clear(params)
            loss = harm(k)
            loss.backward()
            attacker.step(k)
            harms.append(loss.detach())
            if k in points:
                _clear(params)
                loss = resist()
                (points[k] * loss).backward()
                resists.append(loss.detach())
                for total, parameter in zip(into, params, strict=True):
                    if parameter.grad is not None:
                        total += parameter.grad
        _clear(params)
    # Looked at once, at the end: on a GPU every look waits for the device.
    values = torch.stack(harms + resists).double().tolist()
    told = dict(
        zip(
            ("attack_first", "attack_last", "resist_first", "resist_last"),
            (values[0], values[len(harms) - 1], values[len(harms)], values[-1]),
            strict=True,
        )
    )
    is_finite = bool(torch.tensor(values).isfinite().all())
    return told if is_finite else {**told, "diverged": 1.0}


@contextmanager
def _restored(model: nn.Module, params: Sequence[nn.Parameter]) -> Iterator[None]:
    """Put parameters and buffers back at the end, and training on or off, too."""
    tensors = [*params, *model.buffers()]
    kept = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)


def _clear(params: Sequence[nn.Parameter]) -> None:
    for parameter in params:
        parameter.grad = None

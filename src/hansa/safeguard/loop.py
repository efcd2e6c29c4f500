"""The loop of a phase: optimizer, rates, checkpoints; interrupted, it goes on bit for bit."""

import math
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import torch

from hansa.errors import InputError
from hansa.safeguard.checkpoint import keep, take
from hansa.safeguard.phases.base import Phase, gradients, norm
from hansa.safeguard.setup import Metrics, Setup
from hansa.safeguard.sharding import agreed

Watch = Callable[[int, int, Metrics], None]


def descend(
    phase: Phase,
    setup: Setup,
    checkpoint: Path | None = None,
    watch: Watch | None = None,
    every: float = 60.0,
) -> list[Metrics]:
    """Train a model by a phase, and tell its metrics step by step.

    A step whose whole gradient is not finite changes nothing, and is told as ``skipped``.

    Args:
        phase: what is done.
        setup: the model, which is changed, and what it is trained on.
        checkpoint: file to go on from, if it is there, and to leave for after an interruption;
            whoever has put the result away removes it.
        watch: called after each step with its number from 1, how many there are, and its metrics.
        every: seconds between two checkpoints.

    Raises:
        InputError: losses that are not finite from the first step on, or a checkpoint of another
            model.
    """
    setup.model.eval()  # dropout is off in all passes: it would blur what an attack does
    optimizer = torch.optim.AdamW(setup.params, lr=phase.lr, weight_decay=phase.weight_decay)
    advance = phase.begin(setup)
    history: list[Metrics] = []
    if checkpoint is not None and checkpoint.exists():
        history = take(checkpoint, setup.model, optimizer)
    else:
        phase.prepare(setup)
    saved = monotonic()
    for step in range(len(history), phase.steps):
        for group in optimizer.param_groups:
            group["lr"] = phase.rate(step)
        optimizer.zero_grad(set_to_none=True)
        metrics = advance(step)
        whole = norm(gradients(setup))
        metrics["norm"] = whole
        if not math.isfinite(whole):
            if not step:
                raise InputError("phases.lr", f"{phase.kind} with a loss that is no number", "less")
            metrics["skipped"] = 1.0
        else:
            if phase.max_norm is not None and whole > phase.max_norm:
                for gradient in gradients(setup):
                    gradient.mul_(phase.max_norm / whole)
            optimizer.step()
        history.append(metrics)
        if checkpoint is not None and agreed(monotonic() - saved > every, setup.ranks):
            keep(checkpoint, setup.model, optimizer, history, setup.rank)
            saved = monotonic()
        if watch is not None:
            watch(step + 1, phase.steps, metrics)
    optimizer.zero_grad(set_to_none=True)
    return history

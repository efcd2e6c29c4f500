"""Differential privacy of one node: clipping and noise, for each gradient or for a whole update.

Sources: Abadi et al., "Deep Learning with Differential Privacy" (CCS 2016), Algorithm 1, for
gradients; McMahan et al., "Learning Differentially Private Recurrent Language Models" (ICLR 2018)
for updates, though here the node adds the noise itself.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from hansa.errors import InputError
from hansa.federation.accountant import Mechanisms, spent
from hansa.models.objective import Metrics
from hansa.models.task import Batch, Task, Tensors
from hansa.seeding import Keystream, global_stream

_CHUNK = 2**26
"""Most numbers that per-example gradients hold at once: 256 MiB in float32."""
_UNBATCHED = "There is a performance drop because we have not yet implemented the batching rule"


class Privacy(BaseModel):
    """How the text of a node is protected: what counts as one record, and how much noise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Literal["gradient", "update"] = "gradient"
    """What noise hides: one training sample of a node (``gradient``), or all that a node has
    (``update``)."""
    clip: float = Field(1.0, gt=0, strict=True)
    """S, the Euclidean norm over all parameters to which an example's gradient, or a node's
    update, is cut down; ``inf`` leaves it as it is."""
    noise: float = Field(1.0, ge=0, allow_inf_nan=False, strict=True)
    """Noise multiplier sigma: the noise has a standard deviation of sigma S. 0 adds none."""
    delta: float = Field(1e-5, gt=0, lt=1, strict=True)
    """Probability with which epsilon may fail to hold; below one over the number of records."""
    epsilon: float | None = Field(None, gt=0, allow_inf_nan=False, strict=True)
    """Budget over the whole run, in a deployment over all of the node's: a node stops contributing
    before it would spend more."""

    @model_validator(mode="after")
    def _fits(self) -> "Privacy":
        if self.noise and self.clip == math.inf:
            raise ValueError("noise is a multiple of clip: clip = inf needs noise = 0")
        if not self.noise and self.epsilon is not None:
            raise ValueError("without noise epsilon is infinite: a budget needs noise above 0")
        return self

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on the clipped sum: sigma S, 0 without noise."""
        return self.noise * self.clip if self.noise else 0.0


@dataclass(frozen=True)
class _Plan:
    """What a first look at a model found: how its examples are taken, and what they give."""

    used: tuple[str, ...]
    metrics: Metrics
    batched: bool


class PrivateTask(Task):
    """A task whose gradients are clipped example by example, summed, and noised (DP-SGD).

    Buffers stay as they are: nothing learned from a batch leaves without noise.

    Args:
        task: the task.
        privacy: clip and noise.
        batch_size: the expected number of examples in a batch, which the sum is divided by. It
            must not depend on the batch, whose size is a secret under Poisson sampling.
        chunk_size: examples whose gradients are held at once; by default as memory allows.
        rng: where the noise comes from; PyTorch's global CPU stream by default.

    Raises:
        InputError: the model has running statistics, or layers that mix the examples of a batch.
    """

    def __init__(
        self,
        task: Task,
        privacy: Privacy,
        batch_size: int,
        chunk_size: int | None = None,
        rng: Keystream | None = None,
    ) -> None:
        check_model(task.module)
        vars(self).update(vars(task))
        self._task, self._privacy, self._batch_size = task, privacy, batch_size
        self._chunk_size, self._rng = chunk_size, rng
        self._plans: dict[tuple[frozenset[str], bool], _Plan] = {}

    def adapted(self, adapt: Callable[[nn.Module], nn.Module]) -> Task:
        """Return the task of another form of its module, as private as this one."""
        task = self._task.adapted(adapt)
        if task is self._task:
            return self
        return PrivateTask(task, self._privacy, self._batch_size, self._chunk_size, self._rng)

    def drawing(self, rng: Keystream) -> "PrivateTask":
        """Return the same task with noise from a stream of its own."""
        return PrivateTask(self._task, self._privacy, self._batch_size, self._chunk_size, rng)

    def loss(
        self, params: Tensors, buffers: Tensors, batch: Batch, training: bool = True
    ) -> tuple[torch.Tensor, Metrics]:
        """Return what the task's own ``loss`` returns, without noise."""
        return self._task.loss(params, buffers, batch, training)

    def gradients(
        self, params: Tensors, buffers: Tensors, batch: Batch, training: bool = True
    ) -> tuple[dict[str, torch.Tensor | None], dict[str, torch.Tensor], Metrics]:
        """Return private gradients, the buffers unchanged, and metrics without noise.

        Abadi et al. 2016, Algorithm 1: (sum of clipped gradients + N(0, sigma^2 S^2)) / batch size.
        An example's gradient is that of the task's loss on a batch of it alone. The noise is drawn
        in the order of the names.

        Args:
            params: name -> parameter.
            buffers: name -> buffer.
            batch: as in ``Task.loss``; it may be empty, which gives noise alone.
            training: whether layers such as dropout act as in training.

        Raises:
            InputError: a parameter has a part in the loss of only some examples.
        """
        plan = self._plan(params, buffers, batch, training)
        sums = {name: torch.zeros_like(params[name]) for name in plan.used}
        metrics = {name: torch.zeros_like(metric) for name, metric in plan.metrics.items()}
        size = self._chunk_size or _chunk(sums) if plan.batched else 1
        take = self._together if plan.batched else self._alone
        for start in range(0, len(batch[0]), size):
            part = [tensor[start : start + size] for tensor in batch]
            gradients, found = take(plan.used, params, buffers, part, training)
            for name, clipped in _clipped(gradients, self._privacy.clip).items():
                sums[name] += clipped
            metrics = {name: total + found[name].sum(0) for name, total in metrics.items()}
        if self._privacy.noise:
            for name in sorted(sums):
                sums[name] = _added(sums[name], self._privacy.deviation, self._rng)
        mean = {name: total / self._batch_size for name, total in sums.items()}
        return {name: mean.get(name) for name in params}, dict(buffers), metrics

    def _together(
        self,
        used: tuple[str, ...],
        params: Tensors,
        buffers: Tensors,
        batch: list[torch.Tensor],
        training: bool,
    ) -> tuple[dict[str, torch.Tensor], Metrics]:
        """Return gradients [batch, ...] and metrics [batch] of the examples of a batch."""

        def objective(leaves: Tensors, *example: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
            one: Batch = tuple(part[None] for part in example)  # type: ignore[assignment]
            after = {name: b.clone() for name, b in buffers.items()}
            return self._task.loss({**params, **leaves}, after, one, training)

        each = vmap(
            grad(objective, has_aux=True),
            in_dims=(None, *(0 for _ in batch)),
            randomness="different",
        )
        with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for fused attention
            gradients, metrics = each({name: params[name] for name in used}, *batch)
        return gradients, metrics

    def _alone(
        self,
        used: tuple[str, ...],
        params: Tensors,
        buffers: Tensors,
        batch: list[torch.Tensor],
        training: bool,
    ) -> tuple[dict[str, torch.Tensor], Metrics]:
        """Return what ``_together`` returns, for a batch of one example, by plain autograd."""
        one: Batch = tuple(batch)  # type: ignore[assignment]
        found, _, metrics = self._task.gradients(params, buffers, one, training)
        gradients = {}
        for name, gradient in found.items():
            if name in used:
                gradient = torch.zeros_like(params[name]) if gradient is None else gradient
                gradients[name] = gradient[None]
            elif gradient is not None:  # noise on it now and then would tell of the examples
                raise InputError(
                    "privacy",
                    f"a model whose parameter {name} has a part in only some examples",
                    "a model that takes one path for all of them",
                )
        return gradients, {name: metric[None] for name, metric in metrics.items()}

    def _plan(self, params: Tensors, buffers: Tensors, batch: Batch, training: bool) -> _Plan:
        """Try a model on two examples of zeros, so that nothing here depends on the data."""
        key = frozenset(params), training
        if key not in self._plans:
            zeros = [part.new_zeros(2, *part.shape[1:]) for part in batch]
            one: Batch = tuple(part[:1] for part in zeros)  # type: ignore[assignment]
            with torch.enable_grad(), global_stream(0, "privacy"):
                found, _, metrics = self._task.gradients(params, buffers, one, training)
                used = tuple(name for name, gradient in found.items() if gradient is not None)
                try:
                    with warnings.catch_warnings():
                        warnings.filterwarnings("error", message=_UNBATCHED)
                        self._together(used, params, buffers, zeros, training)
                    batched = True
                # What vmap cannot take shows as one of these.
                except (RuntimeError, ValueError, TypeError, NotImplementedError, UserWarning):
                    batched = False
            self._plans[key] = _Plan(used, metrics, batched)
        return self._plans[key]


def noised(
    privacy: Privacy, before: Tensors, after: Tensors, rng: torch.Generator | Keystream
) -> dict[str, torch.Tensor]:
    """Return ``before`` plus the update, clipped over all tensors, plus N(0, sigma^2 S^2).

    Without noise an update within the norm gives ``after``, bit for bit. Sums are made in float64
    and rounded once, after the noise, so that rounding costs no privacy.

    Args:
        privacy: clip and noise.
        before: name -> tensor as the node received it, or as all know it.
        after: name -> tensor of the same shape, after the node's training.
        rng: where the noise comes from, tensor by tensor in the order of the names.

    Raises:
        InputError: a tensor that holds no real numbers, to which no noise can be added.
    """
    for name, tensor in after.items():
        if not tensor.is_floating_point():
            raise InputError(
                "privacy",
                f"{name} of {str(tensor.dtype).removeprefix('torch.')} in an update",
                "tensors of floating point, or model.buffers = 'local'",
            )
    names = sorted(after)
    norms = [_update(before, after, name).norm() for name in names]
    norm = float(torch.stack(norms).norm()) if norms else 0.0
    # What is no number makes the scale, and so all of the update, no number: the caller refuses it.
    scale = 1.0 if norm <= privacy.clip else privacy.clip / norm
    out = {}
    for name in names:
        if scale == 1:
            value = after[name].clone()
        else:
            value = before[name].double() + _update(before, after, name) * scale
        if privacy.noise:
            value = _added(value.double(), privacy.deviation, rng)
        out[name] = value.to(after[name].dtype)
    return {name: out[name] for name in after}


def poisson(
    samples: int, batch_size: int, steps: int, rng: torch.Generator | Keystream
) -> list[torch.Tensor]:
    """Return, for each step, the positions of a batch in which each sample is by its own chance.

    That is the sampling under which the accountant's amplification holds; shuffled batches of one
    size give less.

    Args:
        samples: number of samples, at least 1.
        batch_size: expected size of a batch: the chance is batch_size / samples, at most 1.
        steps: number of batches.
        rng: where the draws come from.

    Returns:
        ``steps`` tensors of int64 positions, ascending; some may be empty.
    """
    rate = _rate(samples, batch_size)

    def draw() -> torch.Tensor:
        if isinstance(rng, Keystream):
            return rng.uniform(samples)
        return torch.rand(samples, generator=rng, dtype=torch.float64)

    return [(draw() < rate).nonzero().flatten() for _ in range(steps)]


def mechanisms(privacy: Privacy, samples: int, batch_size: int, steps: int) -> Mechanisms:
    """Return what some steps are to the accountant; see ``epsilon`` for the arguments."""
    rate = _rate(samples, batch_size) if privacy.unit == "gradient" else 1.0
    return privacy.noise, rate, steps


def epsilon(privacy: Privacy, samples: int, batch_size: int, steps: int) -> float:
    """Return epsilon after some steps, at the configured delta.

    Neighbours are data sets of which one has one record more: a sample for the unit ``gradient``,
    all the samples of the node for the unit ``update``.

    Args:
        privacy: unit, noise and delta.
        samples: training samples of the node, at least 1.
        batch_size: expected size of a batch, as ``poisson`` takes it. It and ``samples`` count
            for the unit ``gradient`` alone.
        steps: noised gradients of the unit ``gradient``, noised updates of the unit ``update``.

    Returns:
        0 after no step, infinity without noise.

    Raises:
        InputError: Opacus is not installed.
    """
    return spent([mechanisms(privacy, samples, batch_size, steps)], privacy.delta)


def affordable(privacy: Privacy, samples: int, batch_size: int, done: int, more: int) -> bool:
    """Tell whether ``more`` steps after those ``done`` keep epsilon within the budget.

    Without a budget everything is affordable; see ``epsilon`` for the other arguments.

    Raises:
        InputError: there is a budget, and Opacus is not installed.
    """
    if privacy.epsilon is None:
        return True
    return epsilon(privacy, samples, batch_size, done + more) <= privacy.epsilon


def check_model(model: nn.Module) -> None:
    """Refuse a model in which an example leaves traces that clipping its gradient does not bound.

    Raises:
        InputError: it has BatchNorm, or another layer that keeps running statistics.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) or (
            isinstance(module, _NormBase) and module.track_running_stats
        ):
            what = f"{type(module).__name__} ({name or 'the model itself'})"
            raise InputError(
                "privacy",
                f"{what}, whose statistics mix the examples of a batch",
                "a layer that normalises each example by itself, such as GroupNorm or LayerNorm",
            )


def _rate(samples: int, batch_size: int) -> float:
    return min(1.0, batch_size / samples)


def _chunk(tensors: Tensors) -> int:
    return max(1, _CHUNK // max(1, sum(tensor.numel() for tensor in tensors.values())))


def _clipped(gradients: Tensors, clip: float) -> dict[str, torch.Tensor]:
    """Return the sum over examples of gradients [batch, ...], each cut to the norm ``clip``."""
    if not gradients:
        return {}
    norms = [
        torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64)
        for g in gradients.values()
    ]
    factors = (clip / torch.stack(norms).norm(dim=0)).clamp(max=1)
    return {name: torch.tensordot(factors.to(g.dtype), g, 1) for name, g in gradients.items()}


def _update(before: Tensors, after: Tensors, name: str) -> torch.Tensor:
    return after[name].double() - before[name].double()


def _added(
    tensor: torch.Tensor, deviation: float, rng: torch.Generator | Keystream | None
) -> torch.Tensor:
    # In float64, whose normal draws reach farther into the tails than those of float32.
    if isinstance(rng, Keystream):
        noise = rng.normal(tensor.shape)
    else:
        noise = torch.randn(tensor.shape, generator=rng, dtype=torch.float64)
    return (tensor + noise.mul_(deviation).to(tensor.device)).to(tensor.dtype)

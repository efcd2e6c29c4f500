"""A model's loss as a function of its parameters, with gradients and Hessian-vector products."""

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList

from hansa.errors import InputError
from hansa.models.derivatives import derivatives
from hansa.models.masks import tied_parameters
from hansa.models.modes import in_mode
from hansa.models.task import Tensors
from hansa.seeding import global_stream

Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_NOT_WEIGHTS = (
    _NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.Embedding,
    nn.EmbeddingBag,
    ParametrizationList,
)


def prunable(model: nn.Module, exclude: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of the parameters that may be pruned.

    These are the trainable tensors of two dimensions or more, weights of convolutions and linear
    layers above all; biases, normalisation and embeddings are not among them, nor tensors that
    several layers share or that are parametrized (by masks, by weight normalisation).

    Args:
        model: any module.
        exclude: patterns of parameter names, with ``*``, that stay as they are.

    Raises:
        InputError: there are none, or a pattern that no name matches.
    """
    owners = dict(model.named_modules())
    tied = tied_parameters(model)
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.dim() > 1
        and id(parameter) not in tied
        and not isinstance(owners[name.rpartition(".")[0]], _NOT_WEIGHTS)
    ]
    for pattern in exclude:
        if not matching(names, pattern):
            raise InputError("exclude", repr(pattern), f"one of {_listed(names)}, * allowed")
        gone = set(matching(names, pattern))
        names = [name for name in names if name not in gone]
    if not names:
        raise InputError("model", "no prunable layers", "convolutions or linear layers")
    return tuple(names)


def matching(names: Sequence[str], pattern: str) -> list[str]:
    """Return the names that a pattern means; a layer's name means its weight as well."""
    return [
        name
        for name in names
        if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
    ]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "none"


class Objective:
    """The training loss of a model whose weights are masked.

    The model itself is left as it is: its parameters are copied, and every evaluation works on a
    copy of its buffers. Dropout draws the same numbers in every evaluation of a step.

    Args:
        model: any module that returns one tensor.
        loss: (outputs, targets) -> scalar mean over the batch.
        names: the parameters that may be pruned; by default ``prunable(model)``.
        masks: name -> bool tensor, True where an entry is kept.
        frozen: whether masked entries stay at zero while other parameters move; otherwise the
            mask only multiplies the starting point, and they may come back.
        seed: of dropout.

    Attributes:
        initial: name -> value of every trainable parameter.
        params: the same, masked: the starting point.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        names: Sequence[str] | None = None,
        masks: Tensors | None = None,
        frozen: bool = True,
        seed: int = 0,
    ) -> None:
        self.model, self.names = model, tuple(names or prunable(model))
        self._loss, self._seed = loss, seed
        self.initial = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        self.masks = dict(masks or {})
        self._frozen = frozen
        self.params = self._masked(self.initial)

    def within(self, masks: Tensors, frozen: bool = True) -> "Objective":
        """Return the same objective with other masks."""
        return Objective(self.model, self._loss, self.names, masks, frozen, self._seed)

    def tempered(self, temperature: float) -> "Objective":
        """Return the same objective with the outputs divided by a number."""

        def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self._loss(outputs / temperature, targets)

        return Objective(self.model, loss, self.names, self.masks, self._frozen, self._seed)

    def loss(self, params: Tensors, batch: Batch, step: int = 0) -> torch.Tensor:
        """Return the loss of a batch, with layers such as BatchNorm and dropout as in training.

        Args:
            params: name -> value of every trainable parameter.
            batch: inputs [batch, ...] and targets.
            step: the inner step, for dropout's stream.

        Raises:
            InputError: a loss that is no finite number.
        """
        if self._frozen:
            params = self._masked(params)
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        # Of attention only the plain form can be differentiated twice.
        with (
            in_mode(self.model, training=True),
            global_stream(self._seed, "pruning", step),
            sdpa_kernel(SDPBackend.MATH),
        ):
            outputs = functional_call(self.model, {**params, **buffers}, (batch[0],))
        value = self._loss(outputs, batch[1])
        if not value.isfinite():
            raise InputError("loss", f"{value.item()} on a batch", "a finite number")
        return value

    def gradient(self, params: Tensors, batch: Batch, step: int = 0) -> dict[str, torch.Tensor]:
        """Return the gradient of ``loss``; zero where a parameter has no part in it."""
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        value = self.loss(leaves, batch, step)
        return dict(zip(leaves, derivatives(value, list(leaves.values())), strict=True))

    def product(
        self,
        params: Tensors,
        vector: Tensors,
        batch: Batch,
        step: int = 0,
    ) -> dict[str, torch.Tensor]:
        """Return the Hessian of ``loss`` times a vector, by differentiating the gradient once more.

        Memory is that of one such graph, whatever came before.
        """
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        values = list(leaves.values())
        first = derivatives(self.loss(leaves, batch, step), values, create_graph=True)
        inner = sum(
            ((g * vector[n]).sum() for n, g in zip(leaves, first, strict=True) if g.requires_grad),
            start=torch.zeros(()),
        )
        if not inner.requires_grad:  # a loss without curvature
            return {name: torch.zeros_like(p) for name, p in params.items()}
        return dict(zip(leaves, derivatives(inner, values), strict=True))

    def _masked(self, params: Tensors) -> dict[str, torch.Tensor]:
        return {**params, **masked({n: params[n] for n in self.masks}, self.masks)}


def masked(params: Tensors, masks: Tensors) -> dict[str, torch.Tensor]:
    """Return tensors with masked entries at zero, and never at -0.0, which has a sign to send."""
    return {name: torch.where(masks[name], p, 0.0) for name, p in params.items()}


def mean(parts: Iterator[tuple[Tensors, int]]) -> dict[str, torch.Tensor]:
    """Return the mean of tensors of batches, weighted by the batches' samples."""
    first, first_samples = next(parts)
    total = {name: tensor * first_samples for name, tensor in first.items()}
    count = first_samples
    for tensors, samples in parts:
        count += samples
        for name, tensor in tensors.items():
            total[name] += tensor * samples
    if count == first_samples:  # nothing is rounded where there is nothing to average
        return dict(first)
    return {name: tensor / count for name, tensor in total.items()}

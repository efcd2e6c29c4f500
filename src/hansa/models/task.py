"""A task: a model and an objective as pure functions of parameters, buffers and a batch."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call, grad

from hansa.models.masks import finalise, masks_of
from hansa.models.objective import CLASSIFICATION, Metrics, Objective

Tensors = Mapping[str, torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Inputs [batch, ...], labels [batch] (class numbers) or [batch, T] (tokens), and maybe weights
[batch]: 1 for a sample, 0 for what only fills the batch up and changes nothing."""


class Task:
    """A module that returns logits, and an objective; by default classification of its inputs.

    The module is only a recipe: its parameters and buffers travel as arguments. Parameters are
    known by their names in ``named_parameters()``, so tied parameters count once; those that do
    not require a gradient are part of the recipe and never travel.

    Args:
        module: maps inputs [batch, ...] to the logits that the objective takes.
        objective: makes a loss and metrics of logits and labels.

    Attributes:
        objective: as given.
        params: name -> initial value of every trainable parameter.
        buffers: name -> initial value of every buffer (running statistics).
        masks: name -> bool tensor of the masks that are part of the module (``models.masks``):
            what is masked counts as zero whatever its value, and has no gradient.
    """

    def __init__(self, module: nn.Module, objective: Objective = CLASSIFICATION) -> None:
        if masks_of(module):  # from here on parameters go by their plain names
            module = copy.deepcopy(module)
        self.masks = finalise(module)
        self.module, self.objective = module, objective
        # Contiguous, as tensors are that come out of a message: layouts choose kernels, and those
        # round in their own ways.
        self.params = {
            name: parameter.detach().clone(memory_format=torch.contiguous_format)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.buffers = {
            name: buffer.detach().clone(memory_format=torch.contiguous_format)
            for name, buffer in module.named_buffers()
        }
        self._aliases = _aliases(module)

    def adapted(self, adapt: Callable[[nn.Module], nn.Module]) -> "Task":
        """Return the task of another form of its module, under the same names and masks.

        Args:
            adapt: returns the module's other form; it must not change what it is given.
        """
        module = adapt(self.module)
        if module is self.module:
            return self
        task = Task(module, self.objective)
        task.masks = self.masks  # taken off the module before it was adapted
        return task

    def loss(
        self, params: Tensors, buffers: Tensors, batch: Batch, training: bool = True
    ) -> tuple[torch.Tensor, Metrics]:
        """Return the objective's mean loss over a batch, and its metrics as sums.

        Running statistics are updated in place in ``buffers`` when training.

        Args:
            params: name -> parameter.
            buffers: name -> buffer.
            batch: inputs [batch, ...], labels [batch, ...], and maybe weights [batch].
            training: whether layers such as dropout and BatchNorm act as in training.

        Returns:
            The scalar loss, and ``{"loss": sum, "accuracy": number right, "count": labels}`` with
            whatever else the objective's ``sums`` has.
        """
        inputs, labels, *weights = batch
        logits = self.logits(params, buffers, inputs, training)
        return self.objective.loss(logits, labels, weights[0] if weights else None)

    def logits(
        self, params: Tensors, buffers: Tensors, inputs: torch.Tensor, training: bool = True
    ) -> torch.Tensor:
        """Return what the module makes of inputs [batch, ...]; see ``loss``."""
        if self.module.training is not training:
            self.module.train(training)
        tensors = {**params, **buffers}
        tensors |= {n: torch.where(mask, params[n], 0.0) for n, mask in self.masks.items()}
        tensors |= {name: tensors[n] for name, n in self._aliases.items() if n in tensors}
        # Ties are resolved above, once: PyTorch would look for them at every call, and leaves
        # these tensors in a module that is used in two places.
        found: torch.Tensor = functional_call(self.module, tensors, (inputs,), tie_weights=False)
        return found

    def gradients(
        self, params: Tensors, buffers: Tensors, batch: Batch, training: bool = True
    ) -> tuple[dict[str, torch.Tensor | None], dict[str, torch.Tensor], Metrics]:
        """Return gradients (None where a parameter had no part), new buffers, and metrics."""
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        buffers = {name: b.clone() for name, b in buffers.items()}
        loss, metrics = self.loss(leaves, buffers, batch, training)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return dict(zip(leaves, gradients, strict=True)), buffers, metrics

    @torch.no_grad()
    def evaluate(
        self, params: Tensors, buffers: Tensors, data: Batch, batch_size: int = 1024
    ) -> dict[str, tuple[float, float]]:
        """Return metrics over a data set as (sum, count), in evaluation mode.

        Args:
            params: name -> parameter.
            buffers: name -> buffer.
            data: inputs [n, ...], labels [n, ...], and maybe weights [n].
            batch_size: most labels at once, which are more than samples where a sample is a
                sequence; one sample at least.
        """
        sums = dict.fromkeys(self.objective.sums, 0.0)
        buffers = {name: b.clone() for name, b in buffers.items()}
        rows = max(1, batch_size // max(1, data[1][:1].numel()))
        chunks = zip(*(part.split(rows) for part in data), strict=True)
        for chunk in chunks:
            _, metrics = self.loss(params, buffers, chunk, training=False)
            for name in sums:
                sums[name] += float(metrics[name])
        return self.objective.totals(sums)

    def materialise(self, params: Tensors, buffers: Tensors) -> nn.Module:
        """Return a module of its own that holds these parameters and buffers."""
        module = copy.deepcopy(self.module)
        state = {name: p.detach() for name, p in module.named_parameters()}
        state |= dict(module.named_buffers())
        with torch.no_grad():
            for name, value in [*params.items(), *buffers.items()]:
                state[name].copy_(value)
        return module.eval()


class PureTask(Task):
    """A task whose gradients `vmap` can take for many clients at once.

    Args:
        task: the task.
        unused: parameters that have no part in the loss, whose gradients are None.
        device: where it is computed.
        precision: what matrix products and convolutions are computed in.
    """

    def __init__(
        self,
        task: Task,
        unused: frozenset[str] = frozenset(),
        device: str = "cpu",
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        vars(self).update(vars(task))
        self._unused, self._device, self._low = unused, device, precision == "bfloat16"
        if device != "cpu":  # frozen parameters are part of the module
            self.module = copy.deepcopy(task.module).to(device)
            self.objective = task.objective.to(device)
            self.params = {name: p.to(device) for name, p in task.params.items()}
            self.buffers = {name: b.to(device) for name, b in task.buffers.items()}
            self.masks = {name: mask.to(device) for name, mask in task.masks.items()}

    def loss(
        self, params: Tensors, buffers: Tensors, batch: Batch, training: bool = True
    ) -> tuple[torch.Tensor, Metrics]:
        """Return what a task's own ``loss`` returns."""
        if not self._low:
            return super().loss(params, buffers, batch, training)
        with torch.autocast(torch.device(self._device).type, torch.bfloat16):
            return super().loss(params, buffers, batch, training)

    def gradients(
        self, params: Tensors, buffers: Tensors, batch: Batch, training: bool = True
    ) -> tuple[dict[str, torch.Tensor | None], dict[str, torch.Tensor], Metrics]:
        """Return what a task's own ``gradients`` returns."""

        def value(params: Tensors) -> tuple[torch.Tensor, tuple[dict[str, Any], Metrics]]:
            after = {name: b.clone() for name, b in buffers.items()}
            loss, metrics = self.loss(params, after, batch, training)
            return loss, (after, metrics)

        used = {name: p for name, p in params.items() if name not in self._unused}
        fixed = {name: params[name] for name in self._unused}
        gradients, (after, metrics) = grad(lambda p: value(p | fixed), has_aux=True)(used)
        return {name: gradients.get(name) for name in params}, after, metrics


def _aliases(module: nn.Module) -> dict[str, str]:
    """Return the further names of tied tensors, each with the name that the tensor goes by."""
    known: dict[int, str] = {}
    aliases = {}
    for path, owner in module.named_modules():
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None:
                full = f"{path}.{name}" if path else name
                first = known.setdefault(id(tensor), full)
                if first != full:
                    aliases[full] = first
    return aliases

"""Structured pruning: whole channels, and a network that is smaller for it.

Which tensors share a channel (a convolution, its BatchNorm, what a residual sum ties together, the
inputs of the next layer) the ``torch-pruning`` library finds out by tracing the model; Hansa ranks
the channels.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import torch_pruning
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hansa.errors import InputError
from hansa.models.resize import RESIZABLE
from hansa.models.task import Tensors
from hansa.pruning.find import taken
from hansa.pruning.objective import Batch, Loss, Objective, prunable
from hansa.pruning.prospr import ProsPr
from hansa.pruning.scorer import GradientScorer, Scorer
from hansa.pruning.select import select

By = Literal["output", "sum"]
_ALLOWED = "convolutions, linear layers and BatchNorm (norm = 'batch'); or exclude it"


@dataclass(frozen=True)
class Group:
    """Channels that can only go together.

    Attributes:
        root: the layer whose outputs they are.
        size: how many there are.
        outputs: layer -> for each of its outputs, the channel of the root that it belongs to.
    """

    root: str
    size: int
    outputs: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Pruned:
    """A network with fewer channels.

    Attributes:
        model: the smaller network.
        masks: parameter name of the old network -> bool tensor, False where a channel went: the
            old network with these gives what the new one gives.
        scores: root layer -> score of each of its channels [channels].
        kept: root layer -> bool [channels].
    """

    model: nn.Module
    masks: dict[str, torch.Tensor]
    scores: dict[str, torch.Tensor]
    kept: dict[str, torch.Tensor]


def prune_channels(
    model: nn.Module,
    batches: Sequence[Batch],
    density: float,
    scorer: Scorer | None = None,
    *,
    by: By | None = None,
    loss: Loss = F.cross_entropy,
    floor: float = 0.0,
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> Pruned:
    """Remove the channels with the lowest scores, all layers ranked together.

    The outputs of the last layer stay. A channel whose filter is followed by a normalisation
    has no first-order effect through the filter's scale, so ``by="output"`` puts the mask on what
    the normalisation gives out: the score is |sum of gamma x dL/dgamma + beta x dL/dbeta|, over
    the layers that share the channel. ``by="sum"`` adds up the scores of the filter's weights.

    Args:
        model: convolutions, linear layers and BatchNorm; other layers may not have channels that
            would go.
        batches: (inputs, targets), as many as the scorer takes.
        density: share of all channels to keep, in (0, 1].
        scorer: ProsPr by default.
        by: by default ``output`` where the scorer has a derivative, else ``sum``. Layers without
            normalisation go by the weights and bias of their filters in the same way.
        loss: (outputs, targets) -> scalar mean over the batch.
        floor: least share of its channels that each group keeps.
        exclude: patterns of layers whose channels stay.
        seed: of dropout and of what a scorer draws.

    Raises:
        InputError: see ``find_masks``; a model that cannot be traced, or with layers whose
            channels cannot be taken out.
    """
    scorer = scorer or ProsPr()
    by = by or ("output" if isinstance(scorer, GradientScorer) else "sum")
    names = prunable(model)
    small = copy.deepcopy(model)
    graph, groups = _groups(small, batches[0][0][:1], prunable(model, exclude))
    objective = Objective(model, loss, names, seed=seed)
    data = taken(scorer, batches, 0)
    if by == "output":
        if not isinstance(scorer, GradientScorer):
            raise InputError("by", f"'output' with {scorer.name}", "'sum', or prospr or snip")
        derivative = scorer.derivative(objective, data)
        found = {group.root: _of_outputs(group, model, derivative) for group in groups}
    else:
        element = scorer.scores(objective, data, seed)
        found = {group.root: _of_weights(group, model, element) for group in groups}
    kept = select(found, density, floor=floor)
    masks = _masks(model, groups, kept)
    layers = dict(small.named_modules())
    for group in groups:
        gone = (~kept[group.root]).nonzero().flatten().tolist()
        if gone:
            root = layers[group.root]
            cut = graph.get_pruner_of_module(root).prune_out_channels
            graph.get_pruning_group(root, cut, idxs=gone).prune()
    for group in groups:
        for path, channels in group.outputs.items():
            if _num_outputs(layers[path]) != int(kept[group.root][torch.tensor(channels)].sum()):
                raise InputError("model", f"{path}, which did not shrink as wanted", "exclude it")
    return Pruned(small, masks, found, kept)


def _groups(
    model: nn.Module, example: torch.Tensor, names: Sequence[str]
) -> tuple[torch_pruning.DependencyGraph, list[Group]]:
    paths = {module: path for path, module in model.named_modules()}
    weighted = {name.rpartition(".")[0] for name in names}
    last = _last(model, example)
    stay = [m for m, path in paths.items() if isinstance(m, RESIZABLE) and m is last]
    stay += [
        m for m, p in paths.items() if isinstance(m, _ConvNd | nn.Linear) and p not in weighted
    ]
    training = model.training
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(model.eval(), example)
            found = list(graph.get_all_groups(stay, [nn.modules.conv._ConvNd, nn.Linear]))
    except Exception as error:  # whatever a model does that the tracer does not follow
        raise InputError(
            "model", f"one that cannot be traced ({error})", "a model without such a step"
        ) from error
    finally:
        model.train(training)
    groups = []
    for items in found:
        root = paths[items[0].dep.target.module]
        for item in items:
            module = item.dep.target.module
            path = paths.get(module)
            if why := _obstacle(module) if path is not None else "":
                raise InputError("model", f"{path}, {why}, among the channels of {root}", _ALLOWED)
        outputs: dict[str, tuple[int, ...]] = {}
        for item in items:
            module = item.dep.target.module
            if item.dep.handler.__name__ == "prune_out_channels" and isinstance(module, RESIZABLE):
                of = dict(zip(item.idxs, item.root_idxs, strict=True))  # in no order of its own
                if sorted(of) != list(range(_num_outputs(module))):
                    found_here = f"{paths[module]}, of whose channels only some are {root}'s"
                    raise InputError("model", found_here, "no concatenation; or exclude it")
                outputs[paths[module]] = tuple(of[k] for k in sorted(of))
        if outputs[root] != tuple(range(len(outputs[root]))):
            raise InputError("model", f"{root}, whose channels are split", "exclude it")
        groups.append(Group(root, len(outputs[root]), outputs))
    if not groups:
        raise InputError("model", "no channels that may go", "more than one layer")
    return graph, sorted(groups, key=lambda group: list(paths.values()).index(group.root))


def _obstacle(module: nn.Module) -> str:
    """Return why channels cannot be taken out of a layer, nothing where they can."""
    if not isinstance(module, RESIZABLE):
        has_weights = bool(list(module.parameters(recurse=False)))
        return f"a {type(module).__name__}" if has_weights else ""
    if isinstance(module, _BatchNorm) and not module.affine:
        return "a BatchNorm without weights, which gives out something for a masked channel"
    if isinstance(module, _ConvNd):
        depthwise = module.groups == module.in_channels == module.out_channels
        return "" if module.groups == 1 or depthwise else f"a convolution in {module.groups} groups"
    return ""


def _num_outputs(module: nn.Module) -> int:
    for key in ("out_channels", "out_features", "num_features"):
        if hasattr(module, key):
            return int(getattr(module, key))
    raise AssertionError(module)


def _last(model: nn.Module, example: torch.Tensor) -> nn.Module | None:
    """Return the layer that runs last, whose outputs are the model's."""
    seen: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: seen.append(module))
        for module in model.modules()
        if isinstance(module, _ConvNd | nn.Linear)
    ]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return seen[-1] if seen else None


def _of_outputs(group: Group, model: nn.Module, derivative: Tensors) -> torch.Tensor:
    """Return each channel's derivative by a factor on what it gives out."""
    layers = dict(model.named_modules())
    params = dict(model.named_parameters())
    normalised = [
        path
        for path in group.outputs
        if isinstance(layers[path], _BatchNorm) and f"{path}.weight" in derivative
    ]
    total = torch.zeros(group.size, dtype=torch.float64)
    for path in normalised or group.outputs:
        for kind in ("weight", "bias"):
            if (name := f"{path}.{kind}") in derivative:
                product = params[name].detach() * derivative[name]
                total.index_add_(0, *_summed(product, layers[path], group.outputs[path]))
    return total.abs()


def _of_weights(group: Group, model: nn.Module, element: Tensors) -> torch.Tensor:
    """Return the sums of the scores of each channel's filters."""
    layers = dict(model.named_modules())
    total = torch.zeros(group.size, dtype=torch.float64)
    for path, channels in group.outputs.items():
        if (name := f"{path}.weight") in element:
            total.index_add_(0, *_summed(element[name], layers[path], channels))
    return total


def _summed(
    tensor: torch.Tensor, layer: nn.Module, channels: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the channel of each of a layer's outputs, and the sum of what belongs to it."""
    rows = outputs_first(tensor, layer).reshape(len(channels), -1)
    return torch.tensor(channels), rows.double().sum(1).cpu()


def outputs_first(tensor: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Return a view of a layer's tensor whose first dimension is the layer's outputs."""
    turned = tensor.dim() > 1 and isinstance(layer, _ConvTransposeNd)
    return tensor.transpose(0, 1) if turned else tensor


def _masks(model: nn.Module, groups: Sequence[Group], kept: Tensors) -> dict[str, torch.Tensor]:
    layers = dict(model.named_modules())
    params = dict(model.named_parameters())
    masks = {}
    for group in groups:
        for path, channels in group.outputs.items():
            keep = kept[group.root][torch.tensor(channels)]
            for kind in ("weight", "bias"):
                if (tensor := params.get(f"{path}.{kind}")) is not None:
                    mask = torch.zeros(tensor.shape, dtype=torch.bool)
                    outputs_first(mask, layers[path])[keep] = True
                    masks[f"{path}.{kind}"] = mask
    return masks

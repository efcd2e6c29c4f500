"""The prune stage: a configuration or a bundle in, a pruned bundle and a report out."""

import copy
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hansa import bundle
from hansa.config import RunConfig, load
from hansa.data.federate import FederatedData, federate
from hansa.errors import InputError
from hansa.federation.federation import check_batches
from hansa.files import write_atomic
from hansa.models.masks import attach, finalise
from hansa.models.resize import channels_of
from hansa.models.task import Tensors
from hansa.pruning.channels import By, outputs_first, prune_channels
from hansa.pruning.federated import check_pruning
from hansa.pruning.find import Watch, find_masks
from hansa.pruning.objective import Batch
from hansa.pruning.options import PruningOptions
from hansa.report.pruning import report
from hansa.seeding import generator
from hansa.training import make_model, write_bundle


@dataclass(frozen=True)
class PrunedModel:
    """What the stage made.

    Attributes:
        path: its folder.
        bundle: the pruned model.
        summary: densities, parameters, FLOPs and layers, as JSON values.
        report: the page about it.
    """

    path: Path
    bundle: bundle.Bundle
    summary: dict[str, Any]
    report: Path


def prune(
    source: str | Path | Mapping[str, Any],
    *,
    overrides: Iterable[str] = (),
    structured: bool = False,
    by: By | None = None,
    out: str | Path | None = None,
    watch: Watch | None = None,
) -> PrunedModel:
    """Prune a model before it is trained, on the data of one place.

    All clients' training samples of the configuration count as one data set; to leave them where
    they are, put ``[pruning]`` into the configuration of ``hansa train``.

    Args:
        source: a configuration with ``[pruning]``, as for ``train``, or the folder of a bundle, of
            which the configuration is taken as well.
        overrides: ``key=value`` with dotted keys, such as ``pruning.density=0.02``.
        structured: whether whole channels go and the network shrinks; ``density`` is then the
            share of channels that stay.
        by: what a channel is scored by, see ``prune_channels``.
        out: the folder to make; by default ``NAME-METHOD-DENSITY`` beside the runs.
        watch: called with the iteration and their number.

    Raises:
        InputError: input that cannot be used.
    """
    config = _configured(source, overrides)
    if config.text is not None:
        raise InputError("model.name", repr(config.model.name), "an image model, to be pruned")
    options = config.pruning
    if options is None:
        raise InputError("pruning", "nothing", "a table [pruning] with a density, or --density")
    data = federate(config.data, config.seed)
    model, architecture, parent = make_model(config, data)
    check_pruning(model, options, federated=False)
    batches = list(_batches(config, options, data))
    if len(batches[0][1]) == 1:
        check_batches(model, data.clients, 1)
    if structured:
        _check_structured(options)
        made = _without_channels(config, options, model, batches, by)
        architecture = architecture.model_copy(update={"channels": channels_of(made.model)})
    else:
        made = _without_weights(config, options, model, batches, watch)
    summary = {"method": options.method, "structured": structured, **made.figures}
    name = f"{config.name}-{options.method}-{options.density:g}{'-channels' if structured else ''}"
    path = Path(out) if out is not None else Path(config.output) / name
    pruned = write_bundle(
        path / "bundle",
        "prune",
        made.model.state_dict(),
        summary,
        config=config,
        architecture=architecture,
        data=data.fingerprint,
        kept=made.masks,
        parent=parent,
        labels=data.classes,
    )
    if structured:  # it differs from time to time, and so has no place in the bundle
        summary["forward_seconds"] = _speed(model, made.model, batches[0][0])
    write_atomic(path / "summary.json", json.dumps(summary, indent=2) + "\n")
    page = report(path / "report.html", config, summary, made.scores, made.kept)
    return PrunedModel(path, pruned, summary, page)


@dataclass(frozen=True)
class _Made:
    """A pruned model, what of it was kept by which scores, and what that means in figures."""

    model: nn.Module
    masks: Tensors
    scores: Tensors
    kept: Tensors
    figures: dict[str, Any]


def _configured(source: str | Path | Mapping[str, Any], overrides: Iterable[str]) -> RunConfig:
    if isinstance(source, Mapping) or not (Path(source) / bundle.CARD).is_file():
        return load(source, overrides)
    card = bundle.read_bundle(source).card
    values = {key: value for key, value in card["config"].items() if key != "pruning"}
    values["model"] = {**values.get("model", {}), "bundle": str(source)}
    path = Path(source).resolve()
    name = path.parent.name if path.name == "bundle" else path.name  # as runs call theirs
    return load({"name": name, **values}, overrides)


def _batches(config: RunConfig, options: PruningOptions, data: FederatedData) -> Iterator[Batch]:
    """Yield batches for all iterations, of one size, from as many epochs as that takes."""
    parts = [client.batch("train") for client in data.clients.values()]
    inputs, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    size = min(options.batch_size or config.training.batch_size, len(labels))
    orders = (
        torch.randperm(len(labels), generator=generator(config.seed, "prune", epoch)).split(size)
        for epoch in count()
    )
    chosen = (part for order in orders for part in order if len(part) == size)
    for part in islice(chosen, max(1, options.scorer.num_batches * options.iterations)):
        yield inputs[part], labels[part]


def _check_structured(options: PruningOptions) -> None:
    plain = PruningOptions(density=1.0)
    for key in ("iterations", "scope", "densities"):
        if getattr(options, key) != getattr(plain, key):
            raise InputError(f"pruning.{key}", getattr(options, key), "nothing with --structured")


def _without_weights(
    config: RunConfig,
    options: PruningOptions,
    model: nn.Module,
    batches: list[Batch],
    watch: Watch | None,
) -> _Made:
    about = options.model_dump(exclude={"method", "options", "batch_size", "combine"})
    found = find_masks(
        model, batches, scorer=options.scorer, seed=config.seed, watch=watch, **about
    )
    flops, by_layer = _flops(model, batches[0][0][:1])
    small = copy.deepcopy(model)
    attach(small, found.masks)
    finalise(small)
    weights = sum(p.numel() for p in model.parameters())
    gone = sum(int((~mask).sum()) for mask in found.masks.values())
    densities = {key: float(mask.double().mean()) for key, mask in found.masks.items()}
    saved = sum(n * (1 - densities.get(f"{path}.weight", 1.0)) for path, n in by_layer.items())
    layers = dict(model.named_modules())
    turned = {
        key: outputs_first(mask, layers[key.rpartition(".")[0]])
        for key, mask in found.masks.items()
    }
    figures = _figures(turned, (weights, weights - gone), (flops, round(flops - saved)))
    return _Made(small, found.masks, found.scores, found.masks, figures)


def _without_channels(
    config: RunConfig,
    options: PruningOptions,
    model: nn.Module,
    batches: list[Batch],
    by: By | None,
) -> _Made:
    found = prune_channels(
        model,
        batches,
        options.density,
        options.scorer,
        by=by,
        floor=options.floor,
        exclude=options.exclude,
        seed=config.seed,
    )
    parameters, flops = [], []
    for each in (model, found.model):
        parameters.append(sum(p.numel() for p in each.parameters()))
        flops.append(_flops(each, batches[0][0][:1])[0])
    figures = _figures(found.kept, tuple(parameters), tuple(flops))
    return _Made(found.model, {}, found.scores, found.kept, figures)


def _figures(kept: Tensors, parameters: tuple[int, ...], flops: tuple[int, ...]) -> dict[str, Any]:
    layers: list[dict[str, Any]] = [
        {
            "name": name,
            "total": mask.numel(),
            "kept": int(mask.sum()),
            # Outputs that no weight leads to any more.
            "dead": int((~mask.flatten(1).any(1)).sum()) if mask.dim() > 1 else 0,
        }
        for name, mask in kept.items()
    ]
    return {
        "density": sum(layer["kept"] for layer in layers) / sum(layer["total"] for layer in layers),
        "parameters": dict(zip(("before", "after"), parameters, strict=True)),
        "flops": dict(zip(("before", "after"), flops, strict=True)),
        "layers": layers,
    }


def _flops(model: nn.Module, example: torch.Tensor) -> tuple[int, dict[str, int]]:
    """Return the floating-point operations of one sample's forward pass, and those by layer.

    What runs outside of any layer is part of the first number only.
    """
    training = model.training
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it hides its products from the counter
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        model.train(training)
    counts = counter.get_flop_counts()
    whole = type(model).__name__
    layers = {
        path: sum(counts.get(f"{whole}.{path}", {}).values())
        for path, module in model.named_modules()
        if path and not list(module.children())
    }
    return sum(counts["Global"].values()), layers


def _speed(before: nn.Module, after: nn.Module, inputs: torch.Tensor) -> dict[str, float]:
    """Return the median seconds of a forward pass of a batch, the two models by turns."""
    seconds: dict[str, list[float]] = {"before": [], "after": []}
    with torch.no_grad():
        for _ in range(12):
            for name, model in (("before", before), ("after", after)):
                start = perf_counter()
                model.eval()(inputs)
                seconds[name].append(perf_counter() - start)
    return {name: statistics.median(values[2:]) for name, values in seconds.items()}

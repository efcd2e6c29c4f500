"""Which way a whole model trains: its layers' choices, or all of it dense but masked.

What is faster for each layer alone need not be for the network: layers off the kernels between
layers on them make maps turn to and fro, and a model that is off the kernels altogether is often
faster channels-last. So a whole step is timed in each way, once on a machine, and remembered.
"""

import copy
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hansa.sparse.fusion import is_more_than_its_steps
from hansa.sparse.kernels import required
from hansa.sparse.probe import clock, remembered
from hansa.sparse.thresholds import plain

if TYPE_CHECKING:
    from hansa.sparse.convert import SparseModel

_log = logging.getLogger("hansa.sparse")

CLEAR = 0.5
"""Share of its layers' time by the reference that a model saves at least, to need no timing."""
LEAST_TURNS, MOST_TURNS = 5, 25
"""How often a whole step is timed in each way: more often where ways are near each other."""
NEAR = 1.1
"""How many times longer than in the fastest way a step takes, at most, to be timed further."""
LONGEST = 60.0
"""Seconds after which steps are timed no further, once each had its least number of turns."""


@dataclass(frozen=True)
class Way:
    """One way to train a model.

    Attributes:
        compiled: layer -> whether it runs on the kernels.
        last: whether maps lie channels-last where no layer does.
    """

    compiled: Mapping[str, bool] = field(default_factory=dict)
    last: bool = False


def fastest(model: "SparseModel", inputs: torch.Tensor, ways: Mapping[str, Way]) -> str:
    """Return the name of the way whose whole steps are fastest, measured or remembered.

    The first one is returned for a model that cannot be timed on numbers made up for it: one with
    hooks, one whose code draws or whose ``fuse`` is off, one that returns no tensor.

    Args:
        model: the model, whose layers and random numbers are left as they are.
        inputs: any batch; only its shape counts.
        ways: what is compared, by name.
    """
    first = next(iter(ways))
    parts = dict(model.plain.named_modules())
    if not model.fuse or any(map(is_more_than_its_steps, parts.values())):
        return first
    rule, shape = model.rule, (model.batch_size, *inputs.shape[1:])
    about = {
        "model": [_described(name, part) for name, part in parts.items()],
        "case": [shape, rule.sparsity, rule.inputs, rule.refresh, rule.fixed],
        "ways": [[name, sorted(way.compiled.items()), way.last] for name, way in ways.items()],
    }
    try:
        took = remembered(about, ways, lambda: measure(model, shape, ways))
    except Exception:  # inputs of another kind than numbers: what is known of the layers decides
        return first
    return min(ways, key=lambda name: took[name])


def _described(name: str, part: nn.Module) -> list[Any]:
    own = [list(each.shape) for each in part.parameters(recurse=False)]
    return [name, type(part).__qualname__, part.extra_repr(), own]


def measure(
    model: "SparseModel", shape: tuple[int, ...], ways: Mapping[str, Way]
) -> dict[str, float]:
    """Return how long a forward and backward pass takes in each way, relative to one another.

    Ways take turns, and in each turn they are compared with each other, so that what slows the
    machine down for a while counts for none. Those that are clearly slower are soon left out.

    Raises:
        Exception: whatever the model raises on such inputs.
    """
    required()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    twin = copy.deepcopy(model).train()

    def seconds(way: Way) -> float:
        twin.take(way)
        twin.zero_grad(set_to_none=True)
        start = clock()
        twin(x).sum().backward()
        return clock() - start

    names = ", ".join(ways)
    _log.info("measuring for about %.0f seconds at most how a step is fastest: %s", LONGEST, names)
    turns: list[dict[str, float]] = []
    near, began = dict(ways), time.monotonic()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for way in ways.values():  # warms up
            seconds(way)
        while len(near) > 1 and len(turns) < MOST_TURNS:
            order = list(near) if len(turns) % 2 else reversed(near)  # none always follows another
            turns.append({name: seconds(near[name]) for name in order})
            if len(turns) >= LEAST_TURNS:
                cost = compared(turns)
                most = NEAR * min(cost.values())
                near = {name: way for name, way in near.items() if cost[name] <= most}
                if time.monotonic() - began > LONGEST:
                    break
    return compared(turns)


def compared(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return what takes turns -> median, over turns, of its seconds relative to that turn's mean.

    Args:
        turns: seconds by name. Names may be missing from later turns; means are taken of those
            that are in the last, so that all are measured by the same.
    """
    means = [statistics.fmean(turn[name] for name in turns[-1]) for turn in turns]
    return {
        name: statistics.median(
            turn[name] / mean for turn, mean in zip(turns, means, strict=True) if name in turn
        )
        for name in turns[0]
    }


def first_inputs(model: "SparseModel", inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return each sparse layer's first input, for one sample.

    Empty where the model cannot be looked at.
    """
    seen: dict[str, torch.Tensor] = {}

    def look(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            seen.setdefault(name, arguments[0].detach())

        return hook

    layers = model.sparse_layers.items()
    hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in layers]
    modes = {module: module.training for module in (model, *model.plain.modules())}
    model.eval()
    try:
        model.plain(torch.zeros_like(inputs[:1]))
    except Exception:  # inputs of another kind: what cannot be looked at stays as it is
        seen.clear()
    finally:
        for module, mode in modes.items():
            module.training = mode
        for hook in hooks:
            hook.remove()
    return seen


def may_be_last(model: nn.Module) -> bool:
    """Tell whether a model may train channels-last.

    oneDNN writes past its memory in the weight's gradient of a 1x1 convolution with a stride over
    fewer channels than fill its block, 8 with AVX2 and 16 with AVX-512 (its issue 6035).
    """
    convolutions = (each for each in model.modules() if isinstance(each, nn.Conv2d))
    return not any(
        each.kernel_size == (1, 1)
        and each.stride != (1, 1)
        and each.in_channels // each.groups < 16
        for each in convolutions
    )


def turned(x: torch.Tensor) -> torch.Tensor:
    """Return maps channels-last; anything else as it is."""
    if x.dim() != 4 or not plain(x):
        return x
    return x.contiguous(memory_format=torch.channels_last)

"""Which of two ways is faster for a layer: timed once on this machine, and remembered.

What was measured lies in the user's cache, one small file for each layer's size (and for each
whole step, see ``choice``), so that all processes and a resumed run decide alike.
"""

import contextlib
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hansa.files import cache_folder
from hansa.processes import processor
from hansa.sparse.convolution import Convolution, Geometry
from hansa.sparse.functions import Compiled, Shape, reference
from hansa.sparse.kernels import required
from hansa.sparse.layout import logical, outer
from hansa.sparse.thresholds import threshold

REPEATS = 5


@dataclass(frozen=True)
class Timing:
    """Seconds of a forward and backward pass, the medians of turns taken one after the other.

    Of the processor's time where one thread works, see ``clock``.
    """

    compiled: float
    reference: float


def clock() -> float:
    """Return the seconds by which ways are compared.

    One thread counts what the processor spent on it, so that others on the machine do not.
    """
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timing(
    geometry: Geometry, batch: int, sparsity: float, inputs: float, linear: bool = False
) -> Timing:
    """Return how long a layer takes on the kernels and without them, measured or remembered.

    Args:
        geometry: the layer's sizes.
        batch: samples.
        sparsity: share of weights that are not used.
        inputs: share of inputs that the weight's gradient leaves out.
        linear: whether it is a linear layer.
    """
    about = {"geometry": asdict(geometry), "case": [batch, sparsity, inputs, linear]}
    fields = ("compiled", "reference")
    took = remembered(
        about, fields, lambda: asdict(measure(geometry, batch, sparsity, inputs, linear))
    )
    return Timing(**took)


def remembered(
    about: dict[str, Any], fields: Collection[str], measured_by: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """Return seconds by name, measured now or once before on this machine.

    Args:
        about: what was measured, in JSON's types; the machine is added here.
        fields: the names.
        measured_by: measures them.
    """
    found = required()
    about = about | {
        "machine": [torch.__version__, processor(), found.isa, torch.get_num_threads()],
        "library": json.loads(found.path.with_suffix(".json").read_bytes())["library"],
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    try:
        path = cache_folder("kernels") / f"{key}.json"
    except (OSError, RuntimeError):  # without a place for it, it is measured again
        return measured_by()
    if (known := _read(path, fields)) is not None:
        return known
    measured = measured_by()
    # The first to have measured is believed by all, itself included, so that all decide alike.
    mine = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        mine.write_text(json.dumps(measured))
        if path.exists() and _read(path, fields) is None:  # damaged
            mine.replace(path)
        else:
            with contextlib.suppress(FileExistsError):
                os.link(mine, path)
            mine.unlink()
    except OSError:
        return measured
    return _read(path, fields) or measured


def _read(path: Path, fields: Collection[str]) -> dict[str, float] | None:
    try:
        known: dict[str, float] = json.loads(path.read_bytes())
        return {name: float(known[name]) for name in fields}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def measure(
    geometry: Geometry, batch: int, sparsity: float, inputs: float, linear: bool = False
) -> Timing:
    """Measure what ``timing`` remembers."""
    g = geometry
    random = torch.Generator().manual_seed(0)
    x = logical(torch.randn(g.inputs, g.height, g.width, batch, generator=random).relu_())
    weight = torch.randn(g.outputs, g.inputs, *g.kernel, generator=random)
    d = logical(torch.randn(g.outputs, *g.out, batch, generator=random))
    plain_x, plain_d = outer(x), outer(d)
    if linear:
        x, d, plain_x, plain_d = (t.flatten(1) for t in (x, d, plain_x, plain_d))
        weight = weight.flatten(1)
    weight.requires_grad_()
    x.requires_grad_(), plain_x.requires_grad_()
    least = threshold(weight, sparsity), threshold(x, inputs)
    shape = None if linear else Shape(g.stride, g.padding)
    lists = Convolution(geometry, batch)
    numbers = float(least[0]), float(least[1])

    def compiled() -> torch.Tensor:
        y: torch.Tensor = Compiled.apply(x, weight, None, *numbers, lists, False)
        return y

    def plainly() -> torch.Tensor:
        return reference(plain_x, weight, None, *least, shape)

    def seconds(call: Callable[[], torch.Tensor], gradient: torch.Tensor) -> float:
        start = clock()
        call().backward(gradient)
        return clock() - start

    with torch.enable_grad():
        turns = [(seconds(compiled, d), seconds(plainly, plain_d)) for _ in range(REPEATS + 1)]
    first, second = zip(*turns[1:], strict=True)  # the first turn warms up
    return Timing(statistics.median(first), statistics.median(second))

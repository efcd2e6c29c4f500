"""Whether latencies repeat on this machine, and what tells them beforehand.

    python benchmarks/search_latency.py [--json] [--models 24] [--batch 1] [--backend torch]

Random models of Blox, width 8, inputs of 16x16, one thread. ``agreement`` is Spearman's correlation
of two interleaved repeats of the least processor time, which should reach 0.9; ``layers`` that of
the number of convolutions and linear layers with it, ``multiply_adds`` that of multiply-adds;
``wall_median`` how the wall's median ranks the same models. Fewer than eight models have no
agreement.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

from torch import nn

from hansa.models.blox import Blox
from hansa.models.blox_space import NUM_MODELS, multiply_adds
from hansa.search.profile import ProfileOptions, agreement, difference, profile, rank_correlation
from hansa.seeding import global_stream, numpy_generator

_SHAPE = (3, 16, 16)
_CLASSES, _WIDTH = 12, 8


def maker(model: int) -> Callable[[], nn.Module]:
    """Return what makes a model."""

    def make() -> nn.Module:
        with global_stream(0, "init", model):
            return Blox(_SHAPE, _CLASSES, model, width=_WIDTH)

    return make


def num_layers(model: int) -> int:
    """Return a model's number of convolutions and linear layers."""
    return sum(isinstance(each, nn.Conv2d | nn.Linear) for each in maker(model)().modules())


def measure(num: int, batch: int, backend: str, seed: int = 0) -> dict[str, Any]:
    """Profile random models once and return what the module's docstring names."""
    models = [int(m) for m in numpy_generator(seed, "models").choice(NUM_MODELS, num, False)]
    options = ProfileOptions.model_validate(
        {"batches": (batch,), "backend": backend, "retries": 0, "force": True}
    )
    rows = profile([(model, maker(model)) for model in models], _SHAPE, options)
    least = [row.cpu_min for row in rows]
    adds = multiply_adds(models, _WIDTH, _SHAPE[1], _CLASSES)
    return {
        "models": num,
        "batch": batch,
        "backend": backend,
        "agreement": agreement(rows),
        "difference": difference(rows),
        "layers": rank_correlation([float(num_layers(model)) for model in models], least),
        "multiply_adds": rank_correlation(adds.astype(float), least),
        "wall_median": rank_correlation([row.wall_median for row in rows], least),
        "milliseconds": [1e3 * min(least), 1e3 * max(least)],
        "load": [min(row.load for row in rows), max(row.load for row in rows)],
        "processor": rows[0].processor,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--models", type=int, default=24)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--backend", choices=("torch", "onnxruntime"), default="torch")
    given = parser.parse_args()
    found = measure(given.models, given.batch, given.backend)
    print(json.dumps(found) if given.json else "\n".join(f"{k:<14} {v}" for k, v in found.items()))


if __name__ == "__main__":
    main()

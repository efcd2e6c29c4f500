"""How much faster sparse training is than the best dense training in PyTorch, and what it costs.

Layers: convolutions and a linear layer, forward and backward through autograd, at several
sparsities, against PyTorch's best dense form (contiguous or channels-last) in float32, and in
bfloat16 where the processor has units for it (elsewhere it takes some twenty times as long);
PyTorch's own sparse formats beside them, with the rearranging that a convolution needs (im2col)
given for free. ``products``: the three products called by themselves, caches warm, without autograd
and with lists given, the best dense form of each against ours.
Step: one whole training step of ResNet-18 (BatchNorm, 32 pixels, batch 32: forward, loss, backward,
SGD), with all layers on the kernels, and with the automatic choice. Half (only where it is asked
for): the same at 50 % alone, where all ways are nearly alike, in more turns; a figure is the median
of what each turn gives by itself, its quartiles beside it. Run: one federated run of ``zerofl`` at
95 % against ``fedavg`` of the same model and schedule, end to end. With ``--data`` also accuracy,
by ``sparse_accuracy.py``.

All that is compared takes turns within one process; a figure is a ratio of medians where nothing
else is said, with one thread of the processor's time, so that others on the machine hardly count.
Every number of threads has a process of its own, since PyTorch does not take a new number up
reliably. Energy is read where the system has counters (powercap).

    python benchmarks/sparse_training.py [--quick] [--json] [--threads 1,2]
        [--only layers,step,half,run,accuracy] [--data PATTERN]

The object that ``--json`` prints has ``step_speedup``: sparsity -> whole step of ResNet-18 of width
64, one thread, automatic choice, over the best dense float32.
"""

import argparse
import copy
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import hansa
from hansa.data.clients import Client
from hansa.federation.engines.plan import EngineOptions
from hansa.federation.methods import FedAvg, Method
from hansa.federation.methods.zerofl import ZeroFL
from hansa.federation.optimizer import Training
from hansa.models.images import ResNet18
from hansa.sparse.convert import sparsify
from hansa.sparse.convolution import Convolution, Geometry
from hansa.sparse.functions import Compiled
from hansa.sparse.kernels import find
from hansa.sparse.layers import Path
from hansa.sparse.layout import logical
from hansa.sparse.probe import clock
from hansa.sparse.thresholds import pruned, threshold

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
LAYERS = {
    "conv 64->64, 16x16": Geometry(64, 16, 16, 64, (3, 3), (1, 1), (1, 1)),
    "conv 64->64, 32x32": Geometry(64, 32, 32, 64, (3, 3), (1, 1), (1, 1)),
    "conv 64->128, 32x32, stride 2": Geometry(64, 32, 32, 128, (3, 3), (2, 2), (1, 1)),
    "conv 256->256, 8x8": Geometry(256, 8, 8, 256, (3, 3), (1, 1), (1, 1)),
    "conv 512->512, 4x4": Geometry(512, 4, 4, 512, (3, 3), (1, 1), (1, 1)),
    "linear 1024->1024": Geometry(1024, 1, 1, 1024),
}
BATCH = 32
HALF_TURNS = {64: 41, 32: 121}
QUICK = (0.5, 0.9, 0.95)
PARTS = ("layers", "step", "half", "run", "accuracy")
DENSE = ("dense", "dense, channels last")
Calls = Mapping[str, Callable[[], object]]


def medians(calls: Calls, turns: int, warm: bool = False) -> dict[str, float]:
    """Return the median milliseconds of each call; they take turns, the first is not counted.

    With ``warm`` each is called once more before, so that none finds what another left in caches.
    """
    took = milliseconds(calls, turns, warm)
    return {name: statistics.median(values) for name, values in took.items()}


def milliseconds(calls: Calls, turns: int, warm: bool = False) -> dict[str, list[float]]:
    """Return what each call takes in each turn, see ``medians``; every other one goes backwards."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            if warm:
                calls[name]()
            start = clock()
            calls[name]()
            if turn:
                took[name].append(1e3 * (clock() - start))
    return took


def has_bfloat16() -> bool:
    """Tell whether this processor multiplies in bfloat16, as far as PyTorch may use it."""
    able = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return able and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def layers(turns: int, sparsities: tuple[float, ...], formats: bool) -> dict[str, Any]:
    """Return layer -> sparsity -> dense over sparse, forward and backward together.

    Args:
        turns: how often each is timed.
        sparsities: shares of weights and inputs.
        formats: whether PyTorch's sparse formats are timed too.
    """
    result: dict[str, Any] = {}
    for name, g in LAYERS.items():
        random = torch.Generator().manual_seed(0)
        linear = g.height == 1
        batch = 64 if linear else BATCH
        x = torch.randn(batch, g.inputs, g.height, g.width, generator=random).relu_()
        weight = torch.randn(g.outputs, g.inputs, *g.kernel, generator=random)
        d = torch.randn(batch, g.outputs, *g.out, generator=random)
        result[name] = {}
        for sparsity in sparsities:
            calls = _dense(g, x, weight, d, linear) | _sparse(g, x, weight, d, sparsity, linear)
            if formats:
                calls |= _formats(g, x, weight, d, sparsity, linear)
            took = medians(calls, turns)
            dense = min(took[name] for name in DENSE)
            ratios = {key: dense / value for key, value in took.items() if key != "dense"}
            ratios.pop("dense, channels last")
            if not linear:
                ratios["products"] = _products(g, x, weight, d, sparsity, turns)
            result[name][f"{sparsity:g}"] = {"dense_ms": dense, **ratios}
    return result


def _products(
    g: Geometry, x: torch.Tensor, weight: torch.Tensor, d: torch.Tensor, sparsity: float, turns: int
) -> float:
    """Return how many times as fast output and both gradients are by the kernels alone."""
    backward = torch.ops.aten.convolution_backward.default

    def dense(
        x: torch.Tensor, weight: torch.Tensor, d: torch.Tensor
    ) -> tuple[Callable[[], object], ...]:
        numbers = (g.stride, g.padding, (1, 1), False, (0, 0), 1)
        return (
            lambda: F.conv2d(x, weight, None, g.stride, g.padding),
            lambda: backward(d, x, weight, None, *numbers, (True, False, False)),
            lambda: backward(d, x, weight, None, *numbers, (False, True, False)),
        )

    lists, least_input = Convolution(g, len(x)), float(threshold(x, sparsity))
    lists.take(weight, float(threshold(weight, sparsity)))
    inner, inner_d = (t.movedim(0, -1).contiguous() for t in (x, d))
    ways = {
        "contiguous": dense(x, weight, d),
        "last": dense(_last(x), _last(weight), _last(d)),
        "sparse": (
            lambda: lists.forward(inner),
            lambda: lists.input_gradient(inner_d),
            lambda: lists.weight_gradient(inner, least_input, inner_d),
        ),
    }
    calls = {f"{way} {i}": call for way, three in ways.items() for i, call in enumerate(three)}
    took = medians(calls, 5 * turns, warm=True)
    best = sum(min(took[f"contiguous {i}"], took[f"last {i}"]) for i in range(3))
    return best / sum(took[f"sparse {i}"] for i in range(3))


def _dense(
    g: Geometry, x: torch.Tensor, weight: torch.Tensor, d: torch.Tensor, linear: bool
) -> dict[str, Callable[[], object]]:
    def passes(x: torch.Tensor, weight: torch.Tensor, d: torch.Tensor) -> Callable[[], object]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()

        def call() -> object:
            y = F.linear(x, weight) if linear else F.conv2d(x, weight, None, g.stride, g.padding)
            return torch.autograd.grad(y, (x, weight), d)

        return call

    if linear:
        x, weight, d = last = x.flatten(1), weight.flatten(1), d.flatten(1)
    else:
        last = _last(x), _last(weight), _last(d)
    calls = {"dense": passes(x, weight, d), "dense, channels last": passes(*last)}
    if has_bfloat16():
        low = last[0].bfloat16(), last[1].bfloat16(), last[2].bfloat16()
        calls["dense, bfloat16"] = passes(*low)
    return calls


def _last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _sparse(
    g: Geometry,
    x: torch.Tensor,
    weight: torch.Tensor,
    d: torch.Tensor,
    sparsity: float,
    linear: bool,
) -> dict[str, Callable[[], object]]:
    least_weight, least_input = (float(threshold(t, sparsity)) for t in (weight, x))
    lists = Convolution(g, len(x))
    inner, inner_d = (logical(t.movedim(0, -1).contiguous()) for t in (x, d))
    dense_weight = weight
    if linear:
        inner, inner_d, dense_weight = inner.flatten(1), inner_d.flatten(1), weight.flatten(1)
    inner.requires_grad_()
    dense_weight = dense_weight.detach().requires_grad_()

    def passes(fixed: bool) -> Callable[[], object]:
        def call() -> object:
            y = Compiled.apply(inner, dense_weight, None, least_weight, least_input, lists, fixed)
            return torch.autograd.grad(y, (inner, dense_weight), inner_d)

        return call

    return {"sparse": passes(False), "sparse, fixed mask": passes(True)}


def _formats(
    g: Geometry,
    x: torch.Tensor,
    weight: torch.Tensor,
    d: torch.Tensor,
    sparsity: float,
    linear: bool,
) -> dict[str, Callable[[], object]]:
    """Return the same products in PyTorch's sparse formats, columns of the images given."""
    if linear:
        columns = x.flatten(1).t().contiguous()
    elif g.stride == (1, 1):
        unfolded = F.unfold(x, g.kernel, padding=g.padding)
        columns = unfolded.transpose(0, 1).flatten(1).contiguous()
    else:
        return {}
    matrix, gradient = weight.flatten(1), d.transpose(0, 1).flatten(1).contiguous()
    used = pruned(matrix, threshold(matrix, sparsity))
    rows, turned = used.to_sparse_csr(), used.t().contiguous().to_sparse_csr()
    side = 16
    blocks = torch.rand(matrix.shape[0] // side, matrix.shape[1] // side) >= sparsity
    spread = blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)
    blocked = torch.where(spread, matrix, 0.0).to_sparse_bsr((side, side))

    def csr() -> object:
        torch.sparse.mm(rows, columns)
        torch.sparse.mm(turned, gradient)
        return torch.sparse.sampled_addmm(rows, gradient, columns.t(), beta=0.0)

    return {"torch CSR": csr, "torch BSR 16x16, forward only": lambda: blocked @ columns}


def step(width: int, turns: int, sparsities: tuple[float, ...]) -> dict[str, Any]:
    """Return the whole step of ResNet-18: what is compared -> dense float32 over it."""
    took = medians(_steps(width, sparsities), turns)
    dense = min(took[name] for name in DENSE)
    return {"dense_ms": dense, **{key: dense / value for key, value in took.items()}}


def half(width: int, turns: int) -> dict[str, Any]:
    """Return the whole step at 50 %: what is compared -> quartiles of dense float32 over it."""
    took = milliseconds(_steps(width, (0.5,)), turns)
    best = min((took[name] for name in DENSE), key=statistics.median)
    ratios = {
        key: [dense / each for dense, each in zip(best, values, strict=True)]
        for key, values in took.items()
    }
    quartiles = {key: statistics.quantiles(values) for key, values in ratios.items()}
    return {"dense_ms": statistics.median(best), **quartiles}


def _steps(width: int, sparsities: tuple[float, ...]) -> dict[str, Callable[[], object]]:
    """Return a call for each way to take a step of ResNet-18."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 3, 32, 32, generator=random)
    labels = torch.randint(0, 10, (BATCH,), generator=random)
    torch.manual_seed(0)
    base = ResNet18((3, 32, 32), 10, width=width, norm="batch")
    turned = _last(x)

    def train(model: nn.Module, x: torch.Tensor = x, low: bool = False) -> Callable[[], object]:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)

        def call() -> object:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            return loss

        return call

    calls = {
        "dense": train(copy.deepcopy(base)),
        "dense, channels last": train(_turned(base), turned),
    }
    if has_bfloat16():
        calls["dense, bfloat16"] = train(_turned(base), turned, True)
    paths: tuple[Path, ...] = ("auto",) if sparsities == QUICK else ("kernels", "auto")
    for sparsity in sparsities:
        for path in paths:
            calls[f"{path} {sparsity:g}"] = train(sparsify(base, sparsity, path=path))
        if sparsity >= 0.9 and sparsities != QUICK:
            fixed = sparsify(base, sparsity, path="kernels", fixed=True)
            calls[f"fixed mask {sparsity:g}"] = train(fixed)
    return calls


def _turned(model: nn.Module) -> nn.Module:
    """Return a copy whose weights lie channels last."""
    copied: Any = copy.deepcopy(model)
    turned: nn.Module = copied.to(memory_format=torch.channels_last)
    return turned


def run(rounds: int) -> dict[str, Any]:
    """Return seconds of a federated run of ZeroFL and of FedAvg, same model, data and schedule.

    All of it runs in this process, whose time on the processor is what counts.
    """
    random = torch.Generator().manual_seed(0)
    clients = {
        f"client-{k}": Client.of(
            train=(torch.randn(128, 3, 32, 32, generator=random), torch.arange(128) % 10),
            test=(torch.randn(16, 3, 32, 32, generator=random), torch.arange(16) % 10),
        )
        for k in range(2)
    }
    methods: dict[str, Method] = {"fedavg": FedAvg(), "zerofl": ZeroFL(sparsity=0.95)}
    took: dict[str, list[float]] = {name: [] for name in methods}
    training = Training(lr=0.05, batch_size=BATCH, epochs=1)
    for turn in range(rounds + 1):
        for name, method in methods.items():
            torch.manual_seed(0)
            model = ResNet18((3, 32, 32), 10)
            engine = EngineOptions(kind="sequential")
            federation = hansa.Federation(model, clients, method, training, engine=engine)
            start = time.process_time()
            federation.run(1, score_every=0)
            if turn:  # the first turn also times layers
                took[name].append(time.process_time() - start)
    seconds = {name: statistics.median(values) for name, values in took.items()}
    return {**seconds, "speedup": seconds["fedavg"] / seconds["zerofl"]}


def _energy() -> int | None:
    """Return microjoules that the processor has used so far, where the system counts them."""
    counters = pathlib.Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj")
    try:
        return sum(int(path.read_text()) for path in counters) or None
    except OSError:
        return None


def measure(only: list[str], quick: bool, threads: int) -> dict[str, Any]:
    """Return what was asked for, in this process."""
    torch.set_num_threads(threads)
    turns = 3 if quick else 9
    before, result = _energy(), dict[str, Any]()
    if "layers" in only:
        result["layers"] = layers(turns, QUICK if quick else SPARSITIES, not quick)
    if "step" in only:
        sparsities = QUICK if quick else SPARSITIES
        widths = (64,) if quick else (64, 32)
        result["step"] = {str(width): step(width, turns, sparsities) for width in widths}
    if "half" in only:
        result["half"] = {str(width): half(width, turns) for width, turns in HALF_TURNS.items()}
    if "run" in only and threads == 1:
        result["run"] = run(1 if quick else 5)
    after = _energy()
    if before is not None and after is not None:
        result["joules"] = (after - before) / 1e6
    return result


def show(threads: str, result: Mapping[str, Any]) -> None:
    """Print tables: how many times faster than dense float32 each way is."""
    print(f"\n# {threads} thread(s)")
    for name, by_sparsity in result.get("layers", {}).items():
        first = next(iter(by_sparsity.values()))
        columns = [key for key in first if key != "dense_ms"]
        print(f"\n{name}: dense float32 {first['dense_ms']:.2f} ms\n")
        print("| sparsity | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
        for sparsity, row in by_sparsity.items():
            print(f"| {sparsity} | " + " | ".join(f"{row[key]:.2f}" for key in columns) + " |")
    for width, row in [*result.get("step", {}).items(), *result.get("half", {}).items()]:
        print(f"\nstep of ResNet-18, width {width}: dense float32 {row['dense_ms']:.0f} ms\n")
        print("| | times as fast |\n|---|---|")
        for key, value in row.items():
            if key != "dense_ms":
                print(f"| {key} | {_figure(value)} |")
    if found := result.get("run"):
        print("\nfederated run of ResNet-18, width 64, 95 %: one round, seconds\n")
        print("| fedavg | zerofl | times as fast |\n|---|---|---|")
        print(f"| {found['fedavg']:.2f} | {found['zerofl']:.2f} | {found['speedup']:.2f} |")
    if "joules" in result:
        print(f"\nenergy of all that: {result['joules']:.0f} J")


def _figure(value: float | list[float]) -> str:
    if not isinstance(value, list):
        return f"{value:.2f}"
    low, middle, high = value  # quartiles
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Measure in one process per number of threads, and print tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="fewer turns, sparsities, widths and rivals"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, one after the other")
    parser.add_argument("--only", default="layers,step,run,accuracy", help="what to measure")
    parser.add_argument("--data", help="pattern of CIFAR-10's Parquet files, for accuracy")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    only = options.only.split(",")
    if unknown := [each for each in only if each not in PARTS]:
        parser.error(f"--only: found {unknown[0]!r}; allowed: {', '.join(PARTS)}")
    library, why = find()
    if library is None:
        parser.error(f"there are no compiled kernels to measure: {why}")
    if options.child:
        print(json.dumps(measure(only, options.quick, options.child)))
        return
    results: dict[str, Any] = {}
    for threads in options.threads.split(",") if set(only) - {"accuracy"} else ():
        command = [sys.executable, __file__, "--child", threads, "--only", options.only]
        command += ["--quick"] if options.quick else []
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        child = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        results[threads] = json.loads(child.stdout.splitlines()[-1])
        show(threads, results[threads])
    summary: dict[str, Any] = {"threads": results, "kernels": library.isa}
    if options.data and "accuracy" in only:
        import sparse_accuracy

        rows = sparse_accuracy.measure(options.data, "runs/sparse-accuracy", options.quick, 2)
        sparse_accuracy.show(rows)
        summary["accuracy"] = rows
    wide = results.get("1", {}).get("step", {}).get("64", {})
    summary["step_speedup"] = {
        key.removeprefix("auto "): value for key, value in wide.items() if key.startswith("auto ")
    }
    if options.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()

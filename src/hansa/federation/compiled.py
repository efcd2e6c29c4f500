"""A stacked step, traced into one graph and compiled once for a machine.

The graph has fixed shapes: a full stack and a full batch. What is missing is filled up, and masked
so that it changes nothing. A program is a file in the user's cache, named by the graph, its shapes
and constants, PyTorch's version and the processor; any process may load it.
"""

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from hansa.errors import first_line
from hansa.federation.methods.base import Work
from hansa.files import cache_folder
from hansa.models.task import Batch
from hansa.processes import processor

Names = tuple[tuple[str, str], ...]
Filled = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Inputs [stack, batch, ...], labels and weights [stack, batch], and which clients [stack] have
a batch at all."""
MAX_CONSTANTS = 1 << 26
"""Bytes of constants (frozen weights) that a program may hold."""

REMEMBERED = 86_400
"""Seconds for which a failure is not tried again; its cause may have passed."""

_log = logging.getLogger("hansa.engine")
_running: list["subprocess.Popen[bytes]"] = []
"""Compilers in the background, which end by themselves."""


class CompileError(RuntimeError):
    """A step that cannot be compiled."""


class StepGrowsError(CompileError):
    """A step that adds tensors to its work, as the first one of some optimizers does."""


@dataclass(frozen=True)
class Program:
    """A compiled step.

    Attributes:
        names: the tensors of the work that it takes, in order.
        changed: positions of those that it returns anew.
        call: takes the tensors and a filled batch, returns the changed ones.
    """

    names: Names
    changed: tuple[int, ...]
    call: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]

    def step(self, work: Work, batch: Filled) -> Work:
        """Return the work after a step."""
        tensors = [work[group][name] for group, name in self.names]
        after = {group: dict(held) for group, held in work.items()}
        for place, tensor in zip(self.changed, self.call([*tensors, *batch]), strict=True):
            group, name = self.names[place]
            after[group][name] = tensor
        return after


@dataclass(frozen=True)
class Traced:
    """A step as a graph of plain tensor operations, for one shape of work and batch."""

    graph: torch.fx.GraphModule
    names: Names
    changed: tuple[int, ...]
    inputs: tuple[torch.Tensor, ...]

    @property
    def key(self) -> str:
        """The name of its program: SHA-256 over all that the program depends on."""
        digest = hashlib.sha256()
        shapes = [(tuple(t.shape), str(t.dtype), str(t.device)) for t in self.inputs]
        machine = (platform.machine(), torch.backends.cpu.get_cpu_capability(), processor())
        digest.update(repr((self.graph.code, shapes, torch.__version__, machine)).encode())
        for name, tensor in _constants(self.graph):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(flat.numpy().tobytes())
        return digest.hexdigest()[:32]


def fill(batch: Batch, size: int, width: int) -> Filled:
    """Return a stacked batch of full size; samples and clients that are added do not count.

    Args:
        batch: inputs [clients, samples, ...], labels, and maybe weights.
        size: clients of a full stack.
        width: samples of a full batch.
    """
    inputs, labels, *rest = batch
    num, given = labels.shape[:2]
    weights = rest[0] if rest else torch.ones(num, given, device=labels.device)
    active = torch.ones(size, dtype=torch.bool, device=labels.device)
    if (num, given) == (size, width):
        return inputs, labels, weights, active
    active[num:] = False
    # What is added repeats a sample, so that no number arises that real ones do not have.
    rows = torch.arange(size, device=labels.device).clamp(max=num - 1)
    columns = torch.arange(width, device=labels.device)
    place = (rows[:, None], columns.clamp(max=given - 1)[None])
    return inputs[place], labels[place], weights[place] * (columns < given), active


def masked(step: Callable[[Work, Batch], Work]) -> Callable[[Work, Filled], Work]:
    """Return a step for stacked work that leaves clients alone that have no batch.

    Args:
        step: the step of one client.
    """

    def one(work: Work, filled: Filled) -> Work:
        inputs, labels, weights, active = filled
        after = step(work, (inputs, labels, weights))

        def kept(tensor: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
            if before is None or tensor is before:
                return tensor
            return torch.where(active, tensor, before)

        return {
            group: {name: kept(t, work.get(group, {}).get(name)) for name, t in tensors.items()}
            for group, tensors in after.items()
        }

    return vmap(one)


def trace(step: Callable[[Work, Filled], Work], work: Work, filled: Filled) -> Traced:
    """Return a stacked step as a graph.

    Raises:
        StepGrowsError: the step adds to its work.
        CompileError: the step holds too many constants.
    """
    names = tuple((group, name) for group, tensors in work.items() for name in tensors)
    inputs = (*(work[group][name] for group, name in names), *filled)
    changed: list[int] = []

    def flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
        given: Work = {group: {} for group in work}
        for (group, name), tensor in zip(names, tensors[: len(names)], strict=True):
            given[group][name] = tensor
        after = step(given, tensors[len(names) :])  # type: ignore[arg-type]
        if {(g, n) for g, ts in after.items() for n in ts} != set(names):
            raise StepGrowsError
        changed[:] = [k for k, (g, n) in enumerate(names) if after[g][n] is not given[g][n]]
        return [after[group][name] for group, name in (names[k] for k in changed)]

    with torch.no_grad(), _Slices():
        graph = make_fx(flat)(*inputs)
    if sum(tensor.nbytes for _, tensor in _constants(graph)) > MAX_CONSTANTS:
        raise CompileError("the model holds frozen weights, which a program would have to hold too")
    return Traced(graph, names, tuple(changed), inputs)


class Programs:
    """Compiled steps, in the cache of this machine.

    Args:
        wait: whether a program that is not there yet is waited for; else it is made in the
            background, and ``find`` gives None until it is there.

    Attributes:
        pending: files of programs that are under way.
    """

    def __init__(self, wait: bool = True) -> None:
        self.wait, self.pending = wait, dict[Path, Hashable]()
        self._known: dict[Hashable, Program | None] = {}
        self._traced: dict[Hashable, Traced] = {}

    def find(
        self,
        about: Hashable,
        step: Callable[[Work, Filled], Work],
        work: Work,
        filled: Filled,
    ) -> Program | None:
        """Return the program of a step, None where there is none.

        Args:
            about: what tells this step, and the shape of its work, from others.
            step: the step of stacked work.
            work: work of that shape.
            filled: a filled batch.
        """
        if about in self._known:
            return self._known[about]
        try:
            if about not in self._traced:
                self._traced[about] = trace(step, work, filled)
            traced = self._traced[about]
            path = program_of(traced)
            if not path.is_file() and not make(traced, path, self.wait):
                self.pending[path] = about
                return None
            found: Program | None = _load(traced, path)
        except StepGrowsError:
            found = None
        except Exception as error:  # what a compiler cannot do it says in many ways
            _log.warning("a step is not compiled: %s", first_line(error))
            found = None
        self.pending = {path: key for path, key in self.pending.items() if key != about}
        self._known[about] = found
        self._traced.pop(about, None)
        return found

    def arrived(self) -> bool:
        """Tell whether all that was under way is there, or has failed."""
        return all(path.is_file() or path.with_suffix(".failed").is_file() for path in self.pending)


def has_compiler() -> bool:
    """Tell whether this machine has what it takes to compile."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None and sys.platform == "linux"


def program_of(traced: Traced) -> Path:
    """Return where the program of a step is, or will be."""
    return cache_folder("programs") / f"{traced.key}.pt2"


def make(traced: Traced, path: Path, wait: bool) -> bool:
    """Compile a step, and tell whether its program is there.

    Args:
        traced: the step.
        path: where the program goes.
        wait: whether to wait for it; else it is made by another process in the background.

    Raises:
        CompileError: it cannot be made.
    """
    failed = path.with_suffix(".failed")
    if failed.is_file() and time.time() - failed.stat().st_mtime < REMEMBERED:
        raise CompileError(failed.read_text())
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            return False  # another process is at it
        if path.is_file():
            return True
        failed.unlink(missing_ok=True)
        source = path.with_name(f"{path.stem}-{os.getpid()}-source.pt2")
        torch.export.save(torch.export.export(_Flat(traced.graph), traced.inputs), source)
        # The child inherits the lock, and so holds it until it ends.
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "hansa.federation.compiled", str(source), str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(lock.fileno(),),
        )
        if not wait:
            _running.append(process)
            return False
        process.wait()
    if not path.is_file():
        raise CompileError(failed.read_text() if failed.is_file() else "the compiler failed")
    return True


class _Flat(torch.nn.Module):
    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.graph(*tensors)


def _load(traced: Traced, path: Path) -> Program:
    # Called without its wrapper, which works out the structure of the arguments every time.
    call = torch._inductor.aoti_load_package(str(path), run_single_threaded=True).loader.boxed_run
    program = Program(traced.names, traced.changed, call)
    # Trust is good: a program must do what its graph does.
    with torch.no_grad():
        for ours, theirs in zip(
            call(list(traced.inputs)), traced.graph(*traced.inputs), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True)
    return program


class _Slices(TorchFunctionMode):
    """Writes max-pooling as maxima of slices, which a compiler can fuse with its neighbours.

    Where the largest values of a window are equal, their gradient is shared between them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.nn.functional.max_pool2d, torch.max_pool2d):
            pooled = _pooled(*args, **(kwargs or {}))
            if pooled is not None:
                return pooled
        return func(*args, **(kwargs or {}))


def _pooled(
    inputs: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> torch.Tensor | None:
    if return_indices or ceil_mode:
        return None
    high, wide = _pair(kernel_size)
    apart = _pair(stride) if stride not in (None, [], ()) else (high, wide)
    if apart != (high, wide) or _pair(padding) != (0, 0) or _pair(dilation) != (1, 1):
        return None
    rows, columns = inputs.shape[-2] // high * high, inputs.shape[-1] // wide * wide
    parts = [inputs[..., k:rows:high, :columns] for k in range(high)]
    found = _largest(parts)
    return _largest([found[..., k::wide] for k in range(wide)])


def _largest(parts: list[torch.Tensor]) -> torch.Tensor:
    found = parts[0]
    for part in parts[1:]:
        found = torch.maximum(found, part)
    return found


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def _constants(graph: torch.fx.GraphModule) -> list[tuple[str, torch.Tensor]]:
    names = [node.target for node in graph.graph.nodes if node.op == "get_attr"]
    return [(str(n), getattr(graph, str(n))) for n in sorted(set(map(str, names)))]


def _main(source: Path, path: Path) -> None:
    """Compile an exported step into a program; the file appears when it is whole."""
    os.nice(5)
    torch.set_num_threads(1)
    made = path.with_name(f".{path.name}.{os.getpid()}.pt2")
    try:
        exported = torch.export.load(source)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(made))
        made.replace(path)
    except Exception as error:
        path.with_suffix(".failed").write_text(first_line(error))
        raise
    finally:
        made.unlink(missing_ok=True)
        source.unlink(missing_ok=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))

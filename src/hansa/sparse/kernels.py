"""The compiled kernels, where there are any: loaded by ctypes, one instruction set of several.

``HANSA_KERNELS=off`` does without them; a path there names another library that ``build`` made.
"""

import ctypes
import json
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hansa.sparse import build

_RESULTS = {"pattern": ctypes.c_long, "gradient": ctypes.c_long, "kth": ctypes.c_float}
_DTYPES = (torch.float32, torch.int32)
_NAMES = (
    *("convolve", "sample", "gradient", "pattern", "interleave", "transpose", "kth", "prune"),
    *("batch_norm", "batch_norm_back", "group_norm", "group_norm_back"),
    *("batch_norm_last", "batch_norm_last_back", "turn"),
)
Argument = torch.Tensor | int | float | None


@dataclass(frozen=True)
class Kernels:
    """A library, and the instruction set that is used of it.

    Attributes:
        path: the library.
        isa: ``avx512``, ``avx2`` or ``portable``.
    """

    path: Path
    isa: str
    _library: ctypes.CDLL
    _functions: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def vector(self) -> int:
        """Floats of a vector."""
        return {"avx512": 16, "avx2": 8}.get(self.isa, 4)

    def call(self, name: str, *arguments: Argument) -> float:
        """Call a kernel (``kernels.cpp``) on contiguous CPU tensors and numbers.

        Threads, which every kernel that can use several takes last, are the caller's.

        Raises:
            ValueError: a tensor that is not contiguous, not on the CPU, or of another dtype.
        """
        function = self._functions.get(name)
        if function is None:
            function = getattr(self._library, f"hansa_{name}_{self.isa}")
            function.restype = _RESULTS.get(name)
            function.argtypes = [_type(value) for value in arguments]
            self._functions[name] = function
        try:
            result: float = function(*arguments)
        except ctypes.ArgumentError as error:
            raise ValueError(str(error)) from error
        return result


class _Pointer:
    """What ctypes asks of an argument that is a tensor or None: numbers need no such question."""

    @staticmethod
    def from_param(value: torch.Tensor | None) -> ctypes.c_void_p | None:
        """Return where a tensor lies."""
        if value is None:
            return None
        if not (value.is_contiguous() and value.is_cpu and value.dtype in _DTYPES):
            about = f"{value.dtype} on {value.device}, strides {value.stride()}"
            raise ValueError(f"a kernel takes contiguous float32 tensors on the CPU, not {about}")
        return ctypes.c_void_p(value.data_ptr())


def _type(value: Argument) -> type:
    """Return the C type of an argument, which is of one kind in all calls."""
    if value is None or isinstance(value, torch.Tensor):
        return _Pointer
    return ctypes.c_long if isinstance(value, int) else ctypes.c_float


@cache
def find() -> tuple[Kernels | None, str]:
    """Return the kernels, or None and why there are none."""
    wanted = os.environ.get("HANSA_KERNELS", "")
    if wanted == "off":
        return None, "HANSA_KERNELS is off"
    path = Path(wanted) if wanted else build.FOLDER / build.LIBRARY
    try:
        return _load(path), ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{path}: {error or type(error).__name__}"


def kernels() -> Kernels | None:
    """Return the kernels, None where there are none or they are switched off."""
    return find()[0]


def required() -> Kernels:
    """Return the kernels.

    Raises:
        RuntimeError: there are none.
    """
    found, why = find()
    if found is None:
        raise RuntimeError(f"no compiled kernels: {why}")
    return found


def _load(path: Path) -> Kernels:
    """Load a library that ``build`` made of this very source.

    Raises:
        OSError: it is not there or cannot be loaded.
        ValueError: it is another file than its manifest tells of, or of another source.
    """
    if not path.is_file():
        raise FileNotFoundError("not built; `python -m hansa.sparse.build` builds it")
    manifest = json.loads(path.with_name(build.MANIFEST).read_bytes())
    # Looked at before it is loaded: a damaged library could end the process.
    if manifest["library"] != build.digest(path):
        raise ValueError("not the file that its manifest tells of; build it again")
    if manifest["source"] != build.digest(build.SOURCE):
        raise ValueError("built from another source; build it again")
    library, isa = ctypes.CDLL(str(path)), _isa(manifest["sets"])
    if missing := [name for name in _NAMES if not hasattr(library, f"hansa_{name}_{isa}")]:
        raise ValueError(f"no kernel {missing[0]!r} for {isa}")
    return Kernels(path, isa, library)


def _isa(sets: list[str]) -> str:
    """Return the widest instruction set that both this processor and the library have."""
    able = torch.backends.cpu.get_cpu_capability()  # ATEN_CPU_CAPABILITY lowers it
    if able.startswith("AVX512") and "avx512" in sets:
        return "avx512"
    return "avx2" if able.startswith("AVX") and "avx2" in sets else "portable"

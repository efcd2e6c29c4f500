"""Compile the kernels: ``python -m hansa.sparse.build``, and the package's build.

Nothing here imports PyTorch, or anything else of Hansa: the package's build runs this file where
neither is installed.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "kernels.cpp"
LIBRARY = "_kernels.so"
MANIFEST = "_kernels.json"
COMMON = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wpedantic"),
    # Vectors multiply and add in one rounding; what is no number stays one.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
X86 = {
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
}


class BuildError(RuntimeError):
    """There is no compiler, or it failed."""


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compilers() -> list[str]:
    """Return the C++ compilers to try: the one that ``CXX`` names, or those of usual names."""
    if named := os.environ.get("CXX"):
        return [named]
    return [name for name in ("c++", "g++", "clang++") if shutil.which(name)]


def build(
    folder: Path = FOLDER,
    compiler: str | None = None,
    extra: Sequence[str] = (),
    sets: Collection[str] = ("portable", "avx2", "avx512"),
) -> Path:
    """Compile the kernels for every instruction set of this kind of processor.

    Args:
        folder: where the library and its manifest go.
        compiler: the C++ compiler; by default the first that works.
        extra: further options, for all steps.
        sets: instruction sets, as far as this kind of processor has them.

    Returns:
        The library.

    Raises:
        BuildError: there is no compiler, or none that compiles this.
    """
    failures = []
    for command in [compiler] if compiler else compilers():
        # Without OpenMP the kernels run on one thread.
        for parallel in (("-fopenmp",), ("-Wno-unknown-pragmas", "-Wno-unused-parameter")):
            try:
                return _build(folder, command, (*parallel, *extra), sets)
            except (OSError, subprocess.CalledProcessError) as error:
                output = getattr(error, "stderr", "") or str(error)
                failures.append(f"{command} {parallel[0]}: {output.strip()[-600:]}")
    raise BuildError("\n".join(failures) or "no C++ compiler (c++, g++, clang++ or $CXX)")


def _build(folder: Path, compiler: str, extra: Sequence[str], wanted: Collection[str]) -> Path:
    sets: dict[str, tuple[str, ...]] = {"portable": ()}
    if platform.machine() in ("x86_64", "AMD64"):
        sets |= X86
    sets = {name: options for name, options in sets.items() if name in wanted}
    with tempfile.TemporaryDirectory() as work:
        objects = []
        for name, options in sets.items():
            objects.append(f"{work}/{name}.o")
            about = (*COMMON, *options, *extra, f"-DISA={name}")
            _run([compiler, *about, "-c", str(SOURCE), "-o", objects[-1]])
        made = Path(work) / LIBRARY
        _run([compiler, "-shared", *extra, *objects, "-o", str(made)])
        manifest = {"source": digest(SOURCE), "library": digest(made), "sets": list(sets)}
        folder.mkdir(parents=True, exist_ok=True)
        # A library in use keeps its file: the new one takes its name, not its place.
        for name, data in (
            (LIBRARY, made.read_bytes()),
            (MANIFEST, json.dumps(manifest, indent=1).encode()),
        ):
            fresh = folder / f"{name}.new"
            fresh.write_bytes(data)
            fresh.replace(folder / name)
    return folder / LIBRARY


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603


def main() -> int:
    """Compile, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compiler", help="C++ compiler, by default the first that works")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the library goes")
    options, extra = parser.parse_known_args()
    try:
        print(build(options.folder, options.compiler, extra))
    except BuildError as error:
        print(f"hansa: the kernels are not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The package's build compiles the kernels where there is a compiler, and else does without."""

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelHook(BuildHookInterface):
    """Put the compiled kernels into a wheel, or beside the sources of an editable install."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; a failure is told and does no harm, since there is a path without kernels."""
        if self.target_name != "wheel" or os.environ.get("HANSA_KERNELS") == "off":
            return
        build = _load(Path(self.root) / "src" / "hansa" / "sparse" / "build.py")
        try:
            library = build.build()
        except build.BuildError as error:
            print(f"hansa: without compiled kernels: {error}", file=sys.stderr)
            return
        folder = library.parent.relative_to(self.root)
        build_data["artifacts"] += [f"{folder}/{build.LIBRARY}", f"{folder}/{build.MANIFEST}"]
        # The library knows no version of Python, only a kind of machine.
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data |= {"pure_python": False, "tag": f"py3-none-{tag}"}


def _load(path: Path) -> Any:
    """Import one file of a package that is not installed yet."""
    spec = importlib.util.spec_from_file_location("build_kernels", path)
    if spec is None or spec.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""Build hook: puts the compiled CPU kernels into the wheel, where a C++ compiler is there.

Without one the wheel is built all the same, with a warning: the operator needs no kernels, and a worker
computes with plain torch. MOE_CPU_KERNELS=require makes that an error; images are built so.
docs/adr/0008 says more.
"""

import importlib.util
import os
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "moe_worker/kernels/cpu"
SETTING = "MOE_CPU_KERNELS"


class CustomBuildHook(BuildHookInterface[Any]):
    """Compiles into the wheel, or for an editable install into the source folder."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before the files are gathered. Ends the build where required kernels fail."""
        setting = os.environ.get(SETTING, "optional")
        if setting not in ("require", "optional"):
            self.app.abort(f"error: {SETTING} is {setting!r}: set it to require or optional")
        kernels = _load(Path(self.root) / "worker" / FOLDER / "build.py")
        try:
            if version == "editable":
                kernels.install()
                return
            self._work = tempfile.TemporaryDirectory()
            made = kernels.build(Path(self._work.name))
        except kernels.BuildError as error:
            if setting == "require":
                self.app.abort(
                    f"error: the worker's CPU kernels cannot be built: {error}; "
                    f"install g++, or set {SETTING}=optional to build without them"
                )
            self.app.display_warning(
                f"WARNING: the worker's CPU kernels are NOT built: {error}. "
                "Workers on CPUs will be many times slower (plain torch)."
            )
            return
        build_data["force_include"][str(made)] = f"{FOLDER}/lib/{made.name}"
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _load(path: Path) -> ModuleType:
    """The module at `path` alone: its package would import torch, which a build has not."""
    spec = importlib.util.spec_from_file_location("cpu_kernels_build", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

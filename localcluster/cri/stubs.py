"""Python modules for Kubernetes' Container Runtime Interface, generated once from its own definition.

`api.proto` is upstream's (module k8s.io/cri-api, kept beside the built tools), and so are the message names; the generated
code stays in the user's cache directory, not in this repository.
"""

from __future__ import annotations

import importlib.resources
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from localcluster.errors import BuildError
from localcluster.layout import cache_directory, digest

MESSAGES, SERVICES = "api_pb2", "api_pb2_grpc"


def ensure(definition: Path) -> Path:
    """The directory of the modules `api_pb2` and `api_pb2_grpc`, generated unless they are there already.

    Args:
        definition: the path of api.proto.

    Raises:
        BuildError: the protobuf compiler refused.
    """
    name = digest(definition.read_text() + version("grpcio-tools") + version("protobuf"))
    target = cache_directory() / "cri" / name
    if (target / f"{SERVICES}.py").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        _generate(definition, Path(scratch))
        target.mkdir(exist_ok=True)
        for file in (
            f"{MESSAGES}.py",
            f"{SERVICES}.py",
        ):  # in this order: the second one means that both are there
            (Path(scratch) / file).replace(target / file)
    return target


def _generate(definition: Path, directory: Path) -> None:
    includes = importlib.resources.files("grpc_tools") / "_proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{definition.parent}", f"-I{includes}"]
    command += [f"--python_out={directory}", f"--grpc_python_out={directory}", definition.name]
    result = subprocess.run(command, cwd=definition.parent, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"the protobuf compiler refused {definition}: {result.stderr.strip()}")


def find_definition(kubelet: Path) -> Path:
    """api.proto: beside the built tools."""
    return kubelet.parent / "api.proto"

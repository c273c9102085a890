"""What `up` was asked for, handed to the cluster's own processes as a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from localcluster.errors import LocalClusterError

# The only places where the node can show directories of the host under names that the host does not have.
_NODE_MOUNT_ROOT = Path("/mnt")

# What `up` says to the cluster's PID 1 once the cluster is ready: stay until `down`, or no longer than `up`'s
# process.
STAY, STAY_WITH_PARENT = b"s", b"p"


@dataclass(frozen=True)
class Mount:
    """A directory of the host that the node shows, read-only, at another path."""

    host: Path
    node: Path


@dataclass(frozen=True)
class Settings:
    """One cluster's configuration.

    Attributes:
        state: the state directory by its path on the host.
        mounts: directories of the host shown on the node.
        tools: tool name -> executable.
        needed: directories that every pod sees at the same path as the host, read-only.
        api_port: wanted port of 127.0.0.1 for the API server; 0 takes a free one.
        audit: whether the API server writes down who asked it for what.
    """

    state: Path
    mounts: tuple[Mount, ...]
    tools: dict[str, Path]
    needed: tuple[Path, ...]
    api_port: int = 0
    audit: bool = False

    def write(self, path: Path) -> None:
        """Writes it as JSON."""
        path.write_text(json.dumps(asdict(self), default=str, indent=1))


def read_settings(path: Path) -> Settings:
    """Reads what `Settings.write` wrote."""
    content = json.loads(path.read_text())
    return Settings(
        state=Path(content["state"]),
        mounts=tuple(Mount(Path(m["host"]), Path(m["node"])) for m in content["mounts"]),
        tools={name: Path(tool) for name, tool in content["tools"].items()},
        needed=tuple(Path(p) for p in content["needed"]),
        api_port=content["api_port"],
        audit=content["audit"],
    )


def parse_mount(text: str) -> Mount:
    """Reads HOST:NODE, as `--mount` takes it; raises LocalClusterError with what would be right."""
    host, separator, node = text.partition(":")
    path = Path(node)
    if (
        not separator
        or not host
        or not path.is_relative_to(_NODE_MOUNT_ROOT)
        or path == _NODE_MOUNT_ROOT
        or ".." in path.parts
    ):
        raise LocalClusterError(
            f"--mount {text}: expected HOST:NODE with NODE below {_NODE_MOUNT_ROOT}, "
            "like ./models:/mnt/models"
        )
    if not Path(host).is_dir():
        raise LocalClusterError(f"--mount {text}: {host} is not a directory on this machine")
    return Mount(Path(host).resolve(), path)

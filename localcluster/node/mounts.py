"""The node's view of the file system, made by PID 1 in its own mount namespace."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from localcluster import linux
from localcluster.layout import NODE_STATE, Layout
from localcluster.settings import Settings

# Fresh in the node: sockets and locks of the host's services in /run are none of the cluster's business, and
# /mnt is where directories of the host appear under names of their own.
_FRESH = (Path("/run"), Path("/mnt"))


def build(layout: Layout, settings: Settings) -> None:
    """Mounts everything the node needs. The host sees nothing of it.

    Args:
        layout: the state directory by its path on the host.
        settings: the directories to show.
    """
    linux.mount("none", Path("/"), flags=linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("proc", Path("/proc"), "proc", linux.MS_NOSUID | linux.MS_NODEV)
    hidden = _open_hidden([layout.root, *settings.needed, *(m.host for m in settings.mounts)])
    for directory in _FRESH:
        linux.mount("tmpfs", directory, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=755")
    _show_again(hidden)
    NODE_STATE.mkdir()
    linux.bind(layout.root, NODE_STATE)
    (layout.node / "log" / "containers").mkdir(parents=True, exist_ok=True)
    linux.bind(layout.node / "log", Path("/var/log"))  # the kubelet writes links to /var/log/containers
    for mount in settings.mounts:
        mount.node.mkdir(parents=True, exist_ok=True)
        linux.bind(mount.host, mount.node, read_only=True)


def _open_hidden(paths: Iterable[Path]) -> dict[Path, int]:
    """Opens those paths that lie in a directory about to be covered, so that they can be bound again."""
    return {p: os.open(p, os.O_PATH) for p in paths if any(p.is_relative_to(d) for d in _FRESH)}


def _show_again(hidden: dict[Path, int]) -> None:
    for path, descriptor in hidden.items():
        path.mkdir(parents=True, exist_ok=True)
        linux.bind(f"/proc/self/fd/{descriptor}", path)
        os.close(descriptor)

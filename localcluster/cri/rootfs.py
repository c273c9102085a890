"""A container's root file system: the machine's own files, copy-on-write, with volumes on top.

Every top-level directory of the machine is the lower layer of an overlay whose upper layer is a tmpfs, so a
container can write wherever its user may, and nothing of it reaches the machine. Directories with
other file systems inside cannot be a lower layer in a user namespace (the kernel does not reveal what the
mounts below cover); they appear read-only instead. Built and used inside a new mount namespace.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from localcluster import linux

_SPECIAL = frozenset({"proc", "sys", "dev", "run", "tmp", "mnt"})
_MAX_LINKS = 40  # as the kernel's limit on symbolic links in one path
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "pts", "fuse", "dri", "kfd", "infiniband")
_DEVICE_PREFIX = "nvidia"
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}
_NOSUID_NODEV = linux.MS_NOSUID | linux.MS_NODEV


def build(root: Path, layers: Path, temporary: Path) -> None:
    """Mounts the machine's file system, copy-on-write, at the directory `root`.

    Args:
        root: an existing directory that becomes the root.
        layers: an existing directory; a tmpfs there holds what the container writes.
        temporary: the directory that becomes /tmp.
    """
    linux.mount("tmpfs", root, "tmpfs", _NOSUID_NODEV, "mode=755")
    linux.mount("tmpfs", layers, "tmpfs", _NOSUID_NODEV, "mode=755")
    for entry in os.scandir("/"):
        if entry.is_symlink():
            (root / entry.name).symlink_to(Path(entry.path).readlink())
        elif entry.is_dir():
            (root / entry.name).mkdir()
            if entry.name not in _SPECIAL:
                _mount_copy(Path(entry.path), root / entry.name, layers / entry.name)
    linux.bind(temporary, root / "tmp")


def _mount_copy(source: Path, target: Path, layer: Path) -> None:
    for part in ("upper", "work"):
        (layer / part).mkdir(parents=True)
    options = f"lowerdir={source},upperdir={layer}/upper,workdir={layer}/work,userxattr"
    try:
        linux.mount("overlay", target, "overlay", _NOSUID_NODEV, options)
    except OSError:
        linux.bind(source, target, read_only=True)


def resolve(root: Path, path: str) -> Path:
    """Where `path` of the container lies below `root`, following the symbolic links of the container's own
    tree.
    """
    parts = [p for p in path.split("/") if p not in ("", ".")]
    current, links = root, 0
    while parts:
        part = parts.pop(0)
        candidate = (current.parent if current != root else root) if part == ".." else current / part
        if candidate.is_symlink():
            links += 1
            if links > _MAX_LINKS:
                raise OSError(f"too many symbolic links in {path}")
            link = str(candidate.readlink())
            current = root if link.startswith("/") else current
            parts = [p for p in link.split("/") if p not in ("", ".")] + parts
        else:
            current = candidate
    return current


def prepare_target(root: Path, source: Path, path: str) -> Path:
    """Makes the mount point for `source` (a file or a directory) at `path` of the container; returns it."""
    target = resolve(root, path)
    try:
        _make_mount_point(source, target)
    except PermissionError:
        # Directories of other users cannot be written to, copy or not: their owners do not exist in here.
        _make_writable(next(p for p in target.parents if p.is_dir()))
        _make_mount_point(source, target)
    return target


def _make_mount_point(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()


def _make_writable(directory: Path) -> None:
    """Covers a directory with a tmpfs that shows the same entries, each by a link or a bind mount."""
    original = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        linux.mount("tmpfs", directory, "tmpfs", _NOSUID_NODEV, "mode=755")
        for entry in os.scandir(f"/proc/self/fd/{original}"):
            if entry.is_symlink():
                (directory / entry.name).symlink_to(Path(entry.path).readlink())
            else:
                _make_mount_point(Path(entry.path), directory / entry.name)
                linux.bind(entry.path, directory / entry.name)
    finally:
        os.close(original)


def mount_kernel(root: Path) -> None:
    """Mounts /proc of the caller's PID namespace, /sys and a small /dev with this machine's accelerators."""
    linux.mount("proc", root / "proc", "proc", _NOSUID_NODEV | linux.MS_NOEXEC)
    linux.bind("/sys", root / "sys", read_only=True)
    mount_devices(root / "dev", [path.name for path in Path("/dev").iterdir()])


def mount_devices(target: Path, present: Iterable[str]) -> None:
    """A tmpfs with those of the machine's devices that a container may want."""
    linux.mount("tmpfs", target, "tmpfs", linux.MS_NOSUID, "mode=755")
    for name in present:
        if name in _DEVICES or name.startswith(_DEVICE_PREFIX):
            source = Path("/dev") / name
            place = target / name
            if stat.S_ISDIR(source.stat().st_mode):
                place.mkdir()
            else:
                place.touch()
            linux.bind(source, place)
    (target / "shm").mkdir()
    linux.mount("tmpfs", target / "shm", "tmpfs", _NOSUID_NODEV, "mode=1777")
    for name, link in _DEVICE_LINKS.items():
        (target / name).symlink_to(link)

"""System calls that Python 3.11 does not offer: namespaces and mounts, by way of libc.

Every function raises OSError with the call's errno. Numbers are from the kernel's uapi headers
(sched.h, mount.h, prctl.h), the same on every architecture; `pivot_root` is looked up by machine.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
_MOUNT_SETATTR = 442  # the same number on every architecture
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 1


def _call(name: str, *args: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    """Moves the calling thread (for user, mount and PID namespaces: the process) into new namespaces."""
    _call("unshare", ctypes.c_int(flags))


def setns(fd: int, kind: int = 0) -> None:
    """Moves the calling thread into the namespace that `fd` (an open /proc/PID/ns/KIND) refers to."""
    _call("setns", ctypes.c_int(fd), ctypes.c_int(kind))


def mount(source: str, target: Path, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2); an empty `kind` or `options` is passed as NULL."""
    _call(
        "mount",
        source.encode(),
        os.fsencode(target),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )


def bind(source: Path | str, target: Path, *, read_only: bool = False) -> None:
    """Makes `source`, with what is mounted below it, appear at the existing path `target` (both files or both
    directories).
    """
    mount(str(source), target, flags=MS_BIND | MS_REC)
    if read_only:
        make_read_only(target)


def make_read_only(target: Path) -> None:
    """Makes the mount at `target` and those below it read-only, in this mount namespace (mount_setattr(2),
    Linux 5.12).
    """
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    _call(
        "syscall",
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        os.fsencode(target),
        ctypes.c_uint(_AT_RECURSIVE),
        attributes,
        ctypes.c_size_t(len(attributes)),
    )


def unmount(target: Path | str) -> None:
    """Detaches the mount at `target` at once; it disappears when its last user is gone."""
    _call("umount2", os.fsencode(target), ctypes.c_int(MNT_DETACH))


def pivot_root_here() -> None:
    """Makes the current directory (a mount point) the root and drops the old root, as runc does it.

    pivot_root(".", ".") stacks the old root on top of the new one (pivot_root(2), "NOTES"), so no
    directory for the old root is needed.
    """
    number = _PIVOT_ROOT[platform.machine()]
    _call("syscall", ctypes.c_long(number), b".", b".")
    unmount(".")
    os.chdir("/")


def set_hostname(name: str) -> None:
    """Sets the host name of the caller's UTS namespace."""
    encoded = name.encode()
    _call("sethostname", encoded, ctypes.c_size_t(len(encoded)))


def become_subreaper() -> None:
    """Makes orphaned descendants children of this process, so that it learns their exit codes."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    _call("prctl", ctypes.c_int(option), *(ctypes.c_ulong(v) for v in (value, 0, 0, 0)))

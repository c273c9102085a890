"""The program between the runtime and a container's command: `python -m localcluster.cri.enter SPEC_FD
STATUS_FD`.

Started once per container and once per exec; enters or makes the namespaces, builds the root file system and
executes the command. A program of its own because unshare(CLONE_NEWPID) and mounts need a process with one
thread, and a fork of the runtime, which has several, would not be safe. It imports next to nothing and starts
in 20 ms.

Tells on STATUS_FD: a line {"pid": PID} and, if the command could not be executed, a line {"error": TEXT}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from localcluster import linux
from localcluster.cri import rootfs

CANNOT_START = 128  # the exit code that containerd gives a container whose command cannot be executed


@dataclass(frozen=True)
class Volume:
    """Something of the node that the container sees."""

    source: str
    target: str
    read_only: bool


@dataclass(frozen=True)
class Spec:
    """What to execute, and where.

    Attributes:
        command: the program, looked up in the container's PATH, and its arguments.
        environment: all its variables.
        directory: its working directory.
        namespaces: open namespace descriptors to enter.
        join: a pidfd of a running container to execute in; None makes a new one, from the fields below.
        home: the container's directory on the node.
        volumes: what to mount, in order.
        hidden: directories of the machine that the container shall find empty.
        read_only: whether the root file system, outside volumes, is read-only.
    """

    command: list[str]
    environment: dict[str, str]
    directory: str
    namespaces: list[int]
    join: int | None = None
    home: str = ""
    volumes: tuple[Volume, ...] = ()
    hidden: tuple[str, ...] = ()
    read_only: bool = False

    def encode(self) -> bytes:
        """The spec as JSON."""
        return json.dumps(asdict(self)).encode()


def decode(data: bytes) -> Spec:
    """Reads `Spec.encode`."""
    values = json.loads(data)
    return Spec(**{**values, "volumes": tuple(Volume(**v) for v in values["volumes"])})


def _build_root(spec: Spec) -> None:
    home = Path(spec.home)
    root = home / "root"
    rootfs.build(root, home / "layers", home / "tmp")
    targets = [
        (volume, rootfs.prepare_target(root, Path(volume.source), volume.target)) for volume in spec.volumes
    ]
    if spec.read_only:
        linux.make_read_only(root)
    rootfs.mount_kernel(root)
    for volume, _ in targets:
        # Resolved again: an earlier volume may have covered a part of the path.
        target = rootfs.prepare_target(root, Path(volume.source), volume.target)
        linux.bind(volume.source, target, read_only=volume.read_only)
    # Last, because they may lie inside what was mounted just now, as .local does in the checkout.
    for place in (rootfs.resolve(root, hidden) for hidden in spec.hidden):
        if place.is_dir():
            linux.mount("tmpfs", place, "tmpfs", linux.MS_NOSUID, "mode=555,size=4k")
    os.chdir(root)
    linux.pivot_root_here()


def _reset_signals() -> None:
    """Python ignores SIGPIPE and SIGXFSZ; an executed program would inherit that."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)


def _execute(spec: Spec, status: int) -> NoReturn:
    try:
        if spec.join is None:
            _build_root(spec)
        else:
            linux.die_with_parent()
        Path(spec.directory).mkdir(parents=True, exist_ok=True)
        os.chdir(spec.directory)
        os.setsid()
        _reset_signals()
        os.execvpe(spec.command[0], spec.command, spec.environment)  # noqa: S606 - this is the container's command
    except FileNotFoundError as error:
        missing = error.filename in (None, spec.command[0]) or spec.command[0] in str(error.filename)
        reason = f'exec: "{spec.command[0]}": executable file not found in $PATH' if missing else str(error)
        _tell(status, {"error": reason})
    except OSError as error:
        _tell(status, {"error": f"{spec.command[0]}: {error}"})
    os._exit(CANNOT_START)


def _tell(status: int, message: dict[str, object]) -> None:
    os.write(status, json.dumps(message).encode() + b"\n")


def _enter(spec: Spec) -> None:
    for descriptor in spec.namespaces:
        linux.setns(descriptor)
    if spec.join is None:
        linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWPID)
        # The kubelet shares its mounts with the namespaces made after; what is mounted below a volume here
        # would go when the old root does.
        linux.mount("none", Path("/"), flags=linux.MS_REC | linux.MS_PRIVATE)
    else:
        kinds = (
            linux.CLONE_NEWNS
            | linux.CLONE_NEWPID
            | linux.CLONE_NEWNET
            | linux.CLONE_NEWUTS
            | linux.CLONE_NEWIPC
        )
        linux.setns(spec.join, kinds)


def main() -> NoReturn:
    """Forks the command's process into its namespaces. For a new container ends at once; for an exec waits
    for it.
    """
    spec_fd, status = int(sys.argv[1]), int(sys.argv[2])
    with os.fdopen(spec_fd, "rb") as file:
        spec = decode(file.read())
    os.set_inheritable(status, False)
    try:
        _enter(spec)
    except OSError as error:
        _tell(status, {"error": str(error)})
        os._exit(CANNOT_START)
    pid = os.fork()
    if pid == 0:
        _execute(spec, status)
    _tell(status, {"pid": pid})
    os.close(status)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF if spec.join is not None else 0)


if __name__ == "__main__":
    main()

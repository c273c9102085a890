"""Processes that outlive the command that started them: identity, killing only the right one, locks."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from localcluster.errors import AlreadyRunningError


@dataclass(frozen=True)
class Identity:
    """A process, so that a PID used again by a stranger is not mistaken for it.

    Attributes:
        pid: as seen in the reader's PID namespace.
        started: clock ticks since boot (field 22 of /proc/PID/stat).
        boot: the kernel's boot id; ticks of different boots do not compare.
    """

    pid: int
    started: int
    boot: str


@dataclass(frozen=True)
class Record:
    """What `up` leaves for later commands: the process that is the cluster."""

    init: Identity

    def write(self, path: Path) -> None:
        """Writes the record atomically."""
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(path)


def read_record(path: Path) -> Record | None:
    """The record, or None where there is none."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return Record(Identity(**content["init"]))


def parse_start_time(stat: str) -> int:
    """Field 22 of a line of /proc/PID/stat. The second field, the name, may hold spaces and parentheses."""
    return int(stat.rpartition(")")[2].split()[19])


def identify(pid: int) -> Identity | None:
    """The identity of a running process, or None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Identity(pid, parse_start_time(stat), Path("/proc/sys/kernel/random/boot_id").read_text().strip())


def is_running(identity: Identity) -> bool:
    """Whether exactly this process still exists, in any of its threads (a zombie does not count)."""
    with _opened(identity) as descriptor:
        return descriptor is not None and not _ended(descriptor, timeout=0)


def kill(identity: Identity, timeout: float) -> bool:
    """Kills exactly this process and waits, at most `timeout` seconds, until it is gone.

    Returns whether it is gone.
    """
    with _opened(identity) as descriptor:
        if descriptor is None:
            return True
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        return _ended(descriptor, timeout)


@contextmanager
def _opened(identity: Identity) -> Iterator[int | None]:
    """A pidfd of exactly this process, or None where there is none.

    It is opened before the identity is compared, so that nothing done to it reaches a later process with the
    same PID.
    """
    try:
        descriptor = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield descriptor if identify(identity.pid) == identity else None
    finally:
        os.close(descriptor)


def _ended(descriptor: int, timeout: float) -> bool:
    """Whether the last thread of the process ends within `timeout` seconds.

    The state in /proc/PID/stat is the first thread's: it reads zombie while another thread, for the first
    process of a PID namespace, still waits for the processes in there to end.
    """
    return bool(select.select([descriptor], [], [], timeout)[0])


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file; raises AlreadyRunningError where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunningError(
                f"another `localcluster up` or `down` is working on {path.parent}; wait for it to end, "
                "or choose another directory with --dir"
            ) from None
        yield

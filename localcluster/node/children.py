"""Process duties of PID 1: reap ended children, kill orphans, measure running processes."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path


def ended() -> Iterator[int]:
    """Reaps and yields the children that have ended."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid


def kill_orphans(known: Iterable[int]) -> None:
    """Kills children that are no components: containers whose runtime has died, which a new runtime cannot
    adopt.
    """
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit() or int(directory.name) in known:
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parent = (directory / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == "1":
                os.kill(int(directory.name), signal.SIGKILL)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0

"""What containers use, counted over the processes of their PID namespaces (there are no cgroups to ask)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_TICK = 1_000_000_000 // os.sysconf("SC_CLK_TCK")  # nanoseconds
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Usage:
    """Processor time in nanoseconds, and resident memory in bytes (shared pages count once per process)."""

    cpu: int = 0
    resident: int = 0


def usage(pid: int) -> Usage:
    """What the processes in the PID namespace of process `pid` use; ended ones no longer count."""
    total = Usage()
    try:
        namespace = str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return total
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            total = _add(total, directory, namespace)
    return total


def _add(total: Usage, directory: Path, namespace: str) -> Usage:
    try:
        if str((directory / "ns" / "pid").readlink()) != namespace:
            return total
        fields = (directory / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it ended meanwhile, or belongs to another user
        return total
    cpu = (int(fields[11]) + int(fields[12])) * _TICK
    return Usage(total.cpu + cpu, total.resident + int(fields[21]) * _PAGE)

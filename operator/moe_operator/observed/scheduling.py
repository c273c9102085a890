"""Parses the scheduler's summary of why no node accepts a pod."""

from __future__ import annotations

import re
from typing import Final

_SUMMARY: Final = re.compile(r"0/\d+ nodes are available: (.*?)\.?(?:$|\. |\s+(?=preemption: ))")
_LACKS: Final = re.compile(r"Insufficient \S+|Too many pods")
_EXCLUDES: Final = re.compile(
    r"node\(s\) (?:didn't match Pod's node affinity/selector|had untolerated taint.*|were unschedulable)"
)


def reasons(said: str) -> list[str]:
    """Why nodes do not take a pod, without their numbers; none where it is not the scheduler's summary."""
    summary = _SUMMARY.match(said)
    return re.split(r", \d+ ", re.sub(r"^\d+ ", "", summary[1])) if summary else []


def is_shortage(reason: str) -> bool:
    """Whether a node has too little of a resource."""
    return _LACKS.fullmatch(reason) is not None


def is_exclusion(reason: str) -> bool:
    """Whether a node is excluded by the pod's node selector or affinity, by a taint, or by a cordon."""
    return _EXCLUDES.fullmatch(reason) is not None


def lacks_resources(said: str) -> bool:
    """Whether the scheduler misses resources, on some node at least."""
    return any(map(is_shortage, reasons(said)))


def is_excluded(said: str) -> bool:
    """Whether every node is excluded."""
    found = reasons(said)
    return bool(found) and all(map(is_exclusion, found))

"""Parses the scheduler's summary of why no node accepts a pod."""

from __future__ import annotations

import re
from typing import Final

_HEAD: Final = re.compile(r"0/\d+ nodes are available: ")
_END: Final = re.compile(r"\. |\spreemption: ")
_LACKS: Final = re.compile(r"Insufficient \S+|Too many pods")
_EXCLUDES: Final = re.compile(
    r"node\(s\) (?:didn't match Pod's node affinity/selector|had untolerated taint.*|were unschedulable)"
)


def reasons(said: str) -> list[str]:
    """Why nodes do not take a pod, without their numbers; none where it is not the scheduler's summary."""
    head = _HEAD.match(said)
    if head is None:
        return []
    summary = _END.split(said[head.end() :], maxsplit=1)[0].rstrip().removesuffix(".")
    return re.split(r", \d+ ", re.sub(r"^\d+ ", "", summary))


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

"""Decisions for people: each has a reason and a message."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True)
class Decision:
    """A decision, which becomes an Event."""

    reason: str
    """One CamelCase word."""
    message: str
    """A sentence."""
    warning: bool = False


def timestamp(now: datetime) -> str:
    """RFC 3339 in UTC, to the second, as Kubernetes writes times."""
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

"""What people are told: every decision has a reason and a sentence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """Something that was decided, for people to read: it becomes an Event."""

    reason: str
    """One CamelCase word."""
    message: str
    """A sentence."""
    warning: bool = False

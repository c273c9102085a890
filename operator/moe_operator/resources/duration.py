"""Durations as users write them: a number and s, m or h, such as 30m."""

from __future__ import annotations

from typing import Final

LENGTH_MOST: Final = 7
_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600}


def rule(field: str, example: str) -> tuple[str, str]:
    """The CEL rule of a field, and its sentence."""
    return "self.matches('^[1-9][0-9]{0,5}[smh]$')", f"{field} is a number and s, m or h, e.g. {example}"


def seconds(text: str) -> int:
    """A duration that satisfies the rule, in seconds."""
    return int(text[:-1]) * _UNITS_S[text[-1]]

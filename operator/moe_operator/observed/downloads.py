"""How far a pod is with downloading the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Download:
    """How far a pod is with downloading the model."""

    done: int
    """Downloaded bytes."""
    total: int
    """Bytes of the model; above 0."""
    seconds_left: int
    """At the current speed; 0 where it is not known."""

    @property
    def text(self) -> str:
        """For people: 42 % of 18.2 GiB, 3 min left."""
        left = f", {_duration(self.seconds_left)} left" if self.seconds_left else ""
        return f"{100 * self.done // self.total} % of {_amount(self.total)}{left}"


def _amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _duration(seconds: int) -> str:
    if seconds < 60:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 3600 else f"{seconds // 3600} h {seconds % 3600 // 60} min"

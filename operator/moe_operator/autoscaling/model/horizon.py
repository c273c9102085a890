"""The horizon of the forecast: the time from the order of a replica until it is ready."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

DEFAULT_S: Final = 300.0
ENOUGH: Final = 5
"""Cold starts needed before they determine the horizon."""
KEPT: Final = 32
"""Number of latest cold starts that count, so that the horizon follows a changed node pool or image."""


def steps_ahead(horizon_s: float) -> int:
    """Minutes from the last finished one to the one that begins when the horizon has passed."""
    return math.ceil(horizon_s / 60.0) + 1


@dataclass(frozen=True)
class ColdStarts:
    """The latest cold starts of one deployment, oldest first: from the creation of the pod to ready."""

    seconds: tuple[float, ...] = ()

    def observed(self, duration_s: float) -> ColdStarts:
        """Adds one; ignores a value that is no duration (negative or not finite)."""
        if not math.isfinite(duration_s) or duration_s <= 0:
            return self
        return ColdStarts((*self.seconds, duration_s)[-KEPT:])

    @property
    def measured(self) -> bool:
        """Whether the horizon is measured."""
        return len(self.seconds) >= ENOUGH

    @property
    def horizon_s(self) -> float:
        """P90 of the cold starts (nearest rank), or 300 s until five are measured."""
        if not self.measured:
            return DEFAULT_S
        rank = math.ceil(0.9 * len(self.seconds))
        return sorted(self.seconds)[rank - 1]

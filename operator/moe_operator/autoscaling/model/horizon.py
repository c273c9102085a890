"""How far ahead to look: as long as a replica takes from its order to its first answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

DEFAULT_S: Final = 300.0
ENOUGH: Final = 5
"""Cold starts that must have been seen before they count."""
KEPT: Final = 32
"""The latest ones decide: a node pool or an image that changed is forgotten after this many."""


def steps_ahead(horizon_s: float) -> int:
    """Minutes from the last finished one to the one that begins when the horizon has passed."""
    return math.ceil(horizon_s / 60.0) + 1


@dataclass(frozen=True)
class ColdStarts:
    """The latest cold starts of one deployment, oldest first: from the pod's creation until it answers."""

    seconds: tuple[float, ...] = ()

    def observed(self, duration_s: float) -> ColdStarts:
        """With one more; what cannot be a duration (negative, not finite) is left out."""
        if not math.isfinite(duration_s) or duration_s <= 0:
            return self
        return ColdStarts((*self.seconds, duration_s)[-KEPT:])

    @property
    def measured(self) -> bool:
        """Whether the horizon is this deployment's own."""
        return len(self.seconds) >= ENOUGH

    @property
    def horizon_s(self) -> float:
        """P90 of the cold starts (nearest rank), or 300 s until five were seen."""
        if not self.measured:
            return DEFAULT_S
        rank = math.ceil(0.9 * len(self.seconds))
        return sorted(self.seconds)[rank - 1]

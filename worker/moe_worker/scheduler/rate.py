"""The rate at which requests end, from which a refused client learns when to retry."""

import math
from dataclasses import dataclass

# Requests that ended this long ago count about a third.
HORIZON_S = 30.0
# The retry delay while no request has ended yet, and the bounds of later ones.
FIRST_DELAY_S = 1.0
LEAST_DELAY_S = 0.05
MOST_DELAY_S = 30.0


@dataclass
class EndRate:
    """Counts ends with exponentially fading weights; `started` is the time of the first request."""

    started: float | None = None
    _weight: float = 0.0
    _at: float = 0.0

    def start(self, now: float) -> None:
        """Records the first request; later calls change nothing."""
        if self.started is None:
            self.started = self._at = now

    def count(self, now: float) -> None:
        """Records the end of a request."""
        self._weight = self._faded(now) + 1.0
        self._at = max(now, self._at)

    def delay_s(self, now: float) -> float:
        """Seconds until one more request is likely to have ended."""
        if self.started is None or not self._weight:
            return FIRST_DELAY_S
        # Weights of a constant rate r over a time t add up to r * HORIZON_S * (1 - exp(-t / HORIZON_S)).
        span_s = HORIZON_S * -math.expm1(-max(now - self.started, LEAST_DELAY_S) / HORIZON_S)
        least_weight = span_s / MOST_DELAY_S
        return max(span_s / max(self._faded(now), least_weight), LEAST_DELAY_S)

    def _faded(self, now: float) -> float:
        return self._weight * math.exp(-max(0.0, now - self._at) / HORIZON_S)

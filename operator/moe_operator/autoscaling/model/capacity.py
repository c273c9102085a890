"""How much work one replica can do within its latency target, learned from what replicas really did."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

_STEP: Final = 0.2
"""Share of the way to a new finding: one slow minute moves little, five in a row two thirds."""
_FARTHEST: Final = 100.0
"""A capacity this many times above or below the prior is a broken report, not a finding."""


@dataclass(frozen=True)
class Capacity:
    """What is known of one deployment's replicas. Frozen; `observed` returns the next one."""

    per_replica: float
    """Work per minute that a replica does within its latency target."""
    prior: float
    """What the spec says."""
    findings: int = 0
    """Minutes that taught something. 0: the prior is all there is."""

    @staticmethod
    def from_prior(prior: float) -> Capacity:
        """Nothing was seen yet."""
        return Capacity(per_replica=prior, prior=prior)

    @property
    def learned(self) -> bool:
        """Whether any minute taught something."""
        return self.findings > 0

    def observed(self, rate_per_replica: float, *, within_target: bool, saturated: bool = False) -> Capacity:
        """After one minute of the ready replicas.

        Only two kinds of minutes teach: more work than thought possible was done in time (capacity is at
        least that), or the target was missed though there was less work than thought possible, or requests
        waited all the minute (capacity is what was completed). A quiet minute in time says nothing.

        Args:
            rate_per_replica: work per minute that one replica completed, on average.
            within_target: the latency target held, by the measure that the spec names.
            saturated: requests were waiting throughout, so the replicas did all they could.
        """
        rate = rate_per_replica
        if not math.isfinite(rate) or not self.prior / _FARTHEST <= rate <= self.prior * _FARTHEST:
            return self
        in_time_above = within_target and rate > self.per_replica
        late_below = not within_target and rate < self.per_replica
        if not (in_time_above or late_below or (saturated and not within_target)):
            return self
        moved = self.per_replica + _STEP * (rate - self.per_replica)
        return replace(self, per_replica=moved, findings=self.findings + 1)

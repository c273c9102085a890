"""The work that one replica can do within its latency target, learned from measured minutes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

_STEP: Final = 0.2
"""Step towards a new value: one slow minute moves the capacity by a fifth, five in a row by two thirds."""
_FARTHEST: Final = 100.0
"""A value this many times above or below the prior is an invalid report."""


@dataclass(frozen=True)
class Capacity:
    """The known capacity of a deployment's replicas. Frozen; `observed` returns an updated one."""

    per_replica: float
    """Work per minute that a replica does within its latency target."""
    prior: float
    """The assumption of the spec."""
    findings: int = 0
    """Number of minutes that changed it. 0: only the prior is known."""

    @staticmethod
    def from_prior(prior: float) -> Capacity:
        """A capacity without measurements."""
        return Capacity(per_replica=prior, prior=prior)

    @property
    def learned(self) -> bool:
        """Whether it was measured."""
        return self.findings > 0

    def observed(self, rate_per_replica: float, *, within_target: bool, saturated: bool = False) -> Capacity:
        """The capacity after one more minute of the ready replicas.

        A minute changes it in two cases. The replicas did more than the known capacity within the target: the
        capacity is at least that. Or they missed the target, and either did less than the known capacity or
        had waiting requests during the whole minute: the capacity is the completed work.

        Args:
            rate_per_replica: work per minute that one replica completed, on average.
            within_target: the latency target was met.
            saturated: requests waited during the whole minute, so the replicas were fully used.
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

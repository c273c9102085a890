"""What the user asks of scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ScalingSpec:
    """Limits and aims of one deployment's scaling. Validated by the CRD, not here."""

    min_replicas: int
    """Fewest replicas; 0 allows none at all while nothing arrives."""
    max_replicas: int
    """Most replicas, at least `min_replicas` and 1."""
    capacity_prior: float
    """Work per minute that one replica does within its latency target, until that was measured; above 0."""
    gpus_per_replica: float = 1.0
    """GPUs that one replica holds: its workers times worker.acceleratorPercentage. 0: none are counted."""
    gpu_limit: float | None = None
    """GPUs that all replicas together may hold; None: no limit besides `max_replicas`."""
    quantile: float = 0.95
    """Demand is planned for this quantile of the forecast: 0.95 is exceeded in one minute of twenty."""
    target_utilisation: float = 0.9
    """Share of its capacity that a replica shall be used to, in (0, 1]; the rest is for uneven routing."""
    scale_down_delay_s: float = 300.0
    """A lower number must have been enough this long before it is taken; the horizon where that is longer."""
    idle_s: float = 600.0
    """Only with `min_replicas` 0: how long nothing must have arrived before the last replica goes."""

    @property
    def most(self) -> int:
        """Replicas that both `max_replicas` and the GPU limit allow; the limit wins over `min_replicas`."""
        if self.gpu_limit is None or self.gpus_per_replica <= 0:
            return self.max_replicas
        # A limit of 1.5 GPUs holds three halves, also where a binary fraction falls short of that.
        return min(self.max_replicas, math.floor(self.gpu_limit / self.gpus_per_replica + 1e-9))

    @property
    def least(self) -> int:
        """Replicas that there are at least."""
        return min(self.min_replicas, self.most)

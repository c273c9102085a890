"""The limits and targets of scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ScalingSpec:
    """Limits and targets of the scaling of one deployment. The CRD validates them, not this class."""

    min_replicas: int
    """Minimum number of replicas; 0 allows scaling to zero while no work arrives."""
    max_replicas: int
    """Maximum number of replicas, at least `min_replicas` and 1."""
    capacity_prior: float
    """Assumed work per minute of one replica within its latency target, until it is measured; above 0."""
    gpus_per_replica: float = 1.0
    """GPUs of one replica: its workers times worker.acceleratorPercentage. 0: GPUs are not counted."""
    gpu_limit: float | None = None
    """GPUs that all replicas together may hold; None: no limit besides `max_replicas`."""
    quantile: float = 0.95
    """Quantile of the forecast that is planned for: 0.95 is exceeded in one minute of twenty."""
    target_utilisation: float = 0.9
    """Target utilisation of a replica, in (0, 1]; the rest of its capacity is for uneven routing."""
    scale_down_delay_s: float = 300.0
    """How long a lower number must suffice before a scale-down; the horizon, if that is longer."""
    idle_s: float = 600.0
    """Only with `min_replicas` 0: idle time before the last replica is deleted."""

    @property
    def most(self) -> int:
        """Maximum number of replicas by `max_replicas` and the GPU limit, which overrides `min_replicas`."""
        if self.gpu_limit is None or self.gpus_per_replica <= 0:
            return self.max_replicas
        # Rounding errors of binary fractions must not take a replica from a limit of 1.5 GPUs.
        return min(self.max_replicas, math.floor(self.gpu_limit / self.gpus_per_replica + 1e-9))

    @property
    def least(self) -> int:
        """Minimum number of replicas."""
        return min(self.min_replicas, self.most)

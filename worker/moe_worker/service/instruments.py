"""Histograms, as OpenTelemetry instruments and as plain sums."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from opentelemetry.metrics import Histogram as OtelHistogram
from opentelemetry.metrics import Meter


@dataclass
class Histogram:
    """Counts values in buckets; `bounds` are their upper ends, themselves included."""

    bounds: Sequence[float]
    counts: list[int] = field(init=False)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def record(self, value: float) -> None:
        """Adds one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


def histogram(meter: Meter, name: str, unit: str, description: str, bounds: Sequence[float]) -> OtelHistogram:
    """An instrument; `bounds` are the upper ends of its buckets."""
    return meter.create_histogram(name, unit, description, explicit_bucket_boundaries_advisory=bounds)

"""The result of a forecaster."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Errors:
    """Recent forecast errors at this horizon, in percent of mean demand; None before the first outcomes."""

    wape: float | None = None
    """Sum of absolute errors of the point forecast over the sum of demand."""
    last_value_wape: float | None = None
    """The same for the last known rate as a forecast (baseline)."""

    @property
    def trustworthy(self) -> bool:
        """Whether the forecast is not clearly worse than the baseline, or has too few outcomes to compare."""
        if self.wape is None or self.last_value_wape is None:
            return True
        return self.wape <= self.last_value_wape * 1.02


@dataclass(frozen=True)
class Forecast:
    """Forecast demand of one future minute."""

    at: float
    """The time it is for, seconds since the epoch."""
    mean: float
    """Median forecast, work per minute."""
    quantiles: tuple[tuple[float, float], ...]
    """(probability, work per minute), ascending in both; never negative."""
    method: str
    """The candidate with the largest weight, or "last value" before the first fit."""
    errors: Errors

    def quantile(self, probability: float) -> float:
        """Quantile of demand, work per minute, interpolated linearly between the known ones.

        Beyond the outermost known probability, the quantile of that one.
        """
        known, rates = zip(*self.quantiles, strict=True)
        return float(np.interp(probability, known, rates))

"""What a forecaster says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Errors:
    """How forecasts fared lately, at this horizon, in percent of mean demand; None before any was due."""

    wape: float | None = None
    """Sum of absolute errors of the point forecast over the sum of demand."""
    last_value_wape: float | None = None
    """The same had the forecast been the last known rate."""

    @property
    def trustworthy(self) -> bool:
        """The forecast is no worse than the last value (a tie is none), or too young to tell."""
        if self.wape is None or self.last_value_wape is None:
            return True
        return self.wape <= self.last_value_wape * 1.02


@dataclass(frozen=True)
class Forecast:
    """Demand of one minute that lies ahead."""

    at: float
    """The time it is for, seconds since the epoch."""
    mean: float
    """Expected work per minute: what as many outcomes lie above as below."""
    quantiles: tuple[tuple[float, float], ...]
    """(probability, work per minute), ascending in both; never negative."""
    method: str
    """Who made it: the candidate that weighs most, or "last value" where nothing was learned yet."""
    errors: Errors

    def quantile(self, probability: float) -> float:
        """Work per minute that demand stays below with this probability; between two known ones linear.

        Outside of what is known, the outermost one.
        """
        known, rates = zip(*self.quantiles, strict=True)
        return float(np.interp(probability, known, rates))

"""Quantiles of forecast errors, by split conformal prediction over a sliding window.

Errors are scaled by their recent size, so that prediction intervals widen when demand becomes volatile
(Lei et al., Distribution-Free Predictive Inference for Regression, 2018, section 5.2).
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, insort
from collections import deque
from statistics import NormalDist
from typing import Final

import numpy as np

from moe_operator.autoscaling.model.forecast.past import Floats

_KEPT: Final = 2016
_ENOUGH: Final = 20
_SPAN: Final = 60
"""Steps over which the size of errors is averaged."""
_LARGEST: Final = 3.0
"""Errors relative to the level are clipped to this: one spike must not widen intervals for hours."""
_AT_FIRST: Final = 0.1
_LEAST: Final = 0.01
_NORMAL: Final = NormalDist()


class Residuals:
    """Errors of one candidate, relative to the level at which they happened. Not thread-safe."""

    def __init__(self) -> None:
        self._order: deque[float] = deque()
        self._sorted = array("d")
        self._size = _AT_FIRST

    @property
    def scale(self) -> float:
        """Current size of errors, relative to the level."""
        return self._size + _LEAST

    def observe(self, error: float, level: float, scale: float) -> None:
        """Learns from an outcome.

        Args:
            error: outcome minus forecast.
            level: at the time of the forecast, above 0.
            scale: `scale` at the time of the forecast.
        """
        self._size += 2 / (_SPAN + 1) * (min(abs(error) / level, _LARGEST) - self._size)
        score = error / (level * scale)
        self._order.append(score)
        insort(self._sorted, score)
        if len(self._order) > _KEPT:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]

    def quantiles(self, probabilities: tuple[float, ...]) -> Floats:
        """Quantiles of errors relative to the level [probabilities]."""
        count = len(self._sorted)
        if count < _ENOUGH:
            # Too few errors: a normal distribution, whose mean absolute value is 0.8 standard deviations.
            return np.array([self.scale * 1.25 * _NORMAL.inv_cdf(p) for p in probabilities])
        ranks = [min(count, max(1, math.ceil(p * (count + 1)))) for p in probabilities]
        return np.array([self._sorted[rank - 1] * self.scale for rank in ranks])

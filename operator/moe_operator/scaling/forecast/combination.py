"""Combines candidates by how they fared, for each quantile on its own.

Polynomially weighted averages with multiple learning rates (ML-Poly) on linearised losses: Gaillard, Stoltz,
van Erven, A second-order bound with excess losses (COLT 2014). It has no rate to tune and comes close to the
best fixed weighted mean of the candidates. Regrets fade, so that it follows a candidate whose time has come.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from moe_operator.scaling.forecast.past import Floats

_MOST: Final = 3.0
"""Larger gains, over the level, count as this."""
_FADE: Final = 0.999
"""What a regret keeps each step: half is forgotten after 693 steps."""


class Combination:
    """Weights of candidates [probabilities, candidates]. Not thread-safe.

    Args:
        probabilities: of the quantiles to combine, in (0, 1); 0.5 gives the point forecast.
        candidates: how many there are.
    """

    def __init__(self, probabilities: tuple[float, ...], candidates: int) -> None:
        self._probabilities = np.array(probabilities)[:, None]
        shape = (len(probabilities), candidates)
        self._regrets = np.zeros(shape)
        self._squares = np.full(shape, 1e-9)
        self.weights = np.full(shape, 1 / candidates)

    def combine(self, forecasts: Floats) -> Floats:
        """Quantiles [probabilities] from the candidates' [probabilities, candidates]."""
        return np.asarray((self.weights * forecasts).sum(axis=1))

    def observe(self, outcome: float, forecasts: Floats, combined: Floats, level: float) -> None:
        """Learns from an outcome.

        Args:
            outcome: what came.
            forecasts: the candidates' quantiles for it [probabilities, candidates].
            combined: what `combine` made of them then [probabilities].
            level: above 0; makes losses comparable over time.
        """
        made = combined[:, None]
        slope = np.where(made > outcome, 1 - self._probabilities, -self._probabilities)
        gains = np.clip(slope * (made - forecasts) / level, -_MOST, _MOST)
        self._regrets = _FADE * self._regrets + gains
        self._squares += gains**2
        weights = np.maximum(self._regrets, 0) / (1 + self._squares)
        sums = weights.sum(axis=1, keepdims=True)
        # Where no candidate is regretted, the present weights are better than any of them.
        self.weights = np.where(sums > 0, weights / np.where(sums > 0, sums, 1), self.weights)

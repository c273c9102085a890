"""Combines the candidates' forecasts by their past losses, separately for each quantile.

Polynomially weighted averages with multiple learning rates (ML-Poly) on linearised losses: Gaillard, Stoltz,
van Erven, A second-order bound with excess losses (COLT 2014). It has no learning rate to tune, and its loss
comes close to that of the best fixed weighted mean of the candidates. With discounted regrets it also follows
a candidate that becomes the best one later; the best discount differs between traces.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from moe_operator.autoscaling.model.forecast.past import Floats

_MOST: Final = 3.0
"""Gains relative to the level are clipped to this."""
MEMORIES: Final = (1.0, 0.999, 0.995, 0.98)
"""Discount factors of regrets per step: no discount, and half-lives of 693, 138 and 34 steps."""


class Combination:
    """Weights of candidates [memories, probabilities, candidates]. Not thread-safe.

    Each discount factor (memory) has weights of its own. Their mean is used, so that none has to be chosen.

    Args:
        probabilities: of the quantiles to combine, in (0, 1); 0.5 gives the point forecast.
        candidates: how many there are.
        memories: discount factors of regrets per step, in (0, 1].
    """

    def __init__(
        self, probabilities: tuple[float, ...], candidates: int, memories: tuple[float, ...] = MEMORIES
    ) -> None:
        self._probabilities = np.array(probabilities)[:, None]
        self._memories = np.array(memories)[:, None, None]
        shape = (len(memories), len(probabilities), candidates)
        self._regrets = np.zeros(shape)
        self._squares = np.full(shape, 1e-9)
        self._weights = np.full(shape, 1 / candidates)

    @property
    def weights(self) -> Floats:
        """Mean over memories [probabilities, candidates]."""
        return np.asarray(self._weights.mean(axis=0))

    def opinions(self, forecasts: Floats) -> Floats:
        """Quantiles by each memory [memories, probabilities]; their mean is the combination.

        Args:
            forecasts: quantiles by each candidate [probabilities, candidates].
        """
        return np.asarray((self._weights * forecasts).sum(axis=-1))

    def observe(self, outcome: float, forecasts: Floats, opinions: Floats, level: float) -> None:
        """Learns from an outcome.

        Args:
            outcome: the observed value.
            forecasts: the candidates' quantiles for it [probabilities, candidates].
            opinions: the result of `opinions` for them [memories, probabilities].
            level: scale of the losses, above 0, which makes them comparable over time.
        """
        made = opinions[:, :, None]
        slope = np.where(made > outcome, 1 - self._probabilities, -self._probabilities)
        gains = np.clip(slope * (made - forecasts) / level, -_MOST, _MOST)
        self._regrets = self._memories * self._regrets + gains
        self._squares += gains**2
        weights = np.maximum(self._regrets, 0) / (1 + self._squares)
        sums = weights.sum(axis=-1, keepdims=True)
        # If no regret is positive, the current weights had a lower loss than any single candidate.
        self._weights = np.where(sums > 0, weights / np.where(sums > 0, sums, 1), self._weights)

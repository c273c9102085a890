"""Candidates without a model: the last value, and means and medians of the latest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from moe_operator.autoscaling.model.forecast.past import Floats, Past

_WINDOWS: Final = (1.0, 2.0, 3.0, 6.0)
"""In horizons."""
_DAY_SHARE: Final = 6
"""A band looks at this part of a day at most."""


@dataclass(frozen=True)
class LastValue:
    """What every forecast must beat."""

    name: str = "last value"

    def predict(self, past: Past, horizon: int) -> float:  # noqa: ARG002
        """The last rate."""
        return float(past.rates[-1])

    def fitted(self, past: Past, horizon: int) -> LastValue:  # noqa: ARG002
        """There is nothing to learn."""
        return self


@dataclass(frozen=True)
class Moving:
    """Mean or median of the latest rates, as many as would have been best during the last day."""

    name: str
    median: bool
    spread: float
    """How far back the band looks, in horizons, but not so far that it would take in the time of day."""
    steps: int | None = None

    def predict(self, past: Past, horizon: int) -> float:
        """Mean or median of the last `steps`; before any fit of one horizon."""
        rates = past.rates[-(self.steps or horizon) :]
        return float(np.median(rates) if self.median else rates.mean())

    def band(self, past: Past, horizon: int, probabilities: tuple[float, ...]) -> Floats:
        """Quantiles of the latest rates [probabilities].

        Where bursts come from nowhere, what there was tells more than how far forecasts were off.
        """
        steps = min(round(self.spread * horizon), max(past.day // _DAY_SHARE, 1))
        latest = np.sort(past.rates[-steps:])
        ranks = [math.ceil(p * (len(latest) + 1)) for p in probabilities]
        return np.asarray(latest[np.clip(ranks, 1, len(latest)) - 1])

    def fitted(self, past: Past, horizon: int) -> Moving:
        """One whose window had the least absolute error."""
        rates = past.rates[-past.day :]
        windows = [max(2, round(share * horizon)) for share in _WINDOWS]
        outcomes = rates[max(windows) - 1 + horizon :]
        if not len(outcomes):
            return self
        errors = [
            float(np.abs(self._all(rates, steps)[-len(outcomes) - horizon : -horizon] - outcomes).sum())
            for steps in windows
        ]
        return replace(self, steps=windows[int(np.argmin(errors))])

    def _all(self, rates: Floats, steps: int) -> Floats:
        views = sliding_window_view(rates, steps)
        return np.asarray(np.median(views, axis=1) if self.median else views.mean(axis=1))

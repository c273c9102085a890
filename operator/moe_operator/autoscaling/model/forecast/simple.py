"""Candidates without a model: the last value, and means and medians of the latest rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from moe_operator.autoscaling.model.forecast.past import Floats, Past

_WINDOWS: Final = (1.0, 2.0, 3.0, 6.0)
"""Window lengths, in horizons."""
_DAY_SHARE: Final = 6
"""A prediction interval uses the rates of at most one of so many parts of a day."""


@dataclass(frozen=True)
class LastValue:
    """The baseline of all forecasts."""

    name: str = "last value"

    def predict(self, past: Past, horizon: int) -> float:  # noqa: ARG002
        """The last rate."""
        return float(past.rates[-1])

    def fitted(self, past: Past, horizon: int) -> LastValue:  # noqa: ARG002
        """Itself: it has no parameters."""
        return self


@dataclass(frozen=True)
class Moving:
    """Mean or median over the window that had the lowest error in the last day."""

    name: str
    median: bool
    spread: float
    """Length of the past behind the prediction interval, in horizons; at most a part of a day."""
    steps: int | None = None

    def predict(self, past: Past, horizon: int) -> float:
        """Mean or median of the last `steps`; of one horizon before the first fit."""
        rates = past.rates[-(self.steps or horizon) :]
        return float(np.median(rates) if self.median else rates.mean())

    def band(self, past: Past, horizon: int, probabilities: tuple[float, ...]) -> Floats:
        """Quantiles of the latest rates [probabilities].

        If bursts are unpredictable, recent rates give better quantiles than errors of forecasts.
        """
        steps = min(round(self.spread * horizon), max(past.day // _DAY_SHARE, 1))
        latest = np.sort(past.rates[-steps:])
        ranks = [math.ceil(p * (len(latest) + 1)) for p in probabilities]
        return np.asarray(latest[np.clip(ranks, 1, len(latest)) - 1])

    def fitted(self, past: Past, horizon: int) -> Moving:
        """A copy with the window that had the lowest absolute error."""
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

"""Candidates without a model: the last value, and means and medians of the latest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from moe_operator.scaling.forecast.past import Floats, Past

_WINDOWS: Final = (1.0, 2.0, 3.0, 6.0)
"""In horizons."""


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
    steps: int | None = None

    def predict(self, past: Past, horizon: int) -> float:
        """Mean or median of the last `steps`; before any fit of one horizon."""
        rates = past.rates[-(self.steps or horizon) :]
        return float(np.median(rates) if self.median else rates.mean())

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

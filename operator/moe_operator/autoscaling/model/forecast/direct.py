"""Direct regression of the rate at the horizon on current features, by least absolute deviations."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Final

import numpy as np
from statsmodels.regression.quantile_regression import QuantReg
from statsmodels.tools.sm_exceptions import IterationLimitWarning

from moe_operator.autoscaling.model.forecast.features import Features
from moe_operator.autoscaling.model.forecast.past import Floats, Past

_ROWS: Final = 5040
"""Maximum rows of one regression; from a longer past every second, every third step ... is taken."""
_FEWEST: Final = 60
_ITERATIONS: Final = 40
_DOUBT: Final = 20.0
"""Weight of the prior that each coefficient is 0, in steps: without it, a short past overfits."""
_DOUBT_HARMONIC: Final = 60.0
"""The same for the harmonics, for which a few days contain little evidence."""
_MOST: Final = 3.0


@dataclass(frozen=True)
class Direct:
    """Forecasts ``level * (1 + features @ coefficients)``."""

    name: str
    days: int
    """Days to learn from."""
    robust: bool = False
    """Relative to the median of the last steps instead of their mean, which spikes would change."""
    slopes: bool = False
    harmonics: bool = False
    coefficients: Floats | None = None

    def columns(self, features: Features) -> tuple[Floats, Floats]:
        """Level [steps] and regressors [steps, columns]."""
        level = features.median_level if self.robust else features.mean_level
        return level, features.relative(level, slopes=self.slopes, harmonics=self.harmonics)

    def predict(self, features: Features) -> float:
        """Work per minute at the horizon after the last step; before any fit the level."""
        level, columns = self.columns(features)
        if self.coefficients is None:
            return float(level[-1])
        return float(level[-1] * (1 + columns[-1] @ self.coefficients))

    def fitted(self, past: Past, features: Features, horizon: int) -> Direct:
        """A copy that is fitted to the past; itself if the past is too short.

        Args:
            past: the observed rates.
            features: of all steps of `past`.
            horizon: steps ahead.
        """
        first = max(horizon, len(past) - self.days * past.day)
        if len(past) - horizon - first < _FEWEST:
            return self
        every = max(1, (len(past) - horizon - first) // _ROWS)
        now = np.arange(len(past) - horizon - 1, first - 1, -every)
        now = now[past.known[now + horizon]]
        if len(now) < _FEWEST:
            return self
        level, columns = self.columns(features)
        ratio = np.clip(past.rates[now + horizon] / level[now] - 1, -1, _MOST)
        weight = level[now] / level[now].mean()
        coefficients = self._least_deviations(ratio * weight, columns[now] * weight[:, None])
        return Direct(self.name, self.days, self.robust, self.slopes, self.harmonics, coefficients)

    def _least_deviations(self, outcomes: Floats, columns: Floats) -> Floats:
        """Adds rows that pull every coefficient except the constant towards 0."""
        doubt = np.full(columns.shape[1], _DOUBT)
        doubt[0] = 0.0
        if self.harmonics:
            doubt[-16:] = _DOUBT_HARMONIC
        scale = np.abs(columns).mean(axis=0)
        outcomes = np.concatenate([outcomes, np.zeros(len(doubt))])
        columns = np.vstack([columns, np.diag(doubt * scale)])
        # With constant demand every residual is 0 and the standard errors, which nobody reads, are undefined.
        with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
            warnings.simplefilter("ignore", IterationLimitWarning)  # close enough; the next refit continues
            return np.asarray(QuantReg(outcomes, columns).fit(0.5, max_iter=_ITERATIONS).params)

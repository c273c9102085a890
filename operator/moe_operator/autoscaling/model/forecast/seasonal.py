"""Candidates with a daily season: Holt-Winters, and harmonic regression with ARIMA errors.

Both estimate the season from hourly means, and the remainder from single steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from statsmodels.regression.linear_model import OLS
from statsmodels.tools.sm_exceptions import ConvergenceWarning, ModelWarning
from statsmodels.tsa.holtwinters import ExponentialSmoothing

from moe_operator.autoscaling.model.forecast import filters
from moe_operator.autoscaling.model.forecast.features import harmonics
from moe_operator.autoscaling.model.forecast.past import Floats, Past, Steps

_LATEST: Final = 1440
"""Steps from which the remainder is estimated, because it changes from day to day."""
_FEWEST: Final = 60
_DAYS_FOR_A_SEASON: Final = 2
_ORDERS: Final = ((0, 1, 1), (1, 1, 1))
_HARMONICS: Final = (0, 2, 4, 6)
_SPARE: Final = 0.5
"""Share of the mean rate that is added before a logarithm is taken: outages and hours without work."""


@dataclass(frozen=True)
class HoltWinters:
    """ETS with damped trend on rates divided by the seasonal factor of their hour, if there is a season."""

    name: str = "Holt-Winters"
    weights: Floats | None = None
    factors: Floats | None = None
    """Seasonal factors of the 24 hours, that of step 0 first; None if there is no season."""

    def predict(self, past: Past, horizon: int) -> float:
        """Work per minute at the horizon after the last step; before any fit the last rate."""
        if self.weights is None:
            return float(past.rates[-1])
        rates = past.rates[-len(self.weights) :]
        ahead = past.end - 1 + horizon
        season = self.season(np.append(np.arange(past.end - len(rates), past.end), ahead), past.day)
        return float(_filtered(rates / season[:-1], self.weights) * season[-1])

    def fitted(self, past: Past, horizon: int) -> HoltWinters:
        """A copy that is fitted to the past; itself if the past is too short."""
        rates = past.rates[-_LATEST:]
        if len(rates) < _FEWEST or rates.max() == rates.min():
            return self
        with _quiet():
            factors = _hourly_factors(past)
            found = replace(self, factors=factors)
            season = found.season(np.arange(past.end - len(rates), past.end), past.day)
            return replace(found, weights=filters.exponential_smoothing(rates / season, horizon))

    def season(self, steps: Steps, day: int) -> Floats:
        """The seasonal component of each step [steps]."""
        if self.factors is None:
            return np.ones(len(steps))
        middles = np.concatenate([self.factors[-1:], self.factors, self.factors[:1]])
        return np.asarray(np.interp(steps % day * 24 / day, np.arange(-0.5, 25), middles))


@dataclass(frozen=True)
class HarmonicArima:
    """Daily harmonics by least squares, their number chosen by BIC, and ARIMA for the residuals."""

    name: str = "harmonic regression with ARIMA errors"
    weights: Floats | None = None
    harmonics: Floats | None = None
    """Coefficients of sines, then cosines, of the logarithm of the rate; None: no season."""
    spare: float = 0.0
    """Work per minute added before the logarithm is taken."""

    def predict(self, past: Past, horizon: int) -> float:
        """Work per minute at the horizon after the last step; before any fit the last rate."""
        if self.weights is None:
            return float(past.rates[-1])
        rates = past.rates[-len(self.weights) :]
        ahead = past.end - 1 + horizon
        season = self.season(np.append(np.arange(past.end - len(rates), past.end), ahead), past.day)
        left = _filtered(np.log(rates + self.spare) - season[:-1], self.weights)
        return float(np.exp(min(left + season[-1], 700.0)) - self.spare)

    def fitted(self, past: Past, horizon: int) -> HarmonicArima:
        """A copy that is fitted to the past; itself if the past is too short."""
        rates = past.rates[-_LATEST:]
        if len(rates) < _FEWEST or rates.max() == rates.min():
            return self
        with _quiet():
            spare = _SPARE * float(past.rates[-past.day :].mean())
            found = replace(self, spare=spare, harmonics=_harmonics_by_bic(past, spare))
            season = found.season(np.arange(past.end - len(rates), past.end), past.day)
            left = np.log(rates + spare) - season
            return replace(found, weights=filters.best_arima(left - left.mean(), _ORDERS, horizon))

    def season(self, steps: Steps, day: int) -> Floats:
        """The seasonal component of each step [steps]."""
        if self.harmonics is None:
            return np.zeros(len(steps))
        return np.asarray(harmonics(steps, day, len(self.harmonics) // 2) @ self.harmonics)


def _filtered(values: Floats, weights: Floats) -> float:
    """The weighted sum; values before the first one count as equal to it."""
    missing = len(weights) - len(values)
    return float(weights[missing:] @ values + weights[:missing].sum() * values[0])


def _hourly_means(past: Past) -> tuple[int, Floats]:
    """The hour of the day of the first mean, and the means of whole hours [hours]."""
    hour = past.day // 24
    first = past.end - len(past)
    skipped = -first % hour
    rates = past.rates[skipped:]
    hours = len(rates) // hour
    return (first + skipped) // hour % 24, rates[: hours * hour].reshape(hours, hour).mean(axis=1)


def _hourly_factors(past: Past) -> Floats | None:
    """Seasonal factors by Holt-Winters; None if a model without a season has the lower AICc."""
    begins, means = _hourly_means(past)
    if len(means) < 24 * _DAYS_FOR_A_SEASON:
        return None
    values = means + _SPARE * means.mean()
    plain = ExponentialSmoothing(values, trend="add", damped_trend=True).fit()
    seasonal = ExponentialSmoothing(
        values, trend="add", damped_trend=True, seasonal="mul", seasonal_periods=24
    ).fit()
    if not seasonal.aicc < plain.aicc:
        return None
    latest = np.asarray(seasonal.season[-24:])
    factors = np.roll(latest, (begins + len(means)) % 24)
    return np.asarray(np.clip(factors / factors.mean(), 0.1, 10.0))


def _harmonics_by_bic(past: Past, spare: float) -> Floats | None:
    begins, means = _hourly_means(past)
    if len(means) < 24 * _DAYS_FOR_A_SEASON:
        return None
    values = np.log(means + spare)
    # With a trend, so that growth over a week does not count as a season.
    trend = np.column_stack([np.ones(len(values)), np.linspace(-1, 1, len(values))])
    middles = np.arange(len(values)) + (begins + 0.5)
    fits = {
        count: OLS(values, np.hstack([trend, harmonics(np.asarray(middles, np.float64), 24, count)])).fit()
        for count in _HARMONICS
    }
    best = min(fits, key=lambda count: fits[count].bic)
    return np.asarray(fits[best].params[2:]) if best else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Ignores warnings of optimisers that stop early: candidates are weighted by their losses anyway."""
    with warnings.catch_warnings():
        for category in (ConvergenceWarning, ModelWarning, RuntimeWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield

"""Features of each step for the direct regressions: smoothed rates, slopes and seasonal changes.

All windows are multiples of the horizon, so that the same constants serve any horizon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.signal import lfilter

from moe_operator.autoscaling.model.forecast.past import Floats, Past, Steps

_SPANS: Final = (0.4, 0.8, 1.6, 3.0, 12.0, 36.0)
"""Spans of exponentially weighted means, in horizons."""
_MEDIANS: Final = (1.0, 3.0)
"""Windows of medians, in horizons."""
_SLOPES: Final = (1.0, 3.0, 6.0, 12.0, 24.0)
"""Spans of means whose change is a slope, in horizons."""
_LEVEL: Final = 6.0
"""Span of the level that rates are taken relative to, in horizons."""
_SMALLEST_LEVEL: Final = 0.05
"""Lower bound of a level, as a share of the last day's mean: at night and in outages rates are near 0."""
_BACK: Final = 0.25
"""Lower bound of a level, as a share of the median of the last three rates."""
_SEASON_S: Final = 1800
"""Seasonal changes compare means over this time on either side."""
_HARMONICS: Final = 8
_MOST: Final = 3.0
"""Relative features are clipped to [-1, this], so that one spike does not dominate a regression."""
_LARGEST_SWING: Final = 0.5
_TAIL: Final = 4
"""Spans after which the initial value of an exponentially weighted mean has decayed to 0.03 %."""


def level_steps(horizon: int) -> int:
    """Window of the median that is the current level, in steps; odd."""
    return max(3, int(_LEVEL * horizon) | 1)


@dataclass(frozen=True)
class Features:
    """Features of consecutive steps, oldest first, from data that is known at the end of each step."""

    day_mean: Floats
    """Mean of the last day [steps], above 0."""
    mean_level: Floats
    """Exponentially weighted mean over about six horizons [steps], above 0."""
    median_level: Floats
    """Median of about six horizons [steps], above 0."""
    smoothed: Floats
    """The latest rate, means and medians, work per minute [steps, kinds]."""
    slopes: Floats
    """Changes of means, work per minute [steps, kinds]."""
    seasons: Floats
    """Logarithm of the rate's change over the next horizon a day and a week ago [steps, 2]; 0 if unknown."""
    harmonics: Floats
    """Sines and cosines of the time of day at the horizon [steps, 16]."""

    @staticmethod
    def of(past: Past, horizon: int, steps: int) -> Features:
        """Features of the last `steps` steps."""
        rates = past.rates
        tail = int(_TAIL * max(*_SPANS, *_SLOPES) * horizon)
        near = rates[max(0, len(rates) - steps - tail) :]
        # The level follows at once when load returns after an outage, but does not follow a single spike.
        back = _BACK * _median(near, 3, steps)
        day_mean = _day_mean(rates, past.day, steps)
        floor = np.maximum(_SMALLEST_LEVEL * day_mean, back)
        mean_level = np.maximum(_smoothed(near, _LEVEL * horizon)[-steps:], floor)
        medians = [_median(near, round(share * horizon), steps) for share in _MEDIANS]
        means = [_smoothed(near, share * horizon)[-steps:] for share in _SPANS]
        ends = np.arange(len(rates) - steps, len(rates))
        return Features(
            day_mean=day_mean,
            mean_level=mean_level,
            median_level=np.maximum(_median(near, level_steps(horizon), steps), floor),
            smoothed=np.column_stack([near[-steps:], *means, *medians]),
            slopes=_slopes(near, horizon, steps),
            seasons=np.column_stack(
                [_season(rates, ends, lag, horizon, past.day, mean_level) for lag in (past.day, 7 * past.day)]
            ),
            harmonics=harmonics(np.arange(past.end - steps, past.end) + horizon, past.day, _HARMONICS),
        )

    def relative(self, level: Floats, *, slopes: bool, harmonics: bool) -> Floats:
        """Columns of a regression of the rate at the horizon over `level`, minus 1 [steps, columns]."""
        columns = [
            np.ones((len(level), 1)),
            np.clip(self.smoothed / level[:, None] - 1, -1, _MOST),
            self.seasons,
        ]
        if slopes:
            columns.append(np.clip(self.slopes / level[:, None], -1, 1))
        if harmonics:
            columns.append(self.harmonics)
        return np.hstack(columns)


def harmonics(steps: Floats | Steps, day: int, count: int) -> Floats:
    """Sines and cosines of the first `count` harmonics of a day [steps, 2 * count]."""
    angles = 2 * np.pi * np.outer(steps, np.arange(1, count + 1)) / day
    return np.hstack([np.sin(angles), np.cos(angles)])


def _smoothed(rates: Floats, span: float) -> Floats:
    weight = 2 / (max(span, 1.5) + 1)
    return np.asarray(lfilter([weight], [1, weight - 1], rates, zi=[(1 - weight) * rates[0]])[0])


def _median(rates: Floats, window: int, steps: int) -> Floats:
    """Moving medians of the last `steps`; values before the first rate count as equal to it."""
    if window <= 2:
        return rates[-steps:]
    latest = rates[-(steps + window - 1) :]
    padded = np.concatenate([np.full(steps + window - 1 - len(latest), rates[0]), latest])
    return np.asarray(np.median(sliding_window_view(padded, window), axis=1))


def _slopes(near: Floats, horizon: int, steps: int) -> Floats:
    columns = []
    for share in _SLOPES:
        span = max(2, round(share * horizon))
        mean = _smoothed(near, span)
        for back in (span // 2 + 1, span):
            before = np.concatenate([np.full(min(back, len(mean)), mean[0]), mean[:-back]])
            columns.append((mean - before)[-steps:])
    return np.column_stack(columns)


def _day_mean(rates: Floats, day: int, steps: int) -> Floats:
    """Mean of the day that ends with each of the last steps, above 0."""
    latest = rates[-(steps + day - 1) :]
    sums = np.concatenate([[0.0], np.cumsum(latest)])
    ends = np.arange(len(latest) - steps + 1, len(latest) + 1)
    begins = np.maximum(ends - day, 0)
    return np.asarray((sums[ends] - sums[begins]) / (ends - begins)) + 1e-9


def _season(rates: Floats, ends: Steps, lag: int, horizon: int, day: int, level: Floats) -> Floats:
    width = max(1, _SEASON_S * day // 86400)
    before, after = ends - lag, ends - lag + horizon
    usable = (before - width >= 0) & (after + width <= ends)
    if not usable.any():
        return np.zeros(len(ends))
    first = max(0, int(before[usable].min()) - width)
    sums = np.concatenate([[0.0], np.cumsum(rates[first : int(after.max()) + width + 1])])

    def mean(centres: Steps) -> Floats:
        low = np.clip(centres - width - first, 0, len(sums) - 1)
        high = np.clip(centres + width + 1 - first, 0, len(sums) - 1)
        return np.asarray((sums[high] - sums[low]) / np.maximum(high - low, 1))

    spare = 0.05 * level
    swing = np.log((mean(after) + spare) / (mean(before) + spare))
    return np.where(usable, np.clip(swing, -_LARGEST_SWING, _LARGEST_SWING), 0.0)

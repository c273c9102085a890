"""The forecaster of one deployment: learns from each finished step and forecasts the rate at the horizon."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from moe_operator.autoscaling.model.forecast.combination import Combination
from moe_operator.autoscaling.model.forecast.direct import Direct
from moe_operator.autoscaling.model.forecast.features import Features, level_steps
from moe_operator.autoscaling.model.forecast.past import Floats, Past
from moe_operator.autoscaling.model.forecast.residuals import Residuals
from moe_operator.autoscaling.model.forecast.result import Errors, Forecast
from moe_operator.autoscaling.model.forecast.seasonal import HarmonicArima, HoltWinters
from moe_operator.autoscaling.model.forecast.simple import LastValue, Moving
from moe_operator.autoscaling.model.history import History

QUANTILES: Final = (0.05, 0.5, 0.9, 0.95, 0.99, 0.995, 0.999)
_POINT: Final = QUANTILES.index(0.5)
_DAY_S: Final = 86_400
_FIRST_REFIT: Final = 60
"""Steps before the first refit."""
_REFIT_DAY_SHARE: Final = 4
"""Minimum refits per day; in the first days models are refitted whenever the past has grown by a tenth."""

Model = LastValue | Moving | HoltWinters | HarmonicArima
_MODELS: Final[tuple[Model, ...]] = (
    LastValue(),
    Moving("moving average", median=False, spread=24.0),
    Moving("moving median", median=True, spread=6.0),
    HoltWinters(),
    HarmonicArima(),
)
_DIRECT: Final = (
    Direct("direct regression", days=14),
    Direct("direct regression on the last day", days=1),
    Direct("direct regression, robust", days=7, robust=True, slopes=True),
    Direct("direct regression with the time of day", days=14, harmonics=True),
)
CANDIDATES: Final = tuple(candidate.name for candidate in (*_MODELS, *_DIRECT))

# Work per minute; a higher value is no measurement, and sums of it would overflow.
HIGHEST_RATE: Final = 1e12


@dataclass(frozen=True)
class Fitted:
    """Models learned from the past; only for `Forecaster.adopt`."""

    models: tuple[Model, ...] = _MODELS
    direct: tuple[Direct, ...] = _DIRECT


@dataclass(frozen=True)
class Pending:
    """A forecast whose outcome is not known yet."""

    level: float
    """Work per minute when it was made, above 0."""
    loss_level: float
    """Scale of losses, work per minute, above 0; it hardly changes in an outage."""
    scales: tuple[float, ...]
    points: Floats
    """Point forecasts [candidates]."""
    bands: Floats
    """Quantiles of the candidates [QUANTILES, candidates], at least 0."""
    opinions: Floats
    """Quantiles by each memory of the combination [memories, QUANTILES]."""
    combined: Floats
    """Combined quantiles [QUANTILES], ascending, at least 0."""


class Forecaster:
    """Forecasts the rate of one step of time, `horizon_steps` after the last finished one.

    Not thread-safe, but the function that `refit_job` returns may run in another thread.

    Args:
        horizon_steps: at least 1.
        step_s: length of a step, at most an hour.
    """

    def __init__(self, horizon_steps: int = 5, step_s: float = 60.0) -> None:
        self._horizon = horizon_steps
        self._step_s = step_s
        day = round(_DAY_S / step_s)
        self._past = Past(day, level_steps(horizon_steps))
        self._fitted = Fitted()
        self._refitted_at: int | None = None
        self._steps = 0
        self._residuals = [Residuals() for _ in CANDIDATES]
        self._combination = Combination(QUANTILES, len(CANDIDATES))
        self._pending: deque[Pending | None] = deque(maxlen=horizon_steps)
        self._errors = _RollingErrors(day)

    @classmethod
    def restored(cls, history: History, horizon_steps: int) -> Forecaster:
        """A forecaster that has observed `history`, for a restart or a changed horizon. Takes seconds.

        The models are fitted to all but the last day; the last day is then replayed step by step.
        """
        forecaster = cls(horizon_steps)
        minutes = list(history.items())
        for minute, rate in minutes[:-1440]:
            forecaster._past.append(minute, rate)
            forecaster._steps += 1
        if forecaster.refit_due:
            forecaster.adopt(forecaster.refit_job()())
        for minute, rate in minutes[-1440:]:
            forecaster.update(minute, rate)
        return forecaster

    @property
    def horizon_steps(self) -> int:
        """Steps between the last finished one and the one forecast."""
        return self._horizon

    @property
    def latest(self) -> Pending | None:
        """The candidates' forecasts of the step that `forecast` is for."""
        return self._pending[-1] if self._pending else None

    def update(self, step: int, rate: float | None) -> None:
        """Observes the rate of a finished step. Takes at most 5 ms.

        Args:
            step: number of the step (a minute's start over 60 s). Skipped steps are gaps; a step that was
                observed already is ignored.
            rate: work per minute; None if it is unknown, as are negative rates and those above HIGHEST_RATE.
        """
        if self._steps and step < self._past.end:
            return
        known = rate if rate is not None and 0 <= rate <= HIGHEST_RATE else None
        if not self._steps and known is None:
            return
        holes = step - self._past.end if self._steps else 0
        for _ in range(min(holes, self._horizon)):
            self._pending.append(None)
        self._past.append(step, known)
        self._steps += holes + 1
        due = self._pending[0] if len(self._pending) == self._horizon else None
        if due is not None and known is not None:
            self._learn(due, known)
        self._pending.append(self._forecasts())

    @property
    def refit_due(self) -> bool:
        """Whether the models should be fitted again: four times a day, in the first days more often."""
        if self._refitted_at is None:
            return self._steps >= _FIRST_REFIT
        fresh = self._steps - self._refitted_at
        return fresh >= min(self._refitted_at // 10, self._past.day // _REFIT_DAY_SHARE)

    def refit_job(self) -> Callable[[], Fitted]:
        """Returns a function that fits the models to all rates so far: at most 1 s, for another thread.

        Use: ``forecaster.adopt(await asyncio.to_thread(forecaster.refit_job()))``.
        """
        past, horizon, fitted = self._past.copy(), self._horizon, self._fitted
        self._refitted_at = self._steps

        def job() -> Fitted:
            features = Features.of(past, horizon, len(past))
            return Fitted(
                tuple(model.fitted(past, horizon) for model in fitted.models),
                tuple(direct.fitted(past, features, horizon) for direct in fitted.direct),
            )

        return job

    def adopt(self, fitted: Fitted) -> None:
        """Forecasts with these models from now on."""
        self._fitted = fitted

    def forecast(self) -> Forecast | None:
        """The forecast for `horizon_steps` after the last step; None until a rate is known."""
        latest = self.latest
        if latest is None:
            return None
        weights = self._combination.weights[_POINT]
        # Not !=, which would compare the arrays of models; those with too few rates for the horizon stay.
        fitted = any(model is not start for model, start in zip(self._fitted.models, _MODELS, strict=True))
        return Forecast(
            at=(self._past.end - 1 + self._horizon) * self._step_s,
            mean=float(latest.combined[_POINT]),
            quantiles=tuple(zip(QUANTILES, map(float, latest.combined), strict=True)),
            method=CANDIDATES[int(np.argmax(weights))] if fitted else "last value",
            errors=self._errors.now,
        )

    def _forecasts(self) -> Pending:
        features = Features.of(self._past, self._horizon, 1)
        points = np.array(
            [model.predict(self._past, self._horizon) for model in self._fitted.models]
            + [direct.predict(features) for direct in self._fitted.direct]
        )
        level = float(max(features.mean_level[0], features.median_level[0]))
        # A bad fit must not forecast more than a few times the highest rate so far.
        points = np.clip(np.nan_to_num(points, nan=level), 0, 10 * level + self._past.rates.max())
        bands = self._bands(points, level)
        opinions = self._combination.opinions(bands)
        combined = np.maximum.accumulate(opinions.mean(axis=0))
        loss_level = max(level, float(features.day_mean[0]))
        return Pending(
            level, loss_level, tuple(r.scale for r in self._residuals), points, bands, opinions, combined
        )

    def _bands(self, points: Floats, level: float) -> Floats:
        """Quantiles of the candidates [QUANTILES, candidates]: the middle one is their point."""
        errors = np.column_stack([residuals.quantiles(QUANTILES) for residuals in self._residuals])
        bands = points + level * errors
        for index, model in enumerate(self._fitted.models):
            if isinstance(model, Moving):
                bands[:, index] = model.band(self._past, self._horizon, QUANTILES)
        # Errors relative to a level near 0 do not apply to a higher one: a burst must not order thousands.
        bands = np.clip(bands, 0, np.maximum(self._past.rates.max(), 2 * points))
        bands[_POINT] = points
        return bands

    def _learn(self, due: Pending, outcome: float) -> None:
        for residuals, point, scale in zip(self._residuals, due.points, due.scales, strict=True):
            residuals.observe(outcome - point, due.level, scale)
        self._combination.observe(outcome, due.bands, due.opinions, due.loss_level)
        self._errors.observe(outcome, float(due.combined[_POINT]), float(due.points[0]))


class _RollingErrors:
    """Absolute errors over about one day, of the forecast and of the last value."""

    def __init__(self, day: int) -> None:
        self._fade = 1 - 1 / day
        self._sums = np.zeros(3)
        self._count = 0

    def observe(self, outcome: float, forecast: float, last_value: float) -> None:
        self._sums = self._fade * self._sums + [abs(outcome - forecast), abs(outcome - last_value), outcome]
        self._count += 1

    @property
    def now(self) -> Errors:
        ours, last_value, demand = map(float, self._sums)
        if self._count < _FIRST_REFIT or demand <= 0:
            return Errors()
        return Errors(wape=100 * ours / demand, last_value_wape=100 * last_value / demand)

"""Forecasts over a whole trace, each from what was known at its time, and how good they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moe_operator.autoscaling.model.forecast.combination import Combination
from moe_operator.autoscaling.model.forecast.forecaster import CANDIDATES, QUANTILES, Forecaster, Pending
from moe_operator.autoscaling.model.forecast.past import Floats
from moe_operator.autoscaling.model.forecast.result import Forecast
from moe_tools.replay.trace import WorkTrace

_P50, _P90 = QUANTILES.index(0.5), QUANTILES.index(0.9)
_DAY_S: Final = 86_400


@dataclass(frozen=True)
class Score:
    """How good the forecasts of one method were; errors in percent of mean demand.

    NaN where nothing was scored, because the trace is too short or no work arrived.
    """

    wape: float
    """Sum of absolute errors over the sum of demand."""
    pinball_p90: float
    """Mean pinball loss of the P90 over mean demand."""
    coverage_p90: float
    """Percent of outcomes at or below the P90."""


@dataclass(frozen=True)
class Backtest:
    """Forecasts with a rolling origin. Index: the step that they were for, from `horizon` on."""

    horizon: int
    points: Floats
    """Of the candidates [steps, candidates]; NaN where there was none."""
    bands: Floats
    """P90 of the candidates [steps, candidates]."""
    combined: Floats
    """Quantiles of all together [steps, QUANTILES]."""
    loss_levels: Floats
    """Work per minute that losses were taken relative to [steps]."""
    made: list[Forecast | None]
    """By the step at whose end they were made [steps]."""


def backtest(trace: WorkTrace, horizon: int, progress: Callable[[int], None] = lambda _: None) -> Backtest:
    """Goes through a trace as the operator would, refits included.

    Args:
        trace: what to go through.
        horizon: steps ahead.
        progress: told the number of steps done, now and then.
    """
    forecaster = Forecaster(horizon, trace.step_s)
    first = round(trace.start / trace.step_s)
    count = len(trace.rates)
    points, bands = np.full((2, count + horizon, len(CANDIDATES)), np.nan)
    combined = np.full((count + horizon, len(QUANTILES)), np.nan)
    loss_levels = np.full(count + horizon, np.nan)
    made: list[Forecast | None] = []
    for step, rate in enumerate(trace.rates):
        forecaster.update(first + step, None if np.isnan(rate) else float(rate))
        if forecaster.refit_due:
            forecaster.adopt(forecaster.refit_job()())
        latest: Pending | None = forecaster.latest
        if latest is not None:
            points[step + horizon], bands[step + horizon] = latest.points, latest.bands[_P90]
            combined[step + horizon] = latest.combined
            loss_levels[step + horizon] = latest.loss_level
        made.append(forecaster.forecast())
        if step % 100 == 0:
            progress(step)
    progress(count)
    return Backtest(horizon, points[:count], bands[:count], combined[:count], loss_levels[:count], made)


def warm_up(trace: WorkTrace) -> int:
    """Steps that are not scored: a day, or a third of a shorter trace."""
    return min(round(_DAY_S / trace.step_s), len(trace.rates) // 3)


def scores(trace: WorkTrace, test: Backtest) -> tuple[Score, dict[str, Score]]:
    """Of the combination, and of each candidate alone with a band from its own errors, by name."""
    scored = _scored(trace, test)
    demand = trace.rates[scored]
    ours = _score(demand, test.combined[scored, _P50], test.combined[scored, _P90])
    candidates = {
        name: _score(demand, test.points[scored, index], test.bands[scored, index])
        for index, name in enumerate(CANDIDATES)
    }
    return ours, candidates


def recombined(trace: WorkTrace, test: Backtest, memories: tuple[float, ...]) -> Score:
    """The score had the combination had other memories."""
    combination = Combination((0.5, 0.9), len(CANDIDATES), memories)
    forecasts = np.stack([test.points, test.bands], axis=1)
    opinions = np.full((len(trace.rates), len(memories), 2), np.nan)
    for step in range(len(trace.rates)):
        if np.isnan(forecasts[step]).any():
            continue
        # What was forecast for this step knew the outcomes until a horizon before it.
        known = step - test.horizon
        if known >= 0 and not np.isnan(opinions[known]).any() and not np.isnan(trace.rates[known]):
            combination.observe(
                float(trace.rates[known]), forecasts[known], opinions[known], float(test.loss_levels[known])
            )
        opinions[step] = combination.opinions(forecasts[step])
    combined = opinions.mean(axis=1)
    scored = _scored(trace, test)
    return _score(trace.rates[scored], combined[scored, 0], combined[scored, 1])


def _scored(trace: WorkTrace, test: Backtest) -> NDArray[np.bool_]:
    """The steps that count [steps]."""
    late = np.arange(len(trace.rates)) >= max(warm_up(trace), test.horizon)
    return np.asarray(late & ~np.isnan(trace.rates) & ~np.isnan(test.combined[:, 0]))


def _score(demand: Floats, point: Floats, p90: Floats) -> Score:
    mean = float(demand.mean()) if len(demand) else 0.0
    if mean <= 0:
        return Score(math.nan, math.nan, math.nan)
    short = demand - p90
    return Score(
        wape=100 * float(np.abs(demand - point).mean()) / mean,
        pinball_p90=100 * float(np.maximum(0.9 * short, -0.1 * short).mean()) / mean,
        coverage_p90=100 * float((short <= 0).mean()),
    )

"""The forecaster of one deployment: learns from each finished minute, says what the horizon will bring."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from moe_operator.scaling.forecast.result import Errors, Forecast
from moe_operator.scaling.history import History

QUANTILES: Final = (0.05, 0.5, 0.9, 0.95, 0.99, 0.995)
_WINDOW: Final = 1440


@dataclass(frozen=True)
class Fitted:
    """Models learned from the past; only for `Forecaster.adopt`."""


class Forecaster:
    """Forecasts the rate of one step of time, `horizon` steps ahead.

    Not thread-safe, except that what `refit_job` returns may run in another thread.
    """

    def __init__(self, horizon_steps: int = 5, step_s: float = 60.0) -> None:
        self._horizon = horizon_steps
        self._step_s = step_s
        self._step: int | None = None
        self._recent: deque[float] = deque(maxlen=horizon_steps + 1)
        self._ratios: deque[float] = deque(maxlen=_WINDOW)

    @classmethod
    def restored(cls, history: History, horizon_steps: int) -> Forecaster:
        """One that has seen `history`: after a restart, or when the horizon changed. Takes up to seconds."""
        forecaster = cls(horizon_steps)
        for minute, rate in history.items():
            forecaster.update(minute, rate)
        return forecaster

    @property
    def horizon_steps(self) -> int:
        """Steps between the last finished one and the one forecast."""
        return self._horizon

    def update(self, step: int, rate: float | None) -> None:
        """Takes in the rate of a finished step. At most 5 ms.

        Args:
            step: number of the step (a minute's start over 60 s); steps left out are gaps. One that was seen
                already is ignored.
            rate: work per minute; None where it is unknown. Negative or not finite counts as unknown.
        """
        if self._step is not None and step <= self._step:
            return
        gap = 0 if self._step is None else min(step - self._step - 1, self._horizon + 1)
        known = rate is not None and math.isfinite(rate) and rate >= 0
        for value in [math.nan] * gap + [rate if rate is not None and known else math.nan]:
            self._recent.append(value)
        self._step = step
        before, now = self._recent[0], self._recent[-1]
        if len(self._recent) > self._horizon and math.isfinite(before) and math.isfinite(now):
            self._ratios.append((now - before) / math.sqrt(before + 1))

    @property
    def refit_due(self) -> bool:
        """Whether the models should be learned anew: about once an hour, and when enough was first seen."""
        return False

    def refit_job(self) -> Callable[[], Fitted]:
        """What learns the models anew from what was seen until now: at most 1 s, for another thread.

        Use: ``forecaster.adopt(await asyncio.to_thread(forecaster.refit_job()))``.
        """
        return Fitted

    def adopt(self, fitted: Fitted) -> None:
        """Forecasts with these models from now on."""

    def forecast(self) -> Forecast | None:
        """The rate `horizon` steps after the last one updated; None while no rate is known."""
        known = [rate for rate in self._recent if math.isfinite(rate)]
        if not known or self._step is None:
            return None
        last = known[-1]
        spread = np.quantile(self._ratios, QUANTILES) if len(self._ratios) >= 20 else np.zeros(len(QUANTILES))
        rates = np.maximum(last + spread * math.sqrt(last + 1), 0.0)
        return Forecast(
            at=(self._step + self._horizon) * self._step_s,
            mean=last,
            quantiles=tuple(zip(QUANTILES, map(float, rates), strict=True)),
            method="last value",
            errors=Errors(),
        )

"""The policies that a replay compares; reactive ones follow the documentation of their namesakes."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np

from moe_operator.autoscaling.model.forecast.past import Floats
from moe_operator.autoscaling.model.forecast.result import Errors, Forecast
from moe_operator.autoscaling.model.sizing import Situation, Want, size
from moe_operator.autoscaling.model.spec import ScalingSpec
from moe_tools.replay.simulator import Policy, Service, View, filled

_MOST_STATIC: Final = 200
_UNLIMITED: Final = 1_000_000
_TOLERANCE: Final = 0.1
_TARGETS: Final = tuple(round(0.30 + 0.025 * step, 3) for step in range(29))
_WINDOWS_S: Final = (300.0, 900.0)


@dataclass(frozen=True)
class Variant:
    """A policy with its knobs set."""

    knobs: dict[str, float]
    make: Callable[[], Policy] = field(repr=False)
    """A fresh one, for one run."""


def static_peak(rates: Floats, service: Service) -> list[Variant]:
    """The same number all the time, up to what the busiest step needs; of many numbers evenly spaced ones."""
    highest = max(1, math.ceil(float(filled(rates).max()) / service.capacity))
    counts = np.unique(np.linspace(1, highest, min(highest, _MOST_STATIC)).round())
    return [
        Variant({"replicas": float(count)}, lambda count=int(count): lambda _: count)  # type: ignore[misc]
        for count in counts
    ]


def hpa(service: Service) -> list[Variant]:
    """HorizontalPodAutoscaler on utilisation, which cannot show more than that all ready replicas are busy.

    Tolerance 10 %, replicas that start count as idle when scaling up, stabilisation when scaling down.
    """
    return _grid(partial(_Hpa, service), "stabilisation_s", _WINDOWS_S)


def keda(service: Service) -> list[Variant]:
    """The rate of requests, averaged over two minutes, plus the queue, over a threshold for each replica."""
    return _grid(partial(_Keda, service), "stabilisation_s", _WINDOWS_S)


def knative(service: Service) -> list[Variant]:
    """Concurrency over a stable window of 60 s; a doubled need panics: no step down for 60 s after it."""
    return _grid(partial(_Knative, service), "scale_down_delay_s", (0.0, *_WINDOWS_S))


def _grid(policy: Callable[[float, float], Policy], delay: str, delays: Iterable[float]) -> list[Variant]:
    """A policy with each target and each delay.

    delay: name of the parameter that delays a step down.
    """
    return [
        Variant({"target": target, delay: seconds}, partial(policy, target, seconds))
        for target, seconds in itertools.product(_TARGETS, delays)
    ]


def moe(service: Service, forecasts: list[Forecast | None]) -> list[Variant]:
    """The operator's own plan with the forecasts made at each step."""
    quantiles, targets = (0.9, 0.95, 0.99, 0.995), tuple(target for target in _TARGETS if target >= 0.5)
    return [
        Variant(
            {"quantile": quantile, "target_utilisation": target},
            partial(_Moe, service, forecasts, quantile, target),
        )
        for quantile, target in itertools.product(quantiles, targets)
    ]


def default(service: Service, forecasts: list[Forecast | None]) -> Policy:
    """The operator's plan as it is set by default."""
    spec = ScalingSpec(1, _UNLIMITED, service.capacity)
    return _Moe(service, forecasts, spec.quantile, spec.target_utilisation)


def perfect(rates: Floats, service: Service) -> Variant:
    """The same plan with a forecast that is always right."""
    demands = filled(rates)
    right = [
        _certain(float(demands[min(step + service.delay, len(demands) - 1)])) for step in range(len(demands))
    ]
    return Variant({"target_utilisation": 1.0}, lambda: _Moe(service, list(right), 0.9, 1.0))


def _certain(rate: float) -> Forecast:
    return Forecast(0.0, rate, ((0.5, rate), (0.9, rate)), "perfect", Errors())


class _Moe:
    def __init__(
        self, service: Service, forecasts: list[Forecast | None], quantile: float, target: float
    ) -> None:
        self._service, self._forecasts = service, forecasts
        self._spec = ScalingSpec(
            1, _UNLIMITED, service.capacity, quantile=quantile, target_utilisation=target
        )
        self._wants: tuple[Want, ...] = ()

    def __call__(self, view: View) -> int:
        situation = Situation(
            replicas=view.ordered,
            starting=view.ordered - view.ready,
            demand=view.demand,
            capacity=self._service.capacity,
            horizon_s=self._service.delay * self._service.step_s,
            waiting=view.waiting,
            wants=self._wants,
        )
        made = size(self._spec, situation, self._forecasts[view.step], view.step * self._service.step_s)
        self._wants = made.wants
        return made.replicas


class _Window:
    """The largest of the recommendations of the last so many seconds."""

    def __init__(self, service: Service, window_s: float) -> None:
        self._recent: deque[int] = deque(maxlen=max(1, math.ceil(window_s / service.step_s)))

    def largest(self, recommendation: int) -> int:
        self._recent.append(recommendation)
        return max(self._recent)


class _Hpa:
    def __init__(self, service: Service, target: float, window_s: float) -> None:
        self._capacity, self._target = service.capacity * service.step_s / 60, target
        self._minutes = service.step_s / 60
        self._window = _Window(service, window_s)

    def __call__(self, view: View) -> int:
        return self._window.largest(self._recommended(view)) if view.demand is not None else view.ordered

    def _recommended(self, view: View) -> int:
        if view.ready == 0:
            return view.ordered
        work = (view.demand or 0.0) * self._minutes + view.waiting
        busy = min(work / (view.ready * self._capacity), 1.0) * view.ready
        ratio = busy / view.ready / self._target
        if ratio > 1:
            ratio = busy / view.ordered / self._target
            if ratio <= 1:
                return view.ordered
        if abs(ratio - 1) <= _TOLERANCE:
            return view.ordered
        return max(1, math.ceil(busy / self._target - 1e-9))


class _Keda:
    def __init__(self, service: Service, target: float, window_s: float) -> None:
        self._threshold = service.capacity * target
        self._minutes = service.step_s / 60
        self._rates: deque[float] = deque(maxlen=max(1, round(120 / service.step_s)))
        self._window = _Window(service, window_s)

    def __call__(self, view: View) -> int:
        if view.demand is None:
            return view.ordered
        self._rates.append(view.demand)
        rate = sum(self._rates) / len(self._rates) + view.waiting / self._minutes
        return self._window.largest(max(1, math.ceil(rate / self._threshold - 1e-9)))


class _Knative:
    def __init__(self, service: Service, target: float, delay_s: float) -> None:
        self._threshold = service.capacity * target
        self._step_s, self._minutes = service.step_s, service.step_s / 60
        self._panics_until = -1.0
        self._window = _Window(service, delay_s)

    def __call__(self, view: View) -> int:
        if view.demand is None:
            return view.ordered
        now = view.step * self._step_s
        wanted = max(1, math.ceil((view.demand + view.waiting / self._minutes) / self._threshold - 1e-9))
        if wanted >= 2 * view.ready:
            self._panics_until = now + 60
        if now <= self._panics_until:
            wanted = max(wanted, view.ordered)
        return self._window.largest(max(wanted, math.ceil(view.ordered / 2)))

"""The state of one deployment's scaling, and the decision that follows from it every few seconds."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from moe_operator.autoscaling.model.capacity import Capacity
from moe_operator.autoscaling.model.forecast.result import Forecast
from moe_operator.autoscaling.model.history import History
from moe_operator.autoscaling.model.horizon import ColdStarts, steps_ahead
from moe_operator.autoscaling.model.samples import MinuteRate, MinuteRates, Report
from moe_operator.autoscaling.model.sizing import Situation, Sizing, Want, size
from moe_operator.autoscaling.readings import Reading
from moe_operator.autoscaling.subject import Subject
from moe_operator.resources.scaling_spec import Mode
from moe_operator.resources.scaling_status import ReplicaLoadStatus

if TYPE_CHECKING:
    from moe_operator.autoscaling.model.forecast.forecaster import Forecaster

MINUTE_S = 60.0
_LATE_MOST = 0.05
"""Share of requests that may miss the latency target, which is for 95 of 100."""
_DEMAND_MINUTES = 3
"""An older rate, in minutes, is not used as the current demand."""
_PLAUSIBLE = 1000.0
"""A report of more than this many times the prior capacity is invalid."""


@dataclass(frozen=True)
class Memory:
    """State that outlives the process."""

    history: History
    cold_starts: ColdStarts
    measured: frozenset[str]
    """UIDs of pods whose cold start is included."""
    capacity: Capacity
    whole_until: int = 0
    """The minute before which all rates are in the stored whole history; 0 if there is none."""


@dataclass(frozen=True)
class _Round:
    """The contribution of one round to its minute."""

    ready: int
    """Ready replicas."""
    queueing: int
    """Of these, replicas with queued requests."""


@dataclass(frozen=True)
class Outcome:
    """The result of one round."""

    sizing: Sizing
    forecast: Forecast | None
    demand: float | None
    """Work per minute in the last known minute."""
    capacity: Capacity
    cold_starts: ColdStarts
    latency_target_s: float
    """Seconds to the first token that 95 of 100 requests must meet."""
    wrong: dict[str, str]
    """Replicas whose reports were ignored, with the reason, which completes "its report ..."."""
    silent: frozenset[str]
    closed: bool
    """A minute ended."""
    loads: tuple[ReplicaLoadStatus, ...] = ()
    """Reported load of the replicas."""


class Scaler:
    """The scaling of one deployment. Not thread-safe, but the function from `upkeep` runs in any thread.

    Args:
        desired: current number of ordered replicas.
        memory: the stored state; None at first.
        prior: work per minute of one replica, according to the spec.
    """

    def __init__(self, desired: int, memory: Memory | None, prior: float) -> None:
        self._desired = desired
        known = memory or Memory(History(), ColdStarts(), frozenset(), Capacity.from_prior(prior))
        self._history = known.history
        self._cold_starts = known.cold_starts
        self._measured = known.measured
        self._capacity = known.capacity
        self._rates = MinuteRates(_PLAUSIBLE * prior)
        self._starting: dict[str, Report] = {}
        self._wants: tuple[Want, ...] = ()
        self._forecaster: Forecaster | None = None
        self._idle_since: float | None = None
        self._latest = _latest(self._history)
        self._rounds: list[_Round] = []

    @property
    def desired(self) -> int:
        """Current number of ordered replicas."""
        return self._desired

    def memory(self) -> Memory:
        """The state to store for the next process."""
        return Memory(copy.copy(self._history), self._cold_starts, self._measured, self._capacity)

    def step(self, subject: Subject, reading: Reading, now: float, speed: float = 1.0) -> Outcome:
        """Takes a reading and decides.

        Args:
            subject: the deployment.
            reading: the latest reports of its replicas and frontends.
            now: seconds of the scaling clock.
            speed: seconds of the scaling clock per second of the wall clock, which measures cold starts.
        """
        spec = subject.spec
        if subject.scaling.mode is not Mode.AUTO:
            self._desired = subject.deployment.wanted_replicas
        if self._capacity.prior != spec.capacity_prior:
            self._capacity = Capacity.from_prior(spec.capacity_prior)
        self._learn_cold_starts(subject, speed)
        wrong = {**reading.wrong, **self._take_reports(subject, reading)}
        # The queue in an invalid report is not used either.
        believed = tuple(report for report in reading.reports if report.replica not in wrong)
        reading = replace(reading, reports=believed)
        closed = self._close_minutes(subject, reading, now)
        forecast = self._forecaster.forecast() if self._forecaster else None
        situation = self._situation(subject, reading, now)
        # Invalid reports may have affected the forecast, so only the current demand decides.
        sizing = size(spec, situation, None if wrong else forecast, now)
        self._wants = sizing.wants
        if subject.scaling.mode is Mode.AUTO:
            self._desired = sizing.replicas
        return Outcome(
            sizing,
            forecast,
            situation.demand,
            self._capacity,
            self._cold_starts,
            subject.scaling.latency_target_s,
            wrong,
            reading.silent,
            closed,
            reading.loads,
        )

    def upkeep(self) -> Callable[[], Callable[[], None]] | None:
        """Slow work that is due: a function for another thread, which returns one that adopts the result."""
        steps = steps_ahead(self._cold_starts.horizon_s)
        if self._forecaster is None or self._forecaster.horizon_steps != steps:
            snapshot = copy.copy(self._history)

            def rebuild() -> Callable[[], None]:
                # Slow, so in this thread and not in that of the event loop.
                from moe_operator.autoscaling.model.forecast import forecaster  # noqa: PLC0415

                made = forecaster.Forecaster.restored(snapshot, steps)
                return lambda: self._take_over(made, snapshot.end)

            return rebuild
        return self._refit(self._forecaster) if self._forecaster.refit_due else None

    def _refit(self, forecaster: Forecaster) -> Callable[[], Callable[[], None]]:
        job = forecaster.refit_job()

        def refit() -> Callable[[], None]:
            fitted = job()
            return lambda: forecaster.adopt(fitted)

        return refit

    def _take_over(self, forecaster: Forecaster, end: int) -> None:
        """Adopts a forecaster that was fitted in another thread to the minutes before `end`."""
        for minute, rate in self._history.items():
            if minute >= end:
                forecaster.update(minute, rate)
        self._forecaster = forecaster

    def _learn_cold_starts(self, subject: Subject, speed: float) -> None:
        self._measured &= subject.uids
        for start in subject.cold_starts:
            if start.uid not in self._measured:
                self._cold_starts = self._cold_starts.observed(start.total * speed)
                self._measured |= {start.uid}

    def _take_reports(self, subject: Subject, reading: Reading) -> dict[str, str]:
        """Takes the reports of ready replicas. The report of a starting replica is where its sums start."""
        ready = {pod.name for pod in subject.ready}
        wrong = {}
        for report in reading.reports:
            if report.replica not in ready:
                self._starting[report.replica] = report
                continue
            first = self._starting.pop(report.replica, None)
            if first is not None:
                self._rates.observe(first)
            distrust = self._rates.observe(report)
            if distrust is not None:
                wrong[report.replica] = distrust.value
        return wrong

    def _close_minutes(self, subject: Subject, reading: Reading, now: float) -> bool:
        ready = {pod.name for pod in subject.ready}
        queueing = sum(report.waiting > 0 for report in reading.reports if report.replica in ready)
        self._rounds.append(_Round(len(ready), queueing))
        finished = self._rates.close(now, self._mean("ready"))
        for minute in finished:
            rate = minute.arrived
            if rate is None and self._desired == 0 and not subject.ready and not reading.held:
                rate = 0.0  # no replica can report, and no request arrived
            self._history.add(minute.minute, rate)
            if rate is not None:
                self._latest = (minute.minute, rate)
            if self._forecaster is not None:
                self._forecaster.update(minute.minute, rate)
            self._learn_capacity(minute)
        if finished:
            self._rounds.clear()
        if finished or self._idle_since is None:
            self._idle_since = _idle_since(self._history)
        return bool(finished)

    def _learn_capacity(self, minute: MinuteRate) -> None:
        """If few replicas queue requests while others are free, routing causes the latency, not the load."""
        ready, queueing = self._mean("ready"), self._mean("queueing")
        if minute.completed is not None and ready and not 0 < queueing < ready / 2:
            self._capacity = self._capacity.observed(
                minute.completed / ready,
                within_target=minute.late_share <= _LATE_MOST,
                saturated=minute.waited,
            )

    def _mean(self, what: Literal["ready", "queueing"]) -> float:
        """Mean over the rounds since the last minute was closed."""
        return statistics.fmean(getattr(one, what) for one in self._rounds)

    def _situation(self, subject: Subject, reading: Reading, now: float) -> Situation:
        busy = reading.running or reading.held
        return Situation(
            replicas=self._desired,
            starting=max(self._desired - len(subject.ready), 0),
            demand=self._demand(subject, now),
            capacity=self._capacity.per_replica,
            horizon_s=self._cold_starts.horizon_s,
            waiting=sum(report.waiting for report in reading.reports) + reading.held,
            idle_since=None if busy else self._idle_since,
            wants=self._wants,
        )

    def _demand(self, subject: Subject, now: float) -> float | None:
        """The latest known rate of the last minutes; 0 if there is no replica."""
        if self._latest is not None and self._latest[0] >= math.floor(now / MINUTE_S) - _DEMAND_MINUTES:
            return self._latest[1]
        return 0.0 if self._desired == 0 and not subject.ready else None


def _idle_since(history: History) -> float | None:
    """Start of the idle minutes at the end of the history; None if its last minute is not idle."""
    rates = history.rates()
    busy = (rates != 0).nonzero()[0]  # an unknown rate counts as work
    first = int(busy[-1]) + 1 if len(busy) else 0
    return (history.end - len(rates) + first) * MINUTE_S if first < len(rates) else None


def _latest(history: History) -> tuple[int, float] | None:
    """The last minute with a known rate, and the rate."""
    known = [(minute, rate) for minute, rate in history.items() if rate is not None]
    return known[-1] if known else None

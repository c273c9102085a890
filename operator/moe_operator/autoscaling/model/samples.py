"""Converts reports of replicas to rates of whole minutes, and ignores implausible reports with a reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from moe_operator.autoscaling.model.history import MINUTES

_MINUTE_S: Final = 60.0
_CLOCK_SKEW_S: Final = 30.0
"""Allowed difference between the clocks of nodes."""
_ENOUGH_SEEN: Final = 0.5
"""Share of the replicas' time that reports must cover, or else the rate of the minute is unknown."""


class Distrust(Enum):
    """Why a report is ignored. The value completes "its report ..."."""

    NOT_A_NUMBER = "contains NaN, infinity or a negative number"
    FROM_THE_FUTURE = "says that the worker started in the future: its clock is wrong"
    OUT_OF_ORDER = "is older than an earlier one"
    SUM_FELL = "contains sums that decreased although the worker did not restart"
    IMPLAUSIBLE = "contains more work than a replica can get"


@dataclass(frozen=True)
class Report:
    """The report of one leader."""

    replica: str
    """Name of the leader's pod."""
    at: float
    """Time of the report, on the operator's clock."""
    started: float
    """Start of the sums, on the worker's clock."""
    arrived: float
    """Work that arrived since then, after the output cache; never decreases."""
    completed: float
    """Work completed since then."""
    waiting: float = 0.0
    """Work that waits in the queue now."""
    late: float = 0.0
    """Completed work that missed the latency target since `started`."""


@dataclass(frozen=True)
class MinuteRate:
    """The rates of one finished minute, of all replicas together."""

    minute: int
    arrived: float | None
    """Work per minute; None: too few reports to tell."""
    completed: float | None
    """Work per minute."""
    late_share: float
    """Share of the completed work that missed the latency target, in [0, 1]."""
    waited: bool
    """Work waited in every report of the minute: the replicas were fully used."""


@dataclass
class _Minute:
    arrived: float = 0.0
    completed: float = 0.0
    late: float = 0.0
    covered_s: float = 0.0
    reports: int = 0
    reports_waiting: int = 0


@dataclass
class MinuteRates:
    """Collects the reports of one deployment's replicas. Not thread-safe."""

    plausible_rate: float = math.inf
    """Maximum plausible work per minute of one replica; a report of more is ignored."""
    _latest: dict[str, Report] = field(default_factory=dict)
    _open: dict[int, _Minute] = field(default_factory=dict)
    _closed: int | None = None

    def observe(self, report: Report) -> Distrust | None:
        """Takes one report; returns why it is ignored, or None.

        The first report of a replica, and the first one after its restart, is only the start of its sums.
        """
        before = self._latest.get(report.replica)
        reason = distrust(report, before, self.plausible_rate)
        if reason in (Distrust.NOT_A_NUMBER, Distrust.FROM_THE_FUTURE, Distrust.OUT_OF_ORDER):
            return reason
        if reason is not None:
            # Either of the two may be wrong, so the next report is a new start of the sums.
            self._latest.pop(report.replica, None)
            return reason
        self._latest[report.replica] = report
        if before is not None and _same_life(before, report):
            self._spread(before, report)
        return None

    def close(self, now: float, replicas: float) -> list[MinuteRate]:
        """The minutes that ended before `now` and were not closed yet, oldest first; empty ones included.

        Args:
            now: seconds since the epoch.
            replicas: mean number of ready replicas over these minutes.
        """
        end = math.floor(now / _MINUTE_S)
        if self._closed is None:
            self._closed = min([*self._open, end])
        first = max(self._closed, end - MINUTES)
        finished = [
            _rate(minute, self._open.get(minute, _Minute()), replicas) for minute in range(first, end)
        ]
        self._closed = max(self._closed, end)
        self._open = {minute: sums for minute, sums in self._open.items() if minute >= end}
        horizon = now - 10 * _MINUTE_S
        self._latest = {name: report for name, report in self._latest.items() if report.at >= horizon}
        return finished

    def _spread(self, before: Report, report: Report) -> None:
        """Distributes the work between two reports evenly over the open minutes that they cover."""
        span = report.at - before.at
        start = before.at
        while start < report.at:
            minute = math.floor(start / _MINUTE_S)
            stop = min((minute + 1) * _MINUTE_S, report.at)
            if self._closed is None or minute >= self._closed:
                share = (stop - start) / span
                sums = self._open.setdefault(minute, _Minute())
                sums.arrived += share * (report.arrived - before.arrived)
                sums.completed += share * (report.completed - before.completed)
                sums.late += share * (report.late - before.late)
                sums.covered_s += stop - start
            start = stop
        sums = self._open.setdefault(math.floor(report.at / _MINUTE_S), _Minute())
        sums.reports += 1
        sums.reports_waiting += report.waiting > 0


def distrust(report: Report, before: Report | None, plausible_rate: float = math.inf) -> Distrust | None:
    """Why a report is implausible, given the previous one of the same replica; None if it is plausible."""
    numbers = (report.at, report.started, report.arrived, report.completed, report.waiting, report.late)
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        return Distrust.NOT_A_NUMBER
    if report.started > report.at + _CLOCK_SKEW_S:
        return Distrust.FROM_THE_FUTURE
    if before is not None and report.at <= before.at:
        return Distrust.OUT_OF_ORDER
    if before is None or not _same_life(before, report):
        return _too_much(report, report.at - report.started, plausible_rate)
    return _contradiction(report, before, plausible_rate)


def _too_much(report: Report, seconds: float, plausible_rate: float) -> Distrust | None:
    """Whether a replica reports more work since its start, `seconds` ago, than a replica can do."""
    most = plausible_rate * max(seconds / _MINUTE_S, 1.0)
    return Distrust.IMPLAUSIBLE if max(report.arrived, report.completed) > most else None


def _contradiction(report: Report, before: Report, plausible_rate: float) -> Distrust | None:
    if report.arrived < before.arrived or report.completed < before.completed or report.late < before.late:
        return Distrust.SUM_FELL
    most = plausible_rate * max((report.at - before.at) / _MINUTE_S, 1.0)
    if max(report.arrived - before.arrived, report.completed - before.completed) > most:
        return Distrust.IMPLAUSIBLE
    return None


def _same_life(before: Report, report: Report) -> bool:
    return abs(report.started - before.started) < 1.0


def _rate(minute: int, sums: _Minute, replicas: float) -> MinuteRate:
    """A replica without reports is assumed to have the mean rate of the others, because routing is even."""
    seen = sums.covered_s / (_MINUTE_S * replicas) if replicas else 0.0
    known = seen >= _ENOUGH_SEEN
    return MinuteRate(
        minute,
        arrived=sums.arrived / min(seen, 1.0) if known else None,
        completed=sums.completed / min(seen, 1.0) if known else None,
        late_share=min(sums.late / sums.completed, 1.0) if sums.completed > 0 else 0.0,
        waited=sums.reports > 0 and sums.reports_waiting == sums.reports,
    )

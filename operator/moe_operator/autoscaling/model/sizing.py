"""How many replicas there should be, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from moe_operator.autoscaling.model.forecast.result import Forecast
from moe_operator.autoscaling.model.spec import ScalingSpec

_SLACK: Final = 1e-9
"""Work this close above a whole number of replicas needs no further one: rounding errors of floats."""
_NOTHING: Final = 0.5
"""Expected work per minute below which nothing is expected."""
_DRAIN_MINUTES: Final = 5.0
"""Work that waits shall be done within this time."""
_TOLERANCE: Final = 0.05
"""Fewer replicas must be enough for this share of work more: noise would add and remove one for ever."""


@dataclass(frozen=True)
class Want:
    """How many replicas one earlier plan found necessary, before it waited with scaling down."""

    at: float
    replicas: int


@dataclass(frozen=True)
class Situation:
    """What is known when a plan is made."""

    replicas: int
    """Ordered now: those that answer and those that start."""
    starting: int
    """Of these, those that do not answer yet."""
    demand: float | None
    """Work per minute that arrives now; None: the reports cannot tell."""
    capacity: float
    """Work per minute that one replica does within its latency target; above 0."""
    horizon_s: float
    """How long a replica takes to start."""
    waiting: float = 0.0
    """Work that waits for a place now, in queues or held by the frontend."""
    idle_since: float | None = None
    """Since when nothing has arrived; None while work arrives or where unknown."""
    wants: tuple[Want, ...] = ()
    """`Sizing.wants` of the plan before: all that a plan remembers. () at first and after a restart."""


@dataclass(frozen=True)
class Sizing:
    """A number of replicas and why it is right."""

    replicas: int
    reason: str
    """One CamelCase word."""
    message: str
    """A sentence with the numbers that decided."""
    wants: tuple[Want, ...]
    """For the next plan's `Situation.wants`; a few entries at most."""
    forecast_used: bool
    """False: there was none, or it was worse than the last value lately. Then the plan is reactive."""


@dataclass(frozen=True)
class _Need:
    """What would be right if replicas came and went at once and without limits."""

    now: int
    ahead: int
    lower: int
    """What would be right for a little more work: of those that are there, so many stay."""
    cause: str

    @property
    def replicas(self) -> int:
        return max(self.now, self.ahead)


def size(spec: ScalingSpec, situation: Situation, forecast: Forecast | None, now: float) -> Sizing:
    """The replicas that are right now. Pure: the same arguments give the same plan.

    The larger of what demand needs now and what the forecast's upper quantile needs at the horizon is ordered
    at once; a lower number only when it has been enough, with a little to spare, for the scale-down delay.
    Each want is for a minute that lies a horizon ahead, so the most that was wanted during the last horizon
    is what the upper edge of the band needs from now until the horizon.

    Args:
        spec: limits and aims.
        situation: replicas, demand, capacity, and what the plan before left to remember.
        forecast: for the minute at the horizon; None: there is none yet.
        now: seconds since the epoch.
    """
    used = forecast if forecast is not None and forecast.errors.trustworthy else None
    need = _need(spec, situation, used, now)
    if need is None:
        return _blind(spec, situation)
    wants = _remembered(spec, situation, need, now)
    held = max(want.replicas for want in wants)
    replicas = max(min(held, spec.most), spec.least)
    reason, message = _explained(spec, situation, need, held, replicas)
    if forecast is not None and used is None:
        message += (
            f"; the forecast is not used: lately its error was {forecast.errors.wape:.1f} % and that of the "
            f"last value {forecast.errors.last_value_wape:.1f} %"
        )
    return Sizing(replicas, reason, message, wants, forecast_used=used is not None)


def _need(spec: ScalingSpec, situation: Situation, forecast: Forecast | None, now: float) -> _Need | None:
    if situation.demand is None:
        return None
    usable = situation.capacity * spec.target_utilisation
    reactive = _replicas_for(situation.demand, usable)
    drained = situation.capacity * _DRAIN_MINUTES
    # Replicas that start will take of what waits: ordering more for it would be ordering it twice.
    backlog = max(0, _replicas_for(situation.waiting, drained) - situation.starting)
    upper = 0.0 if forecast is None else forecast.quantile(spec.quantile)
    ahead = _replicas_for(upper, usable)
    if _may_rest(spec, situation, forecast, now):
        return _Need(0, 0, 0, f"nothing has arrived for {spec.idle_s:.0f} s and nothing is expected")
    cause = f"{situation.demand:.4g} work/min now"
    if backlog:
        cause += f" and {situation.waiting:.4g} waiting"
    if forecast is not None:
        horizon = f"in {situation.horizon_s:.0f} s (P{100 * spec.quantile:g}, {forecast.method})"
        cause += f", up to {upper:.4g} {horizon}"
    cause += f", at {usable:.4g} a replica"
    work = max(situation.demand + backlog * usable, upper)
    lower = _replicas_for(work * (1 + _TOLERANCE), usable)
    return _Need(max(reactive + backlog, 1), ahead, lower, cause)


def _replicas_for(work: float, usable: float) -> int:
    return math.ceil(work / usable - _SLACK)


def _may_rest(spec: ScalingSpec, situation: Situation, forecast: Forecast | None, now: float) -> bool:
    """Whether no replica is needed. The band's upper edge is hardly ever 0, so the expectation decides."""
    idle = situation.idle_since is not None and now - situation.idle_since >= spec.idle_s
    expected = 0.0 if forecast is None else forecast.mean
    nothing = not situation.demand and situation.waiting == 0
    return spec.least == 0 and idle and nothing and expected < _NOTHING


def _remembered(spec: ScalingSpec, situation: Situation, need: _Need, now: float) -> tuple[Want, ...]:
    """The wants that still count: one that a later want reaches never decides again."""
    delay = max(spec.scale_down_delay_s, situation.horizon_s)
    # With nothing remembered, what is there counts as wanted until now: a restart takes nothing away.
    before = situation.wants or (Want(now, situation.replicas),)
    latest = Want(now, max(need.replicas, min(need.lower, situation.replicas)))
    recent = [want for want in before if now - delay < want.at <= now and want.replicas > latest.replicas]
    return (*recent, latest)


def _explained(
    spec: ScalingSpec, situation: Situation, need: _Need, held: int, replicas: int
) -> tuple[str, str]:
    if held > replicas:
        limit = "maxReplicas" if spec.most == spec.max_replicas else f"the limit of {spec.gpu_limit:g} GPUs"
        reason = "AtMaximum" if spec.most == spec.max_replicas else "GPUBudgetReached"
        return reason, f"{held} replicas are needed, {limit} allows {replicas}: {need.cause}"
    if replicas > situation.replicas:
        reason = "ForecastHigher" if need.ahead > need.now else "DemandHigher"
        if situation.replicas == 0 and situation.waiting > 0:
            reason = "FirstRequest"
        return reason, f"from {situation.replicas} to {replicas}: {need.cause}"
    if replicas < situation.replicas:
        reason = "Idle" if replicas == 0 else "DemandLower"
        return reason, f"from {situation.replicas} to {replicas}: {need.cause}"
    return _unchanged(spec, situation, need, held, replicas)


def _unchanged(
    spec: ScalingSpec, situation: Situation, need: _Need, held: int, replicas: int
) -> tuple[str, str]:
    if held > max(need.replicas, min(need.lower, situation.replicas)):
        delay = max(spec.scale_down_delay_s, situation.horizon_s)
        return (
            "ScaleDownDelayed",
            f"{replicas} stay: {need.replicas} are enough, but {held} were needed within the last "
            f"{delay:.0f} s; {need.cause}",
        )
    if need.replicas < replicas <= need.lower:
        return (
            "AsNeeded",
            f"{replicas} stay: {need.replicas} would just be enough, for {_TOLERANCE:.0%} more work "
            f"{need.lower}; {need.cause}",
        )
    if need.replicas < replicas:
        return "AtMinimum", f"{need.replicas} would do, minReplicas keeps {replicas}: {need.cause}"
    return "AsNeeded", f"{replicas} are right: {need.cause}"


def _blind(spec: ScalingSpec, situation: Situation) -> Sizing:
    replicas = max(min(situation.replicas, spec.most), spec.least)
    if replicas == 0 and situation.waiting > 0:
        replicas = min(1, spec.most)
    return Sizing(
        replicas,
        "ReportsUnusable",
        f"{replicas} replicas, as before: the reports do not tell how much work arrives",
        situation.wants,
        forecast_used=False,
    )

"""Computes the number of replicas, with a reason."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from moe_operator.autoscaling.model.forecast.result import Forecast
from moe_operator.autoscaling.model.spec import ScalingSpec

_SLACK: Final = 1e-9
"""Tolerance for rounding errors: so little work above a whole number of replicas needs no further one."""
_NOTHING: Final = 0.5
"""A lower expected rate, in work per minute, counts as none."""
_DRAIN_MINUTES: Final = 5.0
"""Waiting work must be done within this time."""
_TOLERANCE: Final = 0.05
"""Fewer replicas must suffice for so much more work; otherwise noise would add and remove one forever."""


@dataclass(frozen=True)
class Want:
    """The number of replicas that an earlier decision needed, before the scale-down delay."""

    at: float
    replicas: int


@dataclass(frozen=True)
class Situation:
    """The input of a decision, besides the spec and the forecast."""

    replicas: int
    """Ordered replicas: ready and starting."""
    starting: int
    """Of these, replicas that are not ready yet."""
    demand: float | None
    """Current rate of arriving work per minute; None if the reports do not contain it."""
    capacity: float
    """Work per minute of one replica within its latency target; above 0."""
    horizon_s: float
    """Time that a replica takes to start."""
    waiting: float = 0.0
    """Work that waits in queues or is held by the frontend."""
    idle_since: float | None = None
    """Start of the idle time; None while work arrives, or if unknown."""
    wants: tuple[Want, ...] = ()
    """`Sizing.wants` of the previous decision, the only state. () at first and after a restart."""


@dataclass(frozen=True)
class Sizing:
    """A number of replicas, with its reason."""

    replicas: int
    reason: str
    """One CamelCase word."""
    message: str
    """A sentence with the numbers behind the decision."""
    wants: tuple[Want, ...]
    """`Situation.wants` of the next decision; a few entries at most."""
    forecast_used: bool
    """False if there is none, or it was recently worse than the last value. The decision is reactive then."""


@dataclass(frozen=True)
class _Need:
    """The replicas needed if they started and stopped at once, without limits."""

    now: int
    ahead: int
    lower: int
    """The replicas needed for a little more work: a scale-down keeps so many of the existing ones."""
    cause: str

    @property
    def replicas(self) -> int:
        return max(self.now, self.ahead)


def size(spec: ScalingSpec, situation: Situation, forecast: Forecast | None, now: float) -> Sizing:
    """Decides the number of replicas. Pure: the same arguments give the same result.

    It scales up at once to the larger of the replicas for the current demand and the replicas for the upper
    quantile of the forecast at the horizon. It scales down only if the lower number, with a small margin, was
    sufficient during the whole scale-down delay. Each want is for a minute that is one horizon ahead, so the
    maximum want of the last horizon covers the upper edge of the band from now until the horizon.

    Args:
        spec: limits and targets.
        situation: replicas, demand, capacity, and the wants of earlier decisions.
        forecast: for the minute at the horizon; None if there is none yet.
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
            f"; the forecast is not used: its recent error is {forecast.errors.wape:.1f} %, that of the last "
            f"value {forecast.errors.last_value_wape:.1f} %"
        )
    return Sizing(replicas, reason, message, wants, forecast_used=used is not None)


def _need(spec: ScalingSpec, situation: Situation, forecast: Forecast | None, now: float) -> _Need | None:
    if situation.demand is None:
        return None
    usable = situation.capacity * spec.target_utilisation
    reactive = _replicas_for(situation.demand, usable)
    drained = situation.capacity * _DRAIN_MINUTES
    # Starting replicas will take waiting work; ordering more for the same work would order twice.
    backlog = max(0, _replicas_for(situation.waiting, drained) - situation.starting)
    upper = 0.0 if forecast is None else forecast.quantile(spec.quantile)
    ahead = _replicas_for(upper, usable)
    if _may_rest(spec, situation, forecast, now):
        return _Need(0, 0, 0, f"no work arrived for {spec.idle_s:.0f} s, and none is expected")
    cause = f"{situation.demand:.4g} work/min now"
    if backlog:
        cause += f" and {situation.waiting:.4g} waiting"
    if forecast is not None:
        horizon = f"in {situation.horizon_s:.0f} s (P{100 * spec.quantile:g}, {forecast.method})"
        cause += f", up to {upper:.4g} {horizon}"
    cause += f", at {usable:.4g} work/min per replica"
    work = max(situation.demand + backlog * usable, upper)
    lower = _replicas_for(work * (1 + _TOLERANCE), usable)
    return _Need(max(reactive + backlog, 1), ahead, lower, cause)


def _replicas_for(work: float, usable: float) -> int:
    return math.ceil(work / usable - _SLACK)


def _may_rest(spec: ScalingSpec, situation: Situation, forecast: Forecast | None, now: float) -> bool:
    """Whether no replica is needed. The upper edge of the band is hardly ever 0, so the mean decides."""
    idle = situation.idle_since is not None and now - situation.idle_since >= spec.idle_s
    expected = 0.0 if forecast is None else forecast.mean
    nothing = not situation.demand and situation.waiting == 0
    return spec.least == 0 and idle and nothing and expected < _NOTHING


def _remembered(spec: ScalingSpec, situation: Situation, need: _Need, now: float) -> tuple[Want, ...]:
    """The wants that can still decide: those within the delay that no later want reaches."""
    delay = max(spec.scale_down_delay_s, situation.horizon_s)
    # Without earlier wants the existing replicas count as wanted, so a restart never scales down.
    before = situation.wants or (Want(now, situation.replicas),)
    latest = Want(now, max(need.replicas, min(need.lower, situation.replicas)))
    recent = [want for want in before if now - delay < want.at <= now and want.replicas > latest.replicas]
    return (*recent, latest)


def _explained(
    spec: ScalingSpec, situation: Situation, need: _Need, held: int, replicas: int
) -> tuple[str, str]:
    if held > replicas:
        limit = "maxReplicas" if spec.most == spec.max_replicas else f"the limit of {spec.gpu_limit:g} GPUs"
        reason = "AtMaximum" if spec.most == spec.max_replicas else "GPULimitReached"
        return reason, f"{held} replicas are needed, but {limit} allows {replicas}: {need.cause}"
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
            f"keeping {replicas}: {need.replicas} suffice now, but {held} were needed within the last "
            f"{delay:.0f} s; {need.cause}",
        )
    if need.replicas < replicas <= need.lower:
        return (
            "AsNeeded",
            f"keeping {replicas}: {need.replicas} barely suffice, and {_TOLERANCE:.0%} more work would "
            f"need {need.lower}; {need.cause}",
        )
    if need.replicas < replicas:
        return (
            "AtMinimum",
            f"keeping {replicas}, which is minReplicas, although {need.replicas} suffice: {need.cause}",
        )
    return "AsNeeded", f"keeping {replicas}: {need.cause}"


def _blind(spec: ScalingSpec, situation: Situation) -> Sizing:
    replicas = max(min(situation.replicas, spec.most), spec.least)
    if replicas == 0 and situation.waiting > 0:
        replicas = min(1, spec.most)
    return Sizing(
        replicas,
        "ReportsUnusable",
        f"keeping {replicas}: no report says how much work arrives",
        situation.wants,
        forecast_used=False,
    )

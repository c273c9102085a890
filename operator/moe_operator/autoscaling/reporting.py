"""Reports scaling to users: status.scaling, condition ScalingActive, and an event for each change."""

from __future__ import annotations

from datetime import datetime

from moe_api.visible import one_line
from moe_operator.autoscaling.model.forecast.result import Forecast
from moe_operator.autoscaling.scaler import MINUTE_S, Outcome
from moe_operator.autoscaling.subject import Subject
from moe_operator.planner.conditions import Verdict
from moe_operator.planner.decision import Decision, timestamp
from moe_operator.resources.scaling_spec import Mode
from moe_operator.resources.scaling_status import (
    CapacityStatus,
    ColdStartStatus,
    DecisionStatus,
    ForecastStatus,
    HorizonStatus,
    ScalingStatus,
)

_LOWER, _UPPER = 0.05, 0.95
OFF = Verdict(False, "Off", "spec.scaling.mode is Off: the load is not measured, and replicas do not change")


def status(subject: Subject, outcome: Outcome, before: ScalingStatus | None, now: datetime) -> ScalingStatus:
    """The status after one round; `before` is the last written one."""
    return ScalingStatus(
        desired_replicas=outcome.sizing.replicas,
        requests_per_second=None if outcome.demand is None else _per_second(outcome.demand),
        forecast=None if outcome.forecast is None else _forecast(outcome.forecast),
        horizon=HorizonStatus(
            seconds=_short(outcome.cold_starts.horizon_s), cold_starts=len(outcome.cold_starts.seconds)
        ),
        last_cold_start=_cold_start(subject) or (before.last_cold_start if before else None),
        capacity=CapacityStatus(
            requests_per_second=_per_second(outcome.capacity.per_replica),
            source="Measured" if outcome.capacity.learned else "Prior",
        ),
        last_decision=_decision(subject, outcome, before, now),
        load=outcome.loads,
    )


def verdict(subject: Subject, outcome: Outcome, unread: str = "") -> Verdict:
    """Whether the number of replicas follows the load, and on which basis.

    unread: why the stored history could not be read; empty if it could.
    """
    said = outcome.sizing.message + _doubts(outcome)
    if unread:
        said = f"{said}; the stored history is not used, and none is stored: {unread}"
    if subject.scaling.mode is Mode.ADVISORY:
        there = subject.deployment.wanted_replicas
        return Verdict(False, "Advisory", f"would scale from {there} to {outcome.sizing.replicas}: {said}")
    if outcome.demand is None:
        return Verdict(False, outcome.sizing.reason, said)
    if outcome.sizing.forecast_used:
        return Verdict(True, "Forecasting", said)
    return Verdict(True, "Reactive", f"{said}; {_why_reactive(outcome)}")


def announcement(subject: Subject, outcome: Outcome, before: ScalingStatus | None) -> Decision | None:
    """The event for a change since the last written status, decided or advised; None without a change."""
    after, sizing = outcome.sizing.replicas, outcome.sizing
    last = _last(subject, before)
    if after == last:
        return None
    said = f"{sizing.reason}: {sizing.message}"
    if subject.scaling.mode is Mode.ADVISORY:
        there = subject.deployment.wanted_replicas
        return Decision("ScalingAdvised", f"would scale from {there} to {after} replicas; {said}")
    return Decision("ScaledUp" if after > last else "ScaledDown", said)


def _decision(
    subject: Subject, outcome: Outcome, before: ScalingStatus | None, now: datetime
) -> DecisionStatus | None:
    last = _last(subject, before)
    if outcome.sizing.replicas == last:
        return before.last_decision if before else None
    sizing = outcome.sizing
    return DecisionStatus(
        time=timestamp(now),
        before=last,
        after=sizing.replicas,
        reason=sizing.reason,
        message=one_line(sizing.message, 1024),
    )


def _last(subject: Subject, before: ScalingStatus | None) -> int:
    """The previous number of wanted replicas."""
    return subject.deployment.wanted_replicas if before is None else before.desired_replicas


def _doubts(outcome: Outcome) -> str:
    """Replicas whose reports are ignored, with the reason."""
    wrong = [f"{name}: its report {why} and is ignored" for name, why in sorted(outcome.wrong.items())]
    silent = [f"{name} does not report its load" for name in sorted(outcome.silent)]
    return "".join(f"; {sentence}" for sentence in [*wrong, *silent][:3])


def _why_reactive(outcome: Outcome) -> str:
    if outcome.wrong:
        return "the forecast is not used while reports are invalid"
    if outcome.forecast is None:
        return "there is too little history for a forecast"
    return "the forecast is not used while the last value predicts better"


def _forecast(forecast: Forecast) -> ForecastStatus:
    errors = forecast.errors
    return ForecastStatus(
        method=forecast.method,
        requests_per_second=_per_second(forecast.mean),
        lower=_per_second(forecast.quantile(_LOWER)),
        upper=_per_second(forecast.quantile(_UPPER)),
        error_percent=None if errors.wape is None else _short(errors.wape),
        last_value_error_percent=None if errors.last_value_wape is None else _short(errors.last_value_wape),
    )


def _cold_start(subject: Subject) -> ColdStartStatus | None:
    """The latest cold start of the existing replicas."""
    if not subject.cold_starts:
        return None
    last = max(subject.cold_starts, key=lambda start: start.made)
    return ColdStartStatus(
        pod=last.pod,
        scheduling=last.scheduling,
        image=last.image,
        loading=last.loading,
        total=last.total,
    )


def _per_second(per_minute: float) -> float:
    return _short(per_minute / MINUTE_S)


def _short(number: float) -> float:
    """Four significant digits: with more, the status would change every minute."""
    return float(f"{number:.4g}")

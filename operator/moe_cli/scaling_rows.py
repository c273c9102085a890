"""The rows of `moe status NAME` about scaling. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from moe_operator.resources.scaling_status import (
    ColdStartStatus,
    DecisionStatus,
    ForecastStatus,
    HorizonStatus,
    ScalingStatus,
)


def rows(found: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """(heading, text) for each part of status.scaling; nothing if it is absent or invalid."""
    if found is None:
        return
    try:
        scaling = ScalingStatus.model_validate(found)
    except ValidationError:
        return
    demand = scaling.requests_per_second
    yield "Demand", "not reported" if demand is None else f"{demand:g} requests/s"
    if scaling.forecast is not None:
        yield "Forecast", _forecast(scaling.forecast, scaling.horizon)
    if scaling.capacity is not None:
        source = "as measured" if scaling.capacity.source == "Measured" else "as spec.scaling assumes"
        yield "Capacity", f"{scaling.capacity.requests_per_second:g} requests/s per replica, {source}"
    if scaling.horizon is not None:
        yield "Cold start", _cold_start(scaling.horizon, scaling.last_cold_start)
    if scaling.last_decision is not None:
        yield "Last decision", _decision(scaling.last_decision)


def _forecast(forecast: ForecastStatus, horizon: HorizonStatus | None) -> str:
    ahead = f" in {horizon.seconds:g} s" if horizon else ""
    said = (
        f"{forecast.requests_per_second:g} requests/s{ahead} "
        f"({forecast.lower:g} to {forecast.upper:g}), by {forecast.method}"
    )
    if forecast.error_percent is None or forecast.last_value_error_percent is None:
        return said
    return f"{said}; error {forecast.error_percent:g} %, last value {forecast.last_value_error_percent:g} %"


def _cold_start(horizon: HorizonStatus, last: ColdStartStatus | None) -> str:
    seen = f"{horizon.cold_starts} cold start{'' if horizon.cold_starts == 1 else 's'} seen"
    said = f"{horizon.seconds:g} s horizon ({seen})"
    if last is None:
        return said
    phases = f"{last.scheduling:g} s scheduling, {last.image:g} s image, {last.loading:g} s loading"
    return f"{said}; last one {last.total:g} s: {phases}"


def _decision(decision: DecisionStatus) -> str:
    return f"{decision.before} to {decision.after} at {decision.time}, {decision.reason}: {decision.message}"

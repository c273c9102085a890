"""Scaling information for users: status.scaling."""

from __future__ import annotations

from pydantic import Field

from moe_operator.resources.base import Model

SCALING_ACTIVE = "ScalingActive"


class ForecastStatus(Model):
    """Demand at the horizon. Rates are requests per second of the whole deployment, output cache excluded."""

    method: str = Field(default="", description="Forecaster in use, e.g. LastValue or HarmonicArima.")
    requests_per_second: float = Field(default=0.0, description="Expected demand (median).")
    lower: float = Field(default=0.0, description="Lower edge of the band (5th percentile).")
    upper: float = Field(default=0.0, description="Upper edge of the band (95th percentile).")
    error_percent: float | None = Field(
        default=None, description="Rolling error (WAPE) of this forecaster, in percent of mean demand."
    )
    last_value_error_percent: float | None = Field(
        default=None, description="The same error for the current demand used as a forecast."
    )


class HorizonStatus(Model):
    """How far ahead the forecast is."""

    seconds: float = Field(default=0.0, description="90th percentile of this deployment's own cold starts.")
    cold_starts: int = Field(
        default=0, description="Cold starts measured; below 5 the horizon is the default of 300 s."
    )


class ColdStartStatus(Model):
    """The phases of the last cold start, in seconds."""

    pod: str = Field(default="", description="Leader pod that was measured.")
    scheduling: float = Field(default=0.0, description="From the creation of the pod to its node.")
    image: float = Field(default=0.0, description="From there to the start of the container.")
    loading: float = Field(default=0.0, description="From there to a ready worker: model and warm-up.")
    total: float = Field(default=0.0, description="Sum of the phases.")


class CapacityStatus(Model):
    """The load that one replica serves within the latency target."""

    requests_per_second: float = Field(default=0.0, description="Requests per second of one replica.")
    source: str = Field(default="", description="Prior (from the spec) or Measured.")


class DecisionStatus(Model):
    """The last change, or in Advisory mode the last change that Auto would have made."""

    time: str = Field(description="When (RFC 3339, UTC).", json_schema_extra={"format": "date-time"})
    before: int = Field(default=0, description="Replicas before.")
    after: int = Field(default=0, description="Replicas after.")
    reason: str = Field(default="", description="Why, in one CamelCase word for programs.")
    message: str = Field(default="", description="Why, in a sentence for people.", max_length=1024)


class ReplicaLoadStatus(Model):
    """The load of one replica."""

    pod: str = Field(default="", description="Its leader pod.")
    queued: int = Field(default=0, description="Requests in the queue: they wait for room in the batch.")
    running: int = Field(default=0, description="Requests in the batch.")
    kv_used_percent: int | None = Field(
        default=None, description="Share of the KV cache that running requests use, in percent."
    )


class ScalingStatus(Model):
    """The state of the scaler; updated with each decision, and once a minute."""

    desired_replicas: int = Field(
        default=0,
        description="Replicas that the scaler wants: applied in Auto mode, only reported in Advisory mode.",
    )
    requests_per_second: float | None = Field(
        default=None, description="Demand measured last; absent if no replica reported."
    )
    forecast: ForecastStatus | None = Field(default=None, description="Demand at the horizon, with band.")
    horizon: HorizonStatus | None = Field(default=None, description="How far ahead the forecast is.")
    last_cold_start: ColdStartStatus | None = Field(
        default=None, description="Phases of the last cold start measured."
    )
    capacity: CapacityStatus | None = Field(
        default=None, description="The load that one replica serves within the latency target."
    )
    last_decision: DecisionStatus | None = Field(
        default=None, description="The last change, with its reason."
    )
    load: tuple[ReplicaLoadStatus, ...] = Field(
        default=(), description="The load of each replica; without those that did not report."
    )

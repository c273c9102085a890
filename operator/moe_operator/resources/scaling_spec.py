"""User input for scaling: spec.scaling."""

from __future__ import annotations

from enum import StrEnum

from pydantic import ConfigDict, Field

from moe_operator.resources import quantity
from moe_operator.resources.base import Model, number_between, rules
from moe_operator.resources.pods import Quantity, quantity_between

REPLICAS_MOST = 1000
_LATENCY_TARGET_S = 2.5


class Mode(StrEnum):
    """Who decides the number of replicas."""

    AUTO = "Auto"
    ADVISORY = "Advisory"
    OFF = "Off"


class Scaling(Model):
    """The number of replicas, decided from the forecast load."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.minReplicas <= self.maxReplicas",
                "minReplicas must not be above maxReplicas",
            )
        )
    )

    mode: Mode = Field(
        default=Mode.AUTO,
        description="Auto: the operator sets the number of replicas. Advisory: it only reports in "
        "status.scaling, events and metrics what it would set; spec.replicas decides. Off: it"
        " neither measures nor reports. Default: Auto.",
    )
    min_replicas: int = Field(
        default=1,
        description="Minimum number of replicas. 0 lets a deployment without requests scale to zero; the "
        "frontend then holds the first request until a replica is ready. Default: 1.",
        json_schema_extra=rules(number_between("minReplicas is a number", 0, REPLICAS_MOST)),
    )
    max_replicas: int = Field(
        description="Maximum number of replicas. Required.",
        json_schema_extra=rules(number_between("maxReplicas is a number", 1, REPLICAS_MOST)),
    )
    latency_target_milliseconds: int | None = Field(
        default=None,
        description="Target time to first token in milliseconds for 95 of 100 requests; the load that a "
        "replica serves within it is its capacity. Workers count in buckets (250, 500, 750, 1000, 2500, "
        "5000, 7500, 10000 ms): a target between two counts as the upper one. Default: 2500.",
        json_schema_extra=rules(
            number_between("latencyTargetMilliseconds is a number of milliseconds", 1, 10000)
        ),
    )
    prior_throughput: Quantity | None = Field(
        default=None,
        description="Requests per second that one replica is assumed to serve within the latency target "
        "until that is measured: a quantity, such as 1.5 or 500m. Default: a tenth of engine.maxBatchSize.",
        json_schema_extra=rules(
            (
                "isQuantity(string(self)) && quantity(string(self)).isGreaterThan(quantity('0')) && "
                "quantity(string(self)).compareTo(quantity('1M')) <= 0",
                "priorThroughput is a quantity of requests per second above 0, up to 1M, e.g. 1.5",
            )
        ),
    )
    latency_target_seconds: float | None = Field(
        default=None,
        description="Deprecated: use latencyTargetMilliseconds, which takes precedence. Default: none.",
        json_schema_extra=rules(
            ("self > 0.0 && self <= 10.0", "latencyTargetSeconds is a number of seconds above 0, up to 10")
        ),
    )
    prior_requests_per_second: float | None = Field(
        default=None,
        description="Deprecated: use priorThroughput, which takes precedence. Default: none.",
        json_schema_extra=rules(
            (
                "self > 0.0 && self <= 1000000.0",
                "priorRequestsPerSecond is a number above 0, up to 1000000, e.g. 1.5",
            )
        ),
    )
    gpu_limit: Quantity | None = Field(
        default=None,
        description="Maximum number of GPUs of all replicas together: a quantity in steps of 500m, such as 6 "
        "or 7500m; worker.acceleratorPercentage or the nvidia.com/gpu limit gives the GPUs of a replica. "
        "Default: no limit but maxReplicas.",
        json_schema_extra=rules(
            (
                f"{quantity_between('500m', '100k')} && "
                "quantity(string(self)).asApproximateFloat() * 2.0 == "
                "double(int(quantity(string(self)).asApproximateFloat() * 2.0))",
                "gpuLimit is a quantity of GPUs from 500m to 100k, in steps of 500m, e.g. 7500m",
            )
        ),
    )
    gpu_budget: float | None = Field(
        default=None,
        description="Deprecated: use gpuLimit, which takes precedence. Default: none.",
        json_schema_extra=rules(
            (
                "self >= 0.5 && self <= 100000.0 && self * 2.0 == double(int(self * 2.0))",
                "gpuBudget is a number of GPUs of 0.5 or more, in steps of 0.5, e.g. 7.5",
            )
        ),
    )
    hold_seconds: int = Field(
        default=600,
        description="Seconds that the frontend holds a request while a deployment that scales to zero has no "
        "replica; afterwards the request ends with UNAVAILABLE. Default: 600.",
        json_schema_extra=rules(number_between("holdSeconds is a number of seconds", 1, 3600)),
    )

    @property
    def latency_target_s(self) -> float:
        """Seconds to the first token that 95 of 100 requests must meet."""
        if self.latency_target_milliseconds is not None:
            return self.latency_target_milliseconds / 1000
        return _LATENCY_TARGET_S if self.latency_target_seconds is None else self.latency_target_seconds

    @property
    def assumed_throughput(self) -> float | None:
        """Requests per second that the spec assumes of one replica; None if it says nothing."""
        if self.prior_throughput is not None:
            return float(quantity.parse(self.prior_throughput))
        return self.prior_requests_per_second

    @property
    def gpus_most(self) -> float | None:
        """GPUs that all replicas together may hold; None if the spec does not limit them."""
        if self.gpu_limit is not None:
            return float(quantity.parse(self.gpu_limit))
        return self.gpu_budget

    @property
    def scales_to_zero(self) -> bool:
        """Whether the deployment may have no replica and still accept requests."""
        return self.mode is Mode.AUTO and self.min_replicas == 0

    def bounded(self, replicas: int) -> int:
        """A number of replicas, brought within the spec's bounds."""
        return min(max(replicas, self.min_replicas), self.max_replicas)

"""User input: where traces and metrics are sent (spec.telemetry)."""

from __future__ import annotations

from pydantic import Field

from moe_operator.resources.base import Model, rules

_PORT = "[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"


class Telemetry(Model):
    """Where traces and metrics are sent."""

    otlp_endpoint: str | None = Field(
        default=None,
        description="OpenTelemetry Collector that accepts OTLP over gRPC, e.g. "
        "http://otel-collector.moe-system:4317. Default: none, so neither traces nor metrics "
        "are sent.",
        max_length=1024,
        json_schema_extra=rules(
            (
                f"self.matches('^https?://([A-Za-z0-9._-]+|[\\\\[][0-9a-fA-F:.]+[\\\\]])(:({_PORT}))?/?$')",
                "otlpEndpoint is http:// or https://, a host and a port, e.g. http://otel-collector.moe-system:4317",
            )
        ),
    )

"""What is measured of requests over HTTP, by OpenTelemetry's conventions for HTTP servers.

https://opentelemetry.io/docs/specs/semconv/http/http-metrics/
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Final

from opentelemetry import metrics

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"})
_BOUNDS: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0, 120.0, 300.0),
)
"""Seconds: the conventions' boundaries, and some for long streams."""


class Measured:
    """How a request goes: set `status` when the answer begins, and `route` once it is known."""

    def __init__(self) -> None:
        self.status = 0
        self.route = ""
        self.error = ""


class Measures:
    """Makes the instruments and feeds them."""

    def __init__(self, meter: metrics.Meter) -> None:
        self._duration = meter.create_histogram(
            "http.server.request.duration",
            "s",
            "Time from a request's head to the last byte of its answer",
            explicit_bucket_boundaries_advisory=_BOUNDS,
        )
        self._active = meter.create_up_down_counter(
            "http.server.active_requests", "{request}", "Requests that are being answered"
        )
        self.active = 0

    @contextlib.contextmanager
    def request(self, method: str, scheme: str = "http") -> Iterator[Measured]:
        """Measures a request for the time of the block; scheme: http or https."""
        measured, began = Measured(), time.monotonic()
        attributes = {"http.request.method": bounded(method), "url.scheme": scheme}
        self.active += 1
        self._active.add(1, attributes)
        try:
            yield measured
        finally:
            self.active -= 1
            self._active.add(-1, attributes)
            self._duration.record(time.monotonic() - began, {**attributes, **_outcome(measured)})


def bounded(method: str) -> str:
    """A method that is known, or the conventions' word for all others."""
    return method if method in _METHODS else "_OTHER"


def _outcome(measured: Measured) -> dict[str, str | int]:
    outcome: dict[str, str | int] = {}
    if measured.route:
        outcome["http.route"] = measured.route
    if measured.status:
        outcome["http.response.status_code"] = measured.status
    if measured.error:
        outcome["error.type"] = measured.error
    return outcome

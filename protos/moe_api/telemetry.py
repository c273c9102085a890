"""OpenTelemetry traces, the same way in every process: client, frontend, worker and operator.

Nothing is set up, no thread starts and nothing is sent unless ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or its
``..._TRACES_ENDPOINT`` form) is set; the OpenTelemetry API then hands out tracers that do nothing.
The SDK's other variables (``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``, ``OTEL_TRACES_SAMPLER``,
``OTEL_BSP_*``, ``OTEL_SDK_DISABLED``, ...) keep their standard meaning.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Final, Self

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

Metadata = tuple[tuple[str, str | bytes], ...]

_ENDPOINT_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_EXPORT_LOGGERS: Final = (
    "opentelemetry.exporter.otlp.proto.grpc.exporter",
    "opentelemetry.sdk._shared_internal",
)
_WARNING_PERIOD_S: Final = 60.0
_SHUTDOWN_S: Final = 2.0
# The SDK waits 5 s before it sends a batch; 1 s lets a trace be looked up right after its request.
_SCHEDULE_DELAY_MS: Final = 1000.0
# The SDK retries for 10 s; a collector that is down for longer than this loses the batch anyway.
_EXPORT_TIMEOUT_S: Final = 2.0


class Telemetry:
    """Handle on what `configure` started; a context manager that shuts it down at the end."""

    def __init__(self, provider: TracerProvider | None, exporter: OTLPSpanExporter | None) -> None:
        self._provider = provider
        self._exporter = exporter

    @property
    def enabled(self) -> bool:
        """Whether spans are recorded and sent."""
        return self._provider is not None

    def shutdown(self) -> None:
        """Sends what is still queued, for 2 s at most, and stops. Calling it again does nothing."""
        provider, exporter = self._provider, self._exporter
        self._provider = self._exporter = None
        if provider is None or exporter is None:
            return
        closer = threading.Thread(target=provider.shutdown, name="telemetry-shutdown", daemon=True)
        closer.start()
        closer.join(_SHUTDOWN_S)
        if closer.is_alive():
            exporter.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()


def configure(service_name: str, environ: Mapping[str, str] = os.environ) -> Telemetry:
    """Sets up the process-wide tracer provider if, and only if, the environment names a collector.

    Call it once, early in `main`, and shut the handle down at the end; tracers come from
    ``opentelemetry.trace.get_tracer`` as usual, and work before and without this call.

    Args:
        service_name: ``service.name`` of this process unless ``OTEL_SERVICE_NAME`` or
            ``OTEL_RESOURCE_ATTRIBUTES`` give one.
        environ: where to look for the endpoint.
    """
    endpoint = any(environ.get(name) for name in _ENDPOINT_VARIABLES)
    if not endpoint or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return Telemetry(None, None)
    _tame_export_warnings()
    exporter = OTLPSpanExporter(timeout=None if _timeout_is_set(environ) else _EXPORT_TIMEOUT_S)
    delay = None if "OTEL_BSP_SCHEDULE_DELAY" in environ else _SCHEDULE_DELAY_MS
    provider = TracerProvider(resource=_resource(service_name), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=delay))
    trace.set_tracer_provider(provider)
    return Telemetry(provider, exporter)


def inject(metadata: Iterable[tuple[str, str | bytes]] = (), context: Context | None = None) -> Metadata:
    """Returns gRPC metadata with the W3C context of `context` (default: the current one) added.

    Without a recording or remote span in the context nothing is added.
    """
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, context)
    return (*metadata, *carrier.items())


def extract(metadata: Iterable[tuple[str, str | bytes]] | None) -> Context:
    """Reads the W3C context out of a call's metadata; a missing or broken one gives an empty context."""
    carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
    return TraceContextTextMapPropagator().extract(carrier, Context())


class RateLimitedWarning(logging.Filter):
    """Lets one record through in a period, as a warning that says requests are not affected.

    Args:
        period_s: seconds between two records.
        clock: seconds, monotonic.
    """

    def __init__(self, period_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._period_s = period_s
        self._clock = clock
        self._quiet_until = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrites the record in place and says whether it is logged."""
        if record.levelno < logging.WARNING:
            return True
        now = self._clock()
        if now < self._quiet_until:
            return False
        self._quiet_until = now + self._period_s
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg = (
            f"traces do not reach the collector; requests go on without them, and this is said again "
            f"after {self._period_s:.0f} s at the earliest. {record.getMessage()}"
        )
        record.args, record.exc_info = (), None
        return True


def _tame_export_warnings() -> None:
    """The exporter logs several lines for each failed batch; one a minute is enough."""
    limit = RateLimitedWarning(_WARNING_PERIOD_S)
    for name in _EXPORT_LOGGERS:
        logging.getLogger(name).addFilter(limit)


def _timeout_is_set(environ: Mapping[str, str]) -> bool:
    return any(
        name in environ for name in ("OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT")
    )


def _resource(service_name: str) -> Resource:
    """Resource.create lets its argument win over the environment; the user's variables should win."""
    named = "service.name" in OTELResourceDetector().detect().attributes
    return Resource.create({} if named else {"service.name": service_name})

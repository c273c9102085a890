"""OpenTelemetry traces and metrics for every process: client, frontend, worker and operator.

Nothing is set up, no thread starts and nothing is sent unless ``OTEL_EXPORTER_OTLP_ENDPOINT`` is set, or
``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`` or ``..._METRICS_ENDPOINT`` for one of the two; the OpenTelemetry API
then hands out tracers and meters that do nothing. ``OTEL_TRACES_EXPORTER=none`` and
``OTEL_METRICS_EXPORTER=none`` turn one off. The SDK's other variables (``OTEL_SERVICE_NAME``,
``OTEL_RESOURCE_ATTRIBUTES``, ``OTEL_TRACES_SAMPLER``, ``OTEL_BSP_*``, ``OTEL_METRIC_EXPORT_INTERVAL``,
``OTEL_SDK_DISABLED``, ...) keep their standard meaning.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

Metadata = tuple[tuple[str, str | bytes], ...]

_SIGNALS: Final = ("traces", "metrics")
# Loggers that report failed exports, and the signal if the record does not name it.
_EXPORT_LOGGERS: Final = {
    "opentelemetry.exporter.otlp.proto.grpc.exporter": "traces or metrics",
    "opentelemetry.sdk._shared_internal": "traces",
    "opentelemetry.sdk.metrics._internal.export": "metrics",
}
_WARNING_PERIOD_S: Final = 60.0
_SHUTDOWN_S: Final = 2.0
# The SDK waits 5 s before it sends a batch; 1 s makes a trace available right after its request.
_SCHEDULE_DELAY_MS: Final = 1000.0
# The SDK retries for 10 s; a collector that is down for longer than this loses the batch anyway.
_EXPORT_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True)
class _Pipeline:
    """The provider of one signal and its exporter."""

    provider: TracerProvider | MeterProvider
    exporter: OTLPSpanExporter | OTLPMetricExporter | None


class Telemetry:
    """Handle for the providers that `configure` started; a context manager that shuts them down."""

    def __init__(self, pipelines: Sequence[_Pipeline] = ()) -> None:
        self._pipelines = tuple(pipelines)

    @property
    def enabled(self) -> bool:
        """Whether anything is recorded and sent."""
        return bool(self._pipelines)

    @property
    def measures(self) -> bool:
        """Whether metrics are recorded and sent."""
        return any(isinstance(pipeline.provider, MeterProvider) for pipeline in self._pipelines)

    def shutdown(self) -> None:
        """Sends queued data for at most 2 s in total and stops. Further calls do nothing."""
        pipelines, self._pipelines = self._pipelines, ()
        deadline = time.monotonic() + _SHUTDOWN_S
        closers = [_closer(pipeline.provider) for pipeline in pipelines]
        for closer, pipeline in zip(closers, pipelines, strict=True):
            closer.join(max(0.0, deadline - time.monotonic()))
            if closer.is_alive() and pipeline.exporter is not None:
                pipeline.exporter.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()


def configure(
    service_name: str, environ: Mapping[str, str] = os.environ, readers: Sequence[MetricReader] = ()
) -> Telemetry:
    """Sets up the process-wide tracer and meter providers for which the environment names a collector.

    Call it once, early in `main`, and shut the handle down at the end; tracers and meters come from
    ``opentelemetry.trace.get_tracer`` and ``opentelemetry.metrics.get_meter`` as usual, and work before and
    without this call.

    Args:
        service_name: ``service.name`` of this process unless ``OTEL_SERVICE_NAME`` or
            ``OTEL_RESOURCE_ATTRIBUTES`` give one.
        environ: environment variables with the endpoints.
        readers: further metric readers, with or without a collector.
    """
    wanted = [signal for signal in _SIGNALS if _is_wanted(signal, environ)]
    if not wanted and not readers:
        return Telemetry()
    _tame_export_warnings()
    resource = _resource(service_name)
    pipelines = [_start_traces(resource, environ)] if "traces" in wanted else []
    if "metrics" in wanted:
        pipelines.append(_start_metrics(resource, environ, readers))
    elif readers:
        pipelines.append(_measure(resource, readers, None))
    return Telemetry(pipelines)


def _is_wanted(signal: str, environ: Mapping[str, str]) -> bool:
    """Whether an endpoint is configured and the signal is not turned off."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if environ.get(f"OTEL_{signal.upper()}_EXPORTER", "").lower() == "none":
        return False
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT")
    return any(environ.get(name) for name in names)


def _start_traces(resource: Resource, environ: Mapping[str, str]) -> _Pipeline:
    exporter = OTLPSpanExporter(timeout=_timeout("traces", environ))
    delay = None if "OTEL_BSP_SCHEDULE_DELAY" in environ else _SCHEDULE_DELAY_MS
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=delay))
    trace.set_tracer_provider(provider)
    return _Pipeline(provider, exporter)


def _start_metrics(
    resource: Resource, environ: Mapping[str, str], readers: Sequence[MetricReader]
) -> _Pipeline:
    exporter = OTLPMetricExporter(timeout=_timeout("metrics", environ))
    return _measure(resource, [PeriodicExportingMetricReader(exporter), *readers], exporter)


def _measure(
    resource: Resource, readers: Sequence[MetricReader], exporter: OTLPMetricExporter | None
) -> _Pipeline:
    provider = MeterProvider(metric_readers=readers, resource=resource, shutdown_on_exit=False)
    metrics.set_meter_provider(provider)
    return _Pipeline(provider, exporter)


def _closer(provider: TracerProvider | MeterProvider) -> threading.Thread:
    closer = threading.Thread(target=provider.shutdown, name="telemetry-shutdown", daemon=True)
    closer.start()
    return closer


def inject(metadata: Iterable[tuple[str, str | bytes]] = (), context: Context | None = None) -> Metadata:
    """Returns gRPC metadata with the W3C context of `context` (default: the current one) added.

    Without a recording or remote span in the context nothing is added.
    """
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, context)
    return (*metadata, *carrier.items())


def extract(metadata: Iterable[tuple[str, str | bytes]] | None) -> Context:
    """Reads the W3C context from the metadata of a call; empty if it is missing or invalid."""
    carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
    return TraceContextTextMapPropagator().extract(carrier, Context())


class RateLimitedWarning(logging.Filter):
    """Passes one record per signal and period, as a warning that requests are not affected.

    Args:
        period_s: seconds between two records about the same signal.
        unnamed: the signal if a record has neither "traces" nor "metrics" among its arguments. Such a record
        passes only if no other one did in the period.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        period_s: float,
        unnamed: str = "traces or metrics",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._period_s = period_s
        self._unnamed = unnamed
        self._clock = clock
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrites the record in place; returns whether it is logged."""
        if record.levelno < logging.WARNING:
            return True
        now = self._clock()
        self._said = {name: at for name, at in self._said.items() if now < at + self._period_s}
        arguments = record.args if isinstance(record.args, tuple) else ()
        named = next((signal for signal in _SIGNALS if signal in arguments), None)
        if named in self._said or (named is None and self._said):
            return False
        signal = named or self._unnamed
        self._said[signal] = now
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg = (
            f"{signal} do not reach the collector; requests go on without them, and this is said again "
            f"after {self._period_s:.0f} s at the earliest. {record.getMessage()}"
        )
        record.args, record.exc_info = (), None
        return True


def _tame_export_warnings() -> None:
    """The exporters log several lines for each failed batch; one a minute is enough."""
    for name, unnamed in _EXPORT_LOGGERS.items():
        logging.getLogger(name).addFilter(RateLimitedWarning(_WARNING_PERIOD_S, unnamed))


def _timeout(signal: str, environ: Mapping[str, str]) -> float | None:
    """Timeout of one export in seconds; None if the user set one."""
    names = ("OTEL_EXPORTER_OTLP_TIMEOUT", f"OTEL_EXPORTER_OTLP_{signal.upper()}_TIMEOUT")
    return None if any(name in environ for name in names) else _EXPORT_TIMEOUT_S


def _resource(service_name: str) -> Resource:
    """Resource.create gives its argument precedence over the environment; the user's variables should win."""
    named = "service.name" in OTELResourceDetector().detect().attributes
    return Resource.create({} if named else {"service.name": service_name})

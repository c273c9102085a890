"""Traces and metrics are off by default, and an absent collector costs one warning for each."""

import logging
import os
import socket
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from moe_api import telemetry

SCRIPT = """
import logging, sys, threading, time
logging.basicConfig(format="%(levelname)s %(message)s")
from moe_api import telemetry
from opentelemetry import metrics, trace
handle = telemetry.configure("some-service")
tracer = trace.get_tracer("test")
started = time.monotonic()
for _ in range(int(sys.argv[1])):
    with tracer.start_as_current_span("work"):
        metrics.get_meter("test").create_counter("done").add(1)
spans = time.monotonic()
time.sleep(float(sys.argv[2]))
asleep = time.monotonic()
handle.shutdown()
print(handle.enabled, threading.active_count(), spans - started, time.monotonic() - asleep)
"""
LIMIT_S = 20.0
"""The SDK's own end waits for 30 s and more, and 2000 spans that wait for a collector for thousands."""


def run_process(spans=2000, wait_s=0.0, **environ):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(spans), str(wait_s)],
        env={**clean, **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    enabled, threads, took, shutdown = result.stdout.split()
    return enabled, int(threads), float(took), float(shutdown), result.stderr


def test_without_an_endpoint_nothing_starts():
    enabled, threads, took, shutdown, errors = run_process()
    assert (enabled, threads, errors) == ("False", 1, "")
    assert took < LIMIT_S
    assert shutdown < LIMIT_S


def test_the_sdk_can_be_disabled_as_usual():
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}
    assert run_process(**environ)[1] == 1


NOWHERE = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("environ", "missing"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": NOWHERE}, ["metrics", "traces"]),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": NOWHERE, "OTEL_METRICS_EXPORTER": "none"}, ["traces"]),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": NOWHERE, "OTEL_TRACES_EXPORTER": "none"}, ["metrics"]),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": NOWHERE}, ["traces"]),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": NOWHERE}, ["metrics"]),
    ],
)
def test_an_unreachable_collector_costs_one_warning_a_signal_and_no_waiting(environ, missing):
    # 3 s is long enough for a second batch to fail too, which would be a second warning.
    result = run_process(wait_s=3.0, OTEL_METRIC_EXPORT_INTERVAL="500", **environ)
    _, _, took, shutdown, errors = result
    assert took < LIMIT_S
    assert shutdown < LIMIT_S
    sentence = "WARNING {} do not reach the collector; requests go on without them"
    lines = sorted(errors.strip().splitlines())
    assert len(lines) == len(missing), errors
    for line, signal in zip(lines, missing, strict=True):
        assert line.startswith(sentence.format(signal))


def test_a_collector_that_accepts_but_never_answers_does_not_hold_up_the_end():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_TIMEOUT": "60"}
        assert run_process(**environ)[3] < LIMIT_S


def test_configure_reads_the_environment_it_is_given():
    before = threading.active_count()
    with telemetry.configure("service", {}) as handle:
        assert not handle.enabled
    assert threading.active_count() == before


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
def test_context_survives_grpc_metadata(trace_id, span_id, sampled):
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if sampled else trace.TraceFlags.DEFAULT)
    there = trace.SpanContext(trace_id, span_id, is_remote=False, trace_flags=flags)
    context = trace.set_span_in_context(trace.NonRecordingSpan(there))
    metadata = telemetry.inject([("x-request-id", "7")], context)
    here = trace.get_current_span(telemetry.extract(metadata)).get_span_context()
    assert metadata[0] == ("x-request-id", "7")
    assert (here.trace_id, here.span_id, here.trace_flags, here.is_remote) == (trace_id, span_id, flags, True)


@given(st.lists(st.tuples(st.sampled_from(["traceparent", "tracestate"]), st.text() | st.binary())))
def test_broken_context_is_no_error(metadata):
    assert not trace.get_current_span(telemetry.extract(metadata)).get_span_context().is_valid


def test_no_span_adds_no_metadata():
    assert telemetry.inject() == ()


def test_a_no_op_tracer_passes_the_callers_context_on():
    """So a process without telemetry in the middle does not cut a trace in two."""
    caller = TracerProvider().get_tracer("caller").start_span("call")
    metadata = telemetry.inject((), trace.set_span_in_context(caller))
    middle = trace.NoOpTracer().start_span("forward", context=telemetry.extract(metadata))
    assert telemetry.inject((), trace.set_span_in_context(middle)) == metadata


def record(level, text="failed", *args):
    return logging.LogRecord("exporter", level, "file", 1, text, args, None)


def test_warnings_are_limited_by_the_clock():
    now = 0.0
    limit = telemetry.RateLimitedWarning(60.0, "traces", lambda: now)
    assert limit.filter(record(logging.ERROR))
    now = 59.0
    assert not limit.filter(record(logging.WARNING))
    assert limit.filter(record(logging.DEBUG))
    now = 60.0
    late = record(logging.ERROR, "code UNAVAILABLE")
    assert limit.filter(late)
    assert late.levelno == logging.WARNING
    assert late.getMessage().endswith("code UNAVAILABLE")


def test_a_warning_names_what_does_not_arrive_and_holds_back_no_other():
    limit = telemetry.RateLimitedWarning(60.0, clock=lambda: 0.0)
    said = [record(logging.ERROR, "Failed to export %s to %s", name, "h:1") for name in ("metrics", "traces")]
    assert [limit.filter(one) for one in said] == [True, True]
    assert [one.getMessage().partition(" do not")[0] for one in said] == ["metrics", "traces"]
    assert not limit.filter(record(logging.ERROR, "Failed to export %s to %s", "metrics", "h:1"))
    assert not limit.filter(record(logging.WARNING, "Shutdown in progress, aborting retry."))


@pytest.fixture(autouse=True)
def no_collector(monkeypatch):
    for name in [n for n in os.environ if n.startswith("OTEL_")]:
        monkeypatch.delenv(name)

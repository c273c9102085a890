"""Traces from end to end, as the real collector receives them."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

from localcluster import traces
from tests.frontend.collector import running_collector

MOE = Path(sys.executable).with_name("moe")


@pytest.fixture(scope="module")
def collector(tmp_path_factory):
    with running_collector(tmp_path_factory.mktemp("otelcol")) as running:
        yield running


class UnseededIds(IdGenerator):
    """Hypothesis seeds `random`, from which the SDK's own generator would make the same ids again."""

    def generate_span_id(self):
        return int.from_bytes(os.urandom(8)) or 1

    def generate_trace_id(self):
        return int.from_bytes(os.urandom(16)) or 1

    def is_trace_id_random(self):
        return True


@pytest.fixture(scope="module")
def provider(collector):
    made = TracerProvider(
        resource=Resource.create({"service.name": "round-trip"}),
        id_generator=UnseededIds(),
        shutdown_on_exit=False,
    )
    made.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=collector.endpoint)))
    yield made
    made.shutdown()


# Line breaks are fine inside a value; lines that look like the exporter's own are its grammar's limit.
words = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\u2028\u2029\x85"), max_size=30
)
lines = st.lists(
    words.filter(lambda w: not w.startswith((" ", "\t")) and "#" not in w and ":" not in w), max_size=3
)
texts = words | lines.map("\n".join)
values = (
    texts
    | st.integers(-(2**63), 2**63 - 1)
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.lists(words, max_size=3)
)
keys = st.from_regex(r"[a-z_]{1,8}(\.[a-z_]{1,8}){0,3}", fullmatch=True)
attributes = st.dictionaries(keys, values, max_size=5)
moments = st.integers(10**18, 2 * 10**18)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=words.filter(str.strip).map(str.strip),
    kind=st.sampled_from(SpanKind),
    given_attributes=attributes,
    event=attributes,
    start=moments,
    length=st.integers(0, 10**12),
    error=st.none() | words,
)
def test_spans_survive_the_collectors_print(
    collector, provider, name, kind, given_attributes, event, start, length, error
):
    tracer = provider.get_tracer("test")
    span = tracer.start_span(name, kind=kind, attributes=given_attributes, start_time=start)
    span.add_event("happened", event)
    if error is not None:
        span.set_status(StatusCode.ERROR, error)
    before = collector.size()
    span.end(end_time=start + length)
    span_id = f"{span.get_span_context().span_id:016x}"
    received = collector.wait_for(lambda spans: any(s.span_id == span_id for s in spans), since=before)
    (seen,) = [s for s in received if s.span_id == span_id]
    assert seen.name == name
    assert seen.kind == kind.name.capitalize()
    assert (seen.start_ns, seen.end_ns) == (start, start + length)
    assert seen.attributes == given_attributes
    assert seen.events[0] == {"event.name": "happened", **event}
    assert (seen.status, seen.status_message) == (("Unset", "") if error is None else ("Error", error))
    assert seen.service == "round-trip"


def test_a_tree_shows_who_called_whom(collector, provider):
    tracer = provider.get_tracer("test")
    root = tracer.start_span("moe generate", start_time=10**18)
    inside = set_span_in_context(root)
    for name, begin in (("decode", 40), ("queue", 10), ("prefill", 20)):
        child = tracer.start_span(name, context=inside, start_time=10**18 + begin * 10**6)
        child.set_attribute("gen_ai.usage.output_tokens", 7)
        child.end(end_time=10**18 + (begin + 10) * 10**6)
    trace_id = f"{root.get_span_context().trace_id:032x}"
    received = collector.wait_for(lambda spans: len([s for s in spans if s.trace_id == trace_id]) == 3)
    assert not traces.is_complete([s for s in received if s.trace_id == trace_id])
    root.end(end_time=10**18 + 60 * 10**6)
    collector.wait_for(lambda spans: len([s for s in spans if s.trace_id == trace_id]) == 4)
    shown = subprocess.run(
        [sys.executable, "-m", "localcluster.traces", "--trace-id", trace_id],
        input=collector.text(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    tops = [line for line in shown.splitlines() if "──" in line]
    assert [line.split()[1] for line in tops] == ["moe", "queue", "prefill", "decode"]
    assert tops[0].startswith("└── moe generate  round-trip  +0.0 ms  60.0 ms")
    assert tops[3].lstrip().startswith("└── decode  round-trip  +40.0 ms  10.0 ms")
    assert shown.count("usage.output_tokens=7") == 3


def test_an_unknown_trace_is_an_error():
    result = subprocess.run(
        [sys.executable, "-m", "localcluster.traces", "--trace-id", "0" * 32],
        input="",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: no trace")


@given(st.text())
def test_any_other_text_holds_no_spans_and_no_surprises(text):
    assert all(isinstance(span, traces.Span) for span in traces.parse(text))


async def test_one_request_is_one_trace_from_client_to_frontend_to_worker(bench, command, collector):
    b = await bench(workers=1)
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
        "OTEL_RESOURCE_ATTRIBUTES": "k8s.pod.name=f-0",
    }
    _, address = await command("--static", b.workers[0].endpoint.address, env=environ)
    result = await run(MOE, "generate", "count 3", "--endpoint", address, "--seed", "4", env=environ)
    assert result.stdout == "w-0:0 w-0:1 w-0:2 "
    trace_id = result.stderr.split("trace: ")[1].split()[0]
    received = collector.wait_for(lambda spans: len([s for s in spans if s.trace_id == trace_id]) == 2)
    trace = [s for s in received if s.trace_id == trace_id]
    assert traces.is_complete(trace)
    client, frontend = sorted(trace, key=lambda span: span.start_ns)
    assert (client.name, client.service, client.kind) == ("moe generate", "moe", "Client")
    assert client.attributes["gen_ai.request.seed"] == 4
    assert client.attributes["gen_ai.usage.output_tokens"] == 3
    assert client.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert (frontend.service, frontend.kind) == ("moe-frontend", "Server")
    assert frontend.resource["k8s.pod.name"] == "f-0"
    assert frontend.attributes["moe.routing.reason"] == "OnlyReplica"
    seen_by_worker = b.workers[0].metadata[0]["traceparent"]
    assert seen_by_worker.split("-")[1:3] == [trace_id, frontend.span_id]


async def test_the_largest_seed_and_stop_texts_do_not_cost_the_trace(bench, collector):
    b = await bench(workers=1)
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
    options = ["--seed", str(2**64 - 1), "--stop", "a", "--endpoint", b.address]
    result = await run(MOE, "generate", "count 1", *options, env=environ)
    trace_id = result.stderr.split()[1]
    received = collector.wait_for(lambda spans: any(s.trace_id == trace_id for s in spans))
    (client,) = [s for s in received if s.trace_id == trace_id]
    assert client.attributes["gen_ai.request.seed"] == str(2**64 - 1)
    assert client.attributes["gen_ai.request.stop_sequences"] == ["a"]


async def run(*args, env=None):
    return await asyncio.to_thread(
        subprocess.run,
        args,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_attribute_lists_are_json():
    log = 'Span #0\nAttributes:\n     -> a.b: Slice(["x \\u003e y",1])'
    assert traces.parse(log)[0].attributes == {"a.b": json.loads('["x > y", 1]')}


def test_metrics_between_spans_are_passed_over():
    """The same log holds both; a metric's resource is not the spans'."""
    log = (
        "2026-01-31T12:00:00.000Z\tinfo\tResourceSpans #0\n"
        "Resource attributes:\n     -> service.name: Str(a)\n"
        "Span #0\n    Name           : work\n\t{}\n"
        "2026-01-31T12:00:01.000Z\tinfo\tResourceMetrics #0\nResource attributes:\n"
        "     -> service.name: Str(b)\nMetric #0\nDescriptor:\n     -> Name: queue\n"
        "NumberDataPoints #0\nValue: 5\n"
        "\t{}\n"
    )
    [span] = traces.parse(log)
    assert (span.name, span.service, span.attributes) == ("work", "a", {})

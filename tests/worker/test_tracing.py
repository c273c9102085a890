"""The spans of a request tell when it waited and when it was computed, in steps of 10 ns."""

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from moe_api.clock import Anchor
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import load
from moe_worker.engine.requests import Request
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.service.streams import Timeline
from moe_worker.service.tracing import record_outcome
from tests.checkpoints import write_checkpoint

SUBMITTED, STEP = 5, 10


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    options = EngineOptions(device="cpu", context_length=64, prefill_tokens=8, page_size=8, threads=1)
    return load(write_checkpoint(tmp_path_factory.mktemp("model")), options, progress=False), options


def run(core, prompt, steps):
    """The timeline of a request that is computed for so many steps; step n lasts from 10 n to 10 n + 9."""
    timeline = Timeline(Anchor(0, 0), SUBMITTED)
    core.submit(Request(0, tuple(prompt), SamplingParameters(max_tokens=3), 0))
    for begin in range(STEP, STEP * (steps + 1), STEP):
        deltas = core.step()
        for event in core.take_events():
            timeline.note(event, begin)
        for delta in deltas:
            timeline.add(delta, begin + 9)
    return timeline


def spans(timeline, now):
    """(start, end) by name, and the events of the request."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    with tracer.start_as_current_span("request") as span:
        record_outcome(tracer, span, "tiny", timeline, now)
    found = {each.name: each for each in exporter.get_finished_spans()}
    events = [(event.name, *event.attributes.values()) for event in found.pop("request").events]
    return {name: (each.start_time, each.end_time) for name, each in found.items()}, events


def test_prefill_begins_with_the_first_chunk_of_a_prompt(loaded):
    core = EngineCore(*loaded)
    found, events = spans(run(core, range(5, 45), steps=7), now=80)
    assert core.idle
    assert found == {"queue": (5, 10), "prefill": (10, 59), "decode": (59, 79)}
    assert events == []


def test_a_request_that_is_cancelled_in_prefill_shows_it(loaded):
    core = EngineCore(*loaded)
    found, _ = spans(run(core, range(5, 45), steps=2), now=33)
    assert found == {"queue": (5, 10), "prefill": (10, 33)}


def test_a_request_that_has_not_begun_only_waits():
    found, _ = spans(Timeline(Anchor(0, 0), SUBMITTED), now=33)
    assert found == {"queue": (5, 33)}


def test_tokens_in_the_cache_are_an_event(loaded):
    core = EngineCore(*loaded)
    run(core, range(5, 45), steps=7)
    timeline = run(core, range(5, 45), steps=3)
    found, events = spans(timeline, now=40)
    assert timeline.cached_tokens == 32
    assert events == [("moe_worker.prefix_cache_hit", 32)]
    assert found == {"queue": (5, 10), "prefill": (10, 19), "decode": (19, 39)}

"""The spans of one request: attributes of the server span, and queue, prefill and decode below it.

The engine process measures the times; spans are created from them afterwards.
"""

from collections.abc import Iterator

from opentelemetry import trace

from moe_api import semconv
from moe_worker.engine.statistics import EventKind
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.service.streams import Timeline

# Names of an engine event and of its token count on a span.
EVENT_NAMES = {
    EventKind.ADMITTED: ("moe_worker.prefix_cache_hit", "moe_worker.cached_tokens"),
    EventKind.PREEMPTED: ("moe_worker.preempted", "moe_worker.recomputed_tokens"),
}


def describe_request(span: trace.Span, model: str, sampling: SamplingParameters, prompt_tokens: int) -> None:
    """Sets the attributes that are known when a request has been checked."""
    span.set_attributes(
        {
            semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_TEXT_COMPLETION,
            semconv.GEN_AI_PROVIDER_NAME: semconv.PROVIDER,
            semconv.GEN_AI_REQUEST_MODEL: model,
            semconv.GEN_AI_REQUEST_STREAM: True,
            semconv.GEN_AI_REQUEST_MAX_TOKENS: sampling.max_tokens,
            semconv.GEN_AI_REQUEST_TEMPERATURE: sampling.temperature,
            semconv.GEN_AI_REQUEST_TOP_P: sampling.top_p,
            semconv.GEN_AI_REQUEST_TOP_K: sampling.top_k,
            semconv.GEN_AI_USAGE_INPUT_TOKENS: prompt_tokens,
        }
    )
    if sampling.seed is not None:
        # Attributes are signed 64-bit integers; a seed may be larger.
        span.set_attribute(semconv.GEN_AI_REQUEST_SEED, str(sampling.seed))
    if sampling.stop:
        span.set_attribute(semconv.GEN_AI_REQUEST_STOP_SEQUENCES, sampling.stop)


def record_outcome(
    tracer: trace.Tracer, span: trace.Span, model: str, timeline: Timeline, now_ns: int
) -> None:
    """Adds the events until `now_ns`; a cancelled request shows its progress.

    All times are monotonic; this converts them to timestamps.
    """
    span.set_attribute(semconv.GEN_AI_RESPONSE_MODEL, model)
    span.set_attribute(semconv.GEN_AI_USAGE_OUTPUT_TOKENS, timeline.tokens)
    span.set_attribute(semconv.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS, timeline.cached_tokens)
    for at_ns, event in timeline.events:
        name, tokens = EVENT_NAMES[event.kind]
        span.add_event(name, {tokens: event.tokens}, timeline.anchor.timestamp_ns(at_ns))
    if timeline.finish_reason is not None:
        span.set_attribute(semconv.GEN_AI_RESPONSE_FINISH_REASONS, [timeline.finish_reason.value])
    for name, start_ns, end_ns in _phases(timeline, now_ns):
        child = tracer.start_span(
            name,
            context=trace.set_span_in_context(span),
            start_time=timeline.anchor.timestamp_ns(start_ns),
        )
        child.end(end_time=timeline.anchor.timestamp_ns(end_ns))
    if timeline.tokens:
        waited_s = (timeline.first_token_ns - timeline.submitted_ns) / 1e9
        span.set_attribute(semconv.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK, waited_s)


def _phases(timeline: Timeline, now_ns: int) -> Iterator[tuple[str, int, int]]:
    """(name, start, end) of the phases of a request."""
    yield "queue", timeline.submitted_ns, max(timeline.prefill_start_ns or now_ns, timeline.submitted_ns)
    if timeline.prefill_start_ns:
        yield "prefill", timeline.prefill_start_ns, timeline.first_token_ns or now_ns
    if timeline.tokens:
        yield "decode", timeline.first_token_ns, timeline.last_token_ns

"""Counts and times of requests, with the names of the GenAI conventions if they define them.

The engine process measures the times. Names, units and meanings are in docs/observability.md.
"""

import time
from collections.abc import Mapping, Sequence

from opentelemetry.metrics import Meter

from moe_api import semconv
from moe_worker.service.instruments import Histogram, histogram
from moe_worker.service.streams import Timeline


class Latency:
    """One time of requests: an instrument for the collector, and a histogram for `GetLoad`."""

    def __init__(self, meter: Meter, name: str, description: str, bounds: Sequence[float]) -> None:
        self.histogram = Histogram(bounds)
        self._instrument = histogram(meter, name, "s", description, bounds)

    def record(self, seconds: float, attributes: Mapping[str, str]) -> None:
        """Adds the time of one request."""
        self.histogram.record(seconds)
        self._instrument.record(seconds, attributes)


class RequestMetrics:
    """Counts and times requests; one for each worker process."""

    def __init__(self, meter: Meter) -> None:
        self.started_ns = time.time_ns()
        self.received = self.refused = self.completed = self.expired = 0
        self.largest_gap_s = 0.0
        self.first_token = Latency(
            meter,
            semconv.GEN_AI_SERVER_TIME_TO_FIRST_TOKEN,
            "Time to generate first token for successful responses.",
            semconv.TIME_TO_FIRST_TOKEN_BOUNDS,
        )
        self.output_token = Latency(
            meter,
            semconv.GEN_AI_SERVER_TIME_PER_OUTPUT_TOKEN,
            "Time per output token generated after the first token for successful responses.",
            semconv.TIME_PER_OUTPUT_TOKEN_BOUNDS,
        )
        self.whole = Histogram(semconv.REQUEST_DURATION_BOUNDS)
        self._duration = histogram(
            meter,
            semconv.GEN_AI_SERVER_REQUEST_DURATION,
            "s",
            "Generative AI server request duration such as time-to-last byte or last output token.",
            semconv.REQUEST_DURATION_BOUNDS,
        )
        self._usage = histogram(
            meter,
            semconv.GEN_AI_CLIENT_TOKEN_USAGE,
            "{token}",
            "Number of input and output tokens used.",
            semconv.TOKEN_USAGE_BOUNDS,
        )
        self._gap = histogram(
            meter,
            "moe_worker.request.largest_gap",
            "s",
            "Longest wait between two tokens of a request.",
            semconv.TIME_PER_OUTPUT_TOKEN_BOUNDS,
        )

    def receive(self) -> None:
        """Records a well-formed request."""
        self.received += 1

    def refuse(self, model: str) -> None:
        """Records a request that met a full queue."""
        self.received += 1
        self.refused += 1
        self._duration.record(0.0, _attributes(model) | {semconv.ERROR_TYPE: "RESOURCE_EXHAUSTED"})

    def end(self, model: str, prompt_tokens: int, timeline: Timeline, error: str | None, now_ns: int) -> None:
        """Records the end of a request at `now_ns`; `error` is its status, None if it is complete."""
        attributes = _attributes(model)
        self._count_tokens(prompt_tokens, timeline.tokens, attributes)
        if timeline.tokens > 1:
            gap_s = timeline.largest_gap_ns / 1e9
            self.largest_gap_s = max(self.largest_gap_s, gap_s)
            self._gap.record(gap_s, attributes)
        if error is None:
            self._complete(timeline, attributes)
            return
        self.expired += error == "DEADLINE_EXCEEDED"
        elapsed_s = (now_ns - timeline.submitted_ns) / 1e9
        self._duration.record(elapsed_s, attributes | {semconv.ERROR_TYPE: error})

    def _complete(self, timeline: Timeline, attributes: Mapping[str, str]) -> None:
        self.completed += 1
        whole_s = (timeline.last_token_ns - timeline.submitted_ns) / 1e9
        self.whole.record(whole_s)
        self._duration.record(whole_s, attributes)
        self.first_token.record((timeline.first_token_ns - timeline.submitted_ns) / 1e9, attributes)
        if timeline.tokens > 1:
            decode_s = (timeline.last_token_ns - timeline.first_token_ns) / 1e9
            self.output_token.record(decode_s / (timeline.tokens - 1), attributes)

    def _count_tokens(self, prompt: int, output: int, attributes: Mapping[str, str]) -> None:
        for kind, tokens in ((semconv.TOKEN_TYPE_INPUT, prompt), (semconv.TOKEN_TYPE_OUTPUT, output)):
            self._usage.record(tokens, {**attributes, semconv.GEN_AI_TOKEN_TYPE: kind})


def _attributes(model: str) -> dict[str, str]:
    return {
        semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_TEXT_COMPLETION,
        semconv.GEN_AI_PROVIDER_NAME: semconv.PROVIDER,
        semconv.GEN_AI_REQUEST_MODEL: model,
        semconv.GEN_AI_RESPONSE_MODEL: model,
    }

"""The engine's counters as OpenTelemetry instruments.

Names, units and meanings are in docs/observability.md. Without a collector the instruments do nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from moe_worker.engine.requests import Load
from moe_worker.engine.statistics import ExpertStatistics, LayerExperts, Statistics
from moe_worker.service.instruments import histogram

LAYER: Final = "moe_worker.layer"
STEP_SECONDS_BOUNDS: Final = tuple(0.0005 * 2**power for power in range(15))
STEP_TOKENS_BOUNDS: Final = tuple(2.0**power for power in range(14))
IMBALANCE_BOUNDS: Final = (1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)

_GAUGES: Final[Mapping[str, tuple[str, str, Callable[[Load], int]]]] = {
    "requests.queued": (
        "{request}",
        "Requests in the queue: they wait for room in the batch.",
        lambda it: it.queued,
    ),
    "requests.running": ("{request}", "Requests in the batch.", lambda it: it.running),
    "kv_cache.capacity": ("{token}", "Tokens that the KV cache holds.", lambda it: it.kv_tokens_capacity),
    "kv_cache.used": ("{token}", "Tokens in pages of running requests.", lambda it: it.kv_tokens_used),
    "kv_cache.cached": ("{token}", "Tokens in pages of idle prefixes.", lambda it: it.kv_tokens_cached),
}
_COUNTERS: Final[Mapping[str, tuple[str, str, Callable[[Statistics], int]]]] = {
    "steps": ("{step}", "Steps computed.", lambda it: it.steps),
    "prompt_tokens": ("{token}", "Prompt tokens of requests that began.", lambda it: it.prompt_tokens),
    "prefix_hit_tokens": ("{token}", "Prompt tokens found in the cache.", lambda it: it.prefix_hit_tokens),
    "prefill_tokens": ("{token}", "Tokens computed for prompts.", lambda it: it.prefill_tokens),
    "decode_tokens": ("{token}", "Tokens computed in decode.", lambda it: it.decode_tokens),
    "recomputed_tokens": ("{token}", "Computed again after preemption.", lambda it: it.recomputed_tokens),
    "preemptions": ("{preemption}", "Requests that were preempted.", lambda it: it.preemptions),
    "requests.expired": ("{request}", "Requests whose deadline passed.", lambda it: it.expired),
    "kv_cache.evictions": ("{page}", "Pages that idle prefixes lost.", lambda it: it.evictions),
    "kv_offload.saved": ("{page}", "Evicted pages kept in CPU memory.", lambda it: it.offloaded),
    "kv_offload.restored": ("{page}", "Pages that came back from CPU memory.", lambda it: it.restored),
}


class Readings(Protocol):
    """Source of the engine's newest figures."""

    @property
    def current_load(self) -> Load:
        """How busy it is."""
        ...

    @property
    def statistics(self) -> Statistics:
        """Its sums."""
        ...


class EngineMetrics:
    """Exports the engine's counters; one for each engine process."""

    def __init__(self, meter: Meter, readings: Readings) -> None:
        self._experts = ExpertStatistics()
        self._recent = ExpertStatistics()
        _observe(meter, readings)
        meter.create_observable_gauge(
            "moe_worker.experts.active",
            [self._active],
            "{expert}",
            "Activated experts of a layer in a step; mean of the last steps.",
        )
        self._duration = histogram(
            meter, "moe_worker.step.duration", "s", "Time of a step.", STEP_SECONDS_BOUNDS
        )
        self._tokens = histogram(
            meter, "moe_worker.step.tokens", "{token}", "Tokens in a step.", STEP_TOKENS_BOUNDS
        )
        self._sequences = histogram(
            meter, "moe_worker.step.sequences", "{sequence}", "Sequences in a step.", STEP_TOKENS_BOUNDS
        )
        self._imbalance = histogram(
            meter,
            "moe_worker.experts.imbalance",
            "1",
            "Tokens of a layer's busiest expert over those of its mean expert, of the last steps.",
            IMBALANCE_BOUNDS,
        )

    def step(self, before: Statistics, after: Statistics, seconds: float) -> None:
        """Records a step."""
        self._duration.record(seconds)
        self._tokens.record(after.tokens - before.tokens)
        self._sequences.record(after.sequences - before.sequences)

    def count_experts(self, experts: ExpertStatistics) -> None:
        """Records the engine's expert statistics since the start."""
        recent = experts.since(self._experts)
        self._experts = experts
        if not recent.steps:
            return
        self._recent = recent
        for layer in recent.layers:
            self._imbalance.record(imbalance(layer), {LAYER: layer.layer})

    def _active(self, _: CallbackOptions) -> Iterable[Observation]:
        recent = self._recent
        return [Observation(layer.active / recent.steps, {LAYER: layer.layer}) for layer in recent.layers]


def imbalance(layer: LayerExperts) -> float:
    """Tokens of the busiest expert divided by the mean; 1 if all have the same, or there are none."""
    total = sum(layer.tokens)
    return max(layer.tokens) * len(layer.tokens) / total if total else 1.0


def _observe(meter: Meter, readings: Readings) -> None:
    """Instruments that read the newest figures when metrics are exported."""
    for name, (unit, description, of_load) in _GAUGES.items():

        def gauge(_: CallbackOptions, read: Callable[[Load], int] = of_load) -> Iterable[Observation]:
            return [Observation(read(readings.current_load))]

        meter.create_observable_up_down_counter(f"moe_worker.{name}", [gauge], unit, description)
    for name, (unit, description, of_statistics) in _COUNTERS.items():

        def counter(
            _: CallbackOptions, read: Callable[[Statistics], int] = of_statistics
        ) -> Iterable[Observation]:
            return [Observation(read(readings.statistics))]

        meter.create_observable_counter(f"moe_worker.{name}", [counter], unit, description)

"""What the workers' prefix caches save each class of tenants, as their responses say."""

from collections import Counter
from collections.abc import Iterable

from opentelemetry import metrics

from moe_api.inference.v1 import inference_pb2


class Prompts:
    """Prompt tokens of the responses that workers completed, by class of tenants."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def count(self, tenant: str, usage: inference_pb2.Usage | None) -> None:
        """Counts a completed response; a replica is not trusted to stay within its prompt."""
        if usage is not None:
            cached = min(usage.cached_tokens, usage.prompt_tokens)
            self._counts[tenant, "hit"] += cached
            self._counts[tenant, "miss"] += usage.prompt_tokens - cached

    @property
    def tokens(self) -> int:
        """All of them."""
        return self._counts.total()

    @property
    def cached(self) -> int:
        """Those that a prefix cache held."""
        return sum(count for (_, result), count in self._counts.items() if result == "hit")

    def measure(self, meter: metrics.Meter) -> None:
        """Creates the instrument."""
        meter.create_observable_counter(
            "moe_frontend.prefix_cache.tokens",
            [self._observe],
            "{token}",
            "Prompt tokens of completed responses, by tenant and result: hit (in a prefix cache), miss",
        )

    def _observe(self, _: metrics.CallbackOptions) -> Iterable[metrics.Observation]:
        # Exports run in threads.
        for (tenant, result), count in list(self._counts.items()):
            yield metrics.Observation(count, {"tenant": tenant, "result": result})

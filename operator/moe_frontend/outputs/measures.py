"""What the output cache does for each class of tenants: sums, and the instruments that export them."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from opentelemetry import metrics

from moe_frontend.outputs.answer import Saving
from moe_frontend.outputs.store import Store

_PREFIX: Final = "moe_frontend.output_cache"


class CacheMeasures:
    """Sums since the start. Classes of tenants are few: those of the spec, and one for all others.

    Attributes:
        lookups: by class and result: hit, miss, shared.
        saved_tokens, saved_seconds: sums of `Saving`, by class.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.lookups: Counter[tuple[str, str]] = Counter()
        self.saved_tokens: Counter[str] = Counter()
        self.saved_seconds: dict[str, float] = {}

    def save(self, tenant: str, saving: Saving) -> None:
        """Counts what an answer without a worker saved."""
        self.saved_tokens[tenant] += saving.tokens
        self.saved_seconds[tenant] = self.saved_seconds.get(tenant, 0.0) + saving.seconds

    def results(self) -> Counter[str]:
        """Lookups of all classes, by result."""
        found: Counter[str] = Counter()
        for (_, result), count in self.lookups.items():
            found[result] += count
        return found

    def sums(self) -> dict[str, int]:
        """Of all classes, with the keys of `moe_operator.resources.cache_sums`."""
        results = self.results()
        return {
            "outputHits": results["hit"],
            "outputShared": results["shared"],
            "outputMisses": results["miss"],
            "outputEvictions": self._store.evictions.total(),
            "outputBytes": self._store.bytes,
            "savedTokens": self.saved_tokens.total(),
            "savedMilliseconds": round(1000 * sum(self.saved_seconds.values())),
        }

    def export(self, meter: metrics.Meter) -> None:
        """Creates the instruments."""
        meter.create_observable_counter(
            f"{_PREFIX}.lookups",
            [_observed(lambda: self.lookups, "result")],
            "{request}",
            "Cacheable requests, by tenant and result: hit, miss, shared",
        )
        meter.create_observable_counter(
            f"{_PREFIX}.saved_tokens",
            [_observed(lambda: self.saved_tokens)],
            "{token}",
            "Prompt and output tokens that hits and shared computations saved the workers, by tenant",
        )
        meter.create_observable_counter(
            f"{_PREFIX}.saved_time",
            [_observed(lambda: self.saved_seconds)],
            "s",
            "Time that hits and shared computations saved the workers, by tenant",
        )
        meter.create_observable_up_down_counter(
            f"{_PREFIX}.size",
            [_observed(lambda: self._store.sizes)],
            "By",
            "Bytes of the answers in the output cache, by tenant",
        )
        meter.create_observable_counter(
            f"{_PREFIX}.evictions",
            [_observed(lambda: self._store.evictions, "reason")],
            "{answer}",
            "Answers removed from the output cache, by tenant and reason: capacity, expired, revision",
        )


_Sums = Mapping[str, float] | Mapping[tuple[str, str], float]


def _observed(
    read: Callable[[], _Sums], second: str = ""
) -> Callable[[metrics.CallbackOptions], Iterable[metrics.Observation]]:
    """Observes sums by tenant, or by tenant and `second`. Exports run in threads, so each reads a copy."""

    def observe(_: metrics.CallbackOptions) -> Iterable[metrics.Observation]:
        for key, value in list(read().items()):
            parts = (key,) if isinstance(key, str) else key
            yield metrics.Observation(value, dict(zip(("tenant", second), parts, strict=False)))

    return observe

"""Metrics of scaling: what the scaler of each deployment measures, forecasts and decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from moe_operator.autoscaling.scaler import MINUTE_S, Outcome
from moe_operator.resources import names
from moe_operator.resources.deployment import Identity

_Value = Callable[[Outcome], float | None]
_GAUGES: dict[str, tuple[str, str, _Value]] = {
    "demand": ("{request}/s", "Requests that arrived, last minute", lambda o: _per_second(o.demand)),
    "forecast": (
        "{request}/s",
        "Requests expected at the horizon",
        lambda o: _per_second(o.forecast.mean) if o.forecast else None,
    ),
    "forecast.upper": (
        "{request}/s",
        "Requests at the horizon, 95th percentile",
        lambda o: _per_second(o.forecast.quantile(0.95)) if o.forecast else None,
    ),
    "forecast.error": (
        "%",
        "Rolling error of the forecast (WAPE)",
        lambda o: o.forecast.errors.wape if o.forecast else None,
    ),
    "forecast.last_value_error": (
        "%",
        "The same for the last value used as a forecast",
        lambda o: o.forecast.errors.last_value_wape if o.forecast else None,
    ),
    "capacity": (
        "{request}/s",
        "Requests that one replica serves within the latency target",
        lambda o: _per_second(o.capacity.per_replica),
    ),
    "latency_target": (
        "s",
        "Time to first token that 95 of 100 requests must meet",
        lambda o: o.latency_target_s,
    ),
    "horizon": ("s", "90th percentile of cold starts", lambda o: o.cold_starts.horizon_s),
    "replicas": ("{replica}", "Replicas that scaling wants", lambda o: float(o.sizing.replicas)),
    "reports.unusable": (
        "{replica}",
        "Replicas whose load report is invalid or missing",
        lambda o: float(len(o.wrong) + len(o.silent)),
    ),
}


class ScalingMetrics:
    """Gauges named moe_operator.scaling.*, read when an export is due."""

    def __init__(self, meter: metrics.Meter) -> None:
        self._outcomes: dict[tuple[str, str], Outcome] = {}
        for name, (unit, description, value) in _GAUGES.items():
            meter.create_observable_gauge(
                f"moe_operator.scaling.{name}", [self._reader(value)], unit, description
            )

    def record(self, identity: Identity, outcome: Outcome) -> None:
        """Stores the outcome of a round."""
        self._outcomes[identity.namespace, identity.name] = outcome

    def forget(self, namespace: str, name: str) -> None:
        """Removes the gauges of a deployment that this process does not scale any more."""
        self._outcomes.pop((namespace, name), None)

    def _reader(self, value: _Value) -> Callable[[CallbackOptions], Iterator[Observation]]:
        def read(_: CallbackOptions) -> Iterator[Observation]:
            for (namespace, name), outcome in list(self._outcomes.items()):
                number = value(outcome)
                if number is not None:
                    attributes = {"k8s.namespace.name": namespace, f"{names.GROUP}.name": name}
                    yield Observation(number, attributes)

        return read


def _per_second(per_minute: float | None) -> float | None:
    return None if per_minute is None else per_minute / MINUTE_S

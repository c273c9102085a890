"""Metrics of deployments at their last reconcile: conditions, and desired and ready replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from moe_operator.resources import names
from moe_operator.resources.deployment import Name
from moe_operator.resources.status import Status

CONDITION = "moe_operator.condition"

_Point = tuple[float, dict[str, str]]
"""A value and the attributes that it has besides the deployment's."""


class DeploymentMetrics:
    """Gauges named moe_operator.deployment.*, read when an export is due; any thread may record."""

    def __init__(self, meter: Meter) -> None:
        self._statuses: dict[Name, Status] = {}
        meter.create_observable_gauge(
            "moe_operator.deployment.condition",
            [self._reader(_conditions)],
            "{condition}",
            "1 if the condition is True, 0 if it is False; absent while it is Unknown",
        )
        meter.create_observable_gauge(
            "moe_operator.deployment.replicas.desired",
            [self._reader(_desired)],
            "{replica}",
            "Replicas that the spec or scaling asks for",
        )
        meter.create_observable_gauge(
            "moe_operator.deployment.replicas.ready",
            [self._reader(lambda status: [(status.ready_replicas, {})])],
            "{replica}",
            "Replicas whose leader is ready",
        )

    def record(self, name: Name, status: Status) -> None:
        """Stores the status that a reconcile wrote."""
        self._statuses[name] = status

    def forget(self, name: Name) -> None:
        """Removes the gauges of a deployment that is deleted, or that another process reconciles."""
        self._statuses.pop(name, None)

    def _reader(
        self, points: Callable[[Status], Iterable[_Point]]
    ) -> Callable[[CallbackOptions], Iterator[Observation]]:
        def read(_: CallbackOptions) -> Iterator[Observation]:
            for name, status in self._statuses.copy().items():
                who = {"k8s.namespace.name": name.namespace, f"{names.GROUP}.name": name.name}
                for value, attributes in points(status):
                    yield Observation(value, {**who, **attributes})

        return read


def _conditions(status: Status) -> Iterator[_Point]:
    for condition in status.conditions:
        if condition.status != "Unknown":
            yield float(condition.status == "True"), {CONDITION: condition.type}


def _desired(status: Status) -> list[_Point]:
    return [] if status.desired_replicas is None else [(status.desired_replicas, {})]

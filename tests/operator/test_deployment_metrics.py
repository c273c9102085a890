"""What a collector gets of each deployment: what the last reconcile wrote into its status."""

from datetime import UTC, datetime

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from moe_operator.controller.deployment_metrics import CONDITION, DeploymentMetrics
from moe_operator.controller.reconcile import Reconciler
from moe_operator.resources.deployment import Name
from moe_operator.resources.status import Condition, Status
from moe_operator.settings import Settings

DOCS = Name("users", "docs")
WHO = {"k8s.namespace.name": "users", "serving.moe-operator.dev.name": "docs"}


def condition(kind, status):
    return Condition(type=kind, status=status, reason="R", last_transition_time="2026-01-01T00:00:00Z")


def collected(reader):
    data = reader.get_metrics_data()
    metrics = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics] if data else []
    return {
        m.name.removeprefix("moe_operator.deployment."): [(p.value, p.attributes) for p in m.data.data_points]
        for m in metrics
    }


def test_a_status_is_measured_until_the_deployment_is_gone():
    reader = InMemoryMetricReader()
    meters = DeploymentMetrics(MeterProvider([reader]).get_meter("test"))
    kinds = {"Ready": "False", "Active": "True", "ModelLoaded": "Unknown"}
    conditions = tuple(condition(kind, status) for kind, status in kinds.items())
    meters.record(DOCS, Status(desired_replicas=3, ready_replicas=1, conditions=conditions))
    assert collected(reader) == {
        "condition": [(0.0, {**WHO, CONDITION: "Ready"}), (1.0, {**WHO, CONDITION: "Active"})],
        "replicas.desired": [(3, WHO)],
        "replicas.ready": [(1, WHO)],
    }
    meters.record(DOCS, Status(ready_replicas=2))
    found = collected(reader)
    assert found["replicas.ready"] == [(2, WHO)]
    assert not found.get("replicas.desired")
    meters.forget(DOCS)
    assert not any(collected(reader).values())


class OneDeployment:
    """A cluster with one deployment, whose spec is invalid, and a peering of its own."""

    def __init__(self):
        self.body = {
            "metadata": {"namespace": "users", "name": "docs", "uid": "u", "generation": 1},
            "spec": {"replicas": "many"},
        }
        self.higher = False  # another process acts

    def get(self, *_):
        return self.body

    def apply(self, *_, **__): ...

    def create(self, *_): ...

    def outranked(self, _):
        return self.higher


def test_a_reconcile_measures_what_it_writes_and_forgets_what_is_not_its_own():
    reader, world = InMemoryMetricReader(), OneDeployment()
    meters = DeploymentMetrics(MeterProvider([reader]).get_meter("test"))
    reconciler = Reconciler(world, Settings(), world, lambda: datetime.now(UTC), lambda _: {}, states=meters)

    def ready():
        reconciler.reconcile(DOCS)
        points = collected(reader).get("condition", [])
        return [value for value, attributes in points if attributes[CONDITION] == "Ready"]

    assert ready() == [0.0]
    world.higher = True
    assert ready() == []
    world.higher = False
    assert ready() == [0.0]
    world.body = None
    assert ready() == []

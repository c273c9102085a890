"""What an OpenTelemetry reader gets of a deployment that scales."""

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from moe_operator.autoscaling.metrics import ScalingMetrics
from tests.operator.autoscaling.simulated import Simulation, minutes


def collected(reader):
    data = reader.get_metrics_data()
    metrics = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics] if data else []
    return {metric.name.removeprefix("moe_operator.scaling."): metric.data.data_points for metric in metrics}


def test_a_round_is_measured_until_the_deployment_is_gone():
    reader = InMemoryMetricReader()
    meters = ScalingMetrics(MeterProvider([reader]).get_meter("test"))
    world = Simulation({"maxReplicas": 10, "priorRequestsPerSecond": 2.0})
    world.run(minutes(40, 3.0))
    identity = world.deployment.identity
    meters.record(identity, world.outcomes[-1])
    points = collected(reader)
    assert points["demand"][0].value == pytest.approx(3.0)
    assert points["capacity"][0].value == pytest.approx(2.0, rel=0.1)
    assert points["replicas"][0].value == len(world.replicas)
    assert points["latency_target"][0].value == 2.5
    assert points["horizon"][0].value == world.outcomes[-1].cold_starts.horizon_s
    assert points["forecast.upper"][0].value >= points["forecast"][0].value
    assert points["demand"][0].attributes == {
        "k8s.namespace.name": "default",
        "serving.moe-operator.dev.name": "docs",
    }
    meters.forget(identity.namespace, identity.name)
    assert not any(collected(reader).values())

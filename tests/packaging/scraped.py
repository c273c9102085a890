"""What Prometheus reads at /metrics of each process: names and labels that the real instruments export."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import prometheus_client
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.trace import INVALID_SPAN
from prometheus_client.parser import text_string_to_metric_families

from moe_api import expiry, tls
from moe_api.supervision import Backoff, Supervisor
from moe_frontend.http.measures import Measures
from moe_frontend.outputs.cache import OutputCache
from moe_frontend.outputs.store import Store
from moe_frontend.transport.holding import Hold
from moe_frontend.transport.loads import LoadPolling, Reported
from moe_operator.autoscaling.metrics import ScalingMetrics
from moe_operator.autoscaling.model.forecast.result import Errors
from moe_operator.controller.deployment_metrics import DeploymentMetrics
from moe_operator.controller.work_metrics import WorkMetrics
from moe_operator.errors import RetryableError
from moe_operator.resources.deployment import Name
from moe_operator.resources.status import Condition, Status
from moe_worker.engine.requests import Load
from moe_worker.engine.statistics import ExpertStatistics, LayerExperts, Statistics
from moe_worker.service.metrics import EngineMetrics
from moe_worker.service.request_metrics import RequestMetrics
from moe_worker.service.streams import Anchor, Timeline
from tests.operator.autoscaling.simulated import Simulation, minutes
from tests.pki import Authority

TARGET = {"namespace", "pod", "instance", "job", "container", "endpoint"}
"""Labels that the Prometheus Operator gives every series that it scrapes from a pod."""
OF_DEPLOYMENT = {"serving_moe_operator_dev_name", "serving_moe_operator_dev_role"}
"""podTargetLabels of the chart's PodMonitors; the chart's test compares."""
Names = dict[str, set[str]]
"""Labels of each name."""


class _Readings:
    current_load = Load(1, 2, 300, 40, 5)
    statistics = Statistics(steps=1)


class _Fleet:
    reported = (Reported(1, 2, 100, 50),)


def _pair() -> tls.KeyPair:
    return tls.parse(Authority().pair())


def operator(meter: Meter) -> None:
    work = WorkMetrics(meter)
    with work.reconcile():
        work.decided("Created")
    try:
        with work.reconcile():
            raise RetryableError("no")
    except RetryableError:
        pass
    ready = Condition(type="Ready", status="True", reason="R", last_transition_time="2026-01-01T00:00:00Z")
    DeploymentMetrics(meter).record(Name("default", "docs"), Status(desired_replicas=2, conditions=(ready,)))
    world = Simulation({"maxReplicas": 10, "priorRequestsPerSecond": 2.0})
    world.run(minutes(40, 3.0))
    outcome = world.outcomes[-1]
    forecast = replace(outcome.forecast, errors=Errors(12.0, 15.0))
    ScalingMetrics(meter).record(world.deployment.identity, replace(outcome, forecast=forecast))


def frontend(meter: Meter) -> None:
    with Measures(meter).request("POST") as measured:
        measured.route, measured.status, measured.error = "/v1/completions", 503, "client_gone"
    Hold(1.0, "docs").measure(meter)
    store = Store(1000, 60.0)
    store.evictions["other", "capacity"] += 1
    cache = OutputCache(store, Supervisor(), None)
    cache.measures.export(meter)
    cache._note(INVALID_SPAN, "hit", "other")
    LoadPolling(_Fleet()).measure(meter)
    expiry.measure(meter, {expiry.CLIENT: _pair, expiry.INTERNAL: _pair})


def worker(meter: Meter) -> None:
    engine = EngineMetrics(meter, _Readings())
    engine.step(Statistics(), Statistics(steps=1), 0.1)
    engine.count_experts(ExpertStatistics(steps=1, layers=(LayerExperts(1, (3, 1), 2),)))
    expiry.measure(meter, {expiry.INTERNAL: _pair})
    requests = RequestMetrics(meter)
    requests.refuse("docs")
    requests.end("docs", 3, Timeline(Anchor.now(), 1, 2, 3, 9, tokens=2), None, 10)


async def _read(meter: Meter) -> str:
    """The text of /metrics while a loop runs that failed once."""
    running, failures = asyncio.Event(), [ValueError("once")]
    supervisor = Supervisor(meter, Backoff(0.001), expected=(ValueError,))

    async def work() -> None:
        if failures:
            raise failures.pop()
        running.set()
        await asyncio.Event().wait()

    supervisor.start("reconcile", work)
    await asyncio.wait_for(running.wait(), 60)
    try:
        return prometheus_client.generate_latest().decode()
    finally:
        await supervisor.close()


def scrape(process: Callable[[Meter], None]) -> Names:
    """What a process exports, with each sample's labels."""
    reader = PrometheusMetricReader()
    provider = MeterProvider([reader])
    try:
        meter = provider.get_meter("test")
        process(meter)
        text = asyncio.run(_read(meter))
    finally:
        provider.shutdown()
    found: Names = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found

"""Frontends learn by GetLoad what other frontends sent to a replica: real gRPC on loopback."""

import asyncio
import contextlib
import re
from pathlib import Path

import grpc
import prometheus_client
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_frontend.transport.loads import LoadPolling, reported
from moe_operator.render import inference_pool
from tests.frontend.fake_worker import says_bytes
from tests.frontend.fleet import Fleet

ROOT = Path(__file__).parents[2]


class Reports(worker_pb2_grpc.WorkerServiceServicer):
    """GetLoad of a worker; `load` is what it says, None: that it does not know the call."""

    def __init__(self):
        self.load, self.asked = worker_pb2.Load(), 0

    async def GetLoad(self, request, context):
        self.asked += 1
        if self.load is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "unknown method")
        return self.load


class PolledFleet(Fleet):
    """The frontend polls the workers."""

    def __init__(self):
        self.reports = [Reports(), Reports()]
        super().__init__(self.reports)
        self.polling = LoadPolling(self.replicas, 0.01)

    async def start(self):
        await super().start()
        self.supervisor.start("replica-loads", self.polling.run)

    async def report(self, number, **load):
        """Sets a worker's report and waits until a round that began afterwards has ended."""
        self.reports[number].load = worker_pb2.Load(**load)
        await self.rounds(number)

    async def rounds(self, number):
        before = self.reports[number].asked
        await self.until(lambda: self.reports[number].asked >= before + 3)

    def chosen(self):
        with self.replicas.lease(frozenset()) as lease:
            return lease.endpoint.name


@pytest.fixture
async def fleet():
    one = PolledFleet()
    await one.start()
    yield one
    await one.close()


async def test_requests_of_other_frontends_count(fleet):
    await fleet.report(0, queued=1, running=2)
    assert {fleet.chosen() for _ in range(4)} == {"w-1"}
    await fleet.report(1, running=5)
    assert {fleet.chosen() for _ in range(4)} == {"w-0"}


async def test_own_requests_count_once(fleet):
    with contextlib.ExitStack() as held:
        names = [held.enter_context(fleet.replicas.lease(frozenset())).endpoint.name for _ in range(4)]
        assert sorted(names) == ["w-0", "w-0", "w-1", "w-1"]
        await fleet.report(0, running=2)
        await fleet.report(1, running=3)  # one of them is of another frontend
        assert {fleet.chosen() for _ in range(4)} == {"w-0"}


async def test_a_report_counts_no_more_once_its_replica_is_silent(fleet):
    await fleet.report(0, running=9)
    assert {fleet.chosen() for _ in range(2)} == {"w-1"}
    await fleet.workers[0].server.stop(None)
    async with asyncio.timeout(60):
        while {fleet.chosen() for _ in range(2)} != {"w-0", "w-1"}:
            await asyncio.sleep(0.01)


async def test_a_replica_without_the_call_is_not_asked_again(fleet):
    await fleet.report(0, running=9)
    fleet.reports[0].load = None
    await fleet.rounds(1)
    asked = fleet.reports[0].asked
    await fleet.rounds(1)
    assert fleet.reports[0].asked == asked
    assert {fleet.chosen() for _ in range(2)} == {"w-0", "w-1"}


async def test_a_report_that_cannot_be_decoded_counts_as_none_and_others_are_asked():
    one = PolledFleet()

    async def junk(request, context):
        return b"\xff\xff"

    await one.workers[0].start(leaving=says_bytes("GetLoad", junk))
    await one.workers[1].start(leaving=one.reports[1])
    one.replicas.update(frozenset(worker.endpoint for worker in one.workers))
    one.supervisor.start("replica-loads", one.polling.run)
    await one.report(1, running=5)
    assert {one.chosen() for _ in range(4)} == {"w-0"}
    assert [state.failures for state in one.supervisor.states] == [0]
    await one.close()


async def test_the_sums_of_all_replicas_are_exported(fleet):
    reader = InMemoryMetricReader()
    fleet.polling.measure(MeterProvider([reader]).get_meter("test"))
    await fleet.report(0, queued=2, running=3, kv_tokens_capacity=100, kv_tokens_used=50)
    await fleet.report(1, queued=1, running=1, kv_tokens_capacity=300, kv_tokens_used=50)
    (resource,) = reader.get_metrics_data().resource_metrics
    (scope,) = resource.scope_metrics
    assert {metric.name: metric.data.data_points[0].value for metric in scope.metrics} == {
        "moe_frontend.replicas.requests.queued": 3,
        "moe_frontend.replicas.requests.running": 4,
        "moe_frontend.replicas.kv_cache.utilization": 0.25,
    }


def read_by_endpoint_pickers():
    """The gauges that the picker's configuration in the example names."""
    example = yaml.safe_load_all((ROOT / "examples/inference-gateway.yaml").read_text())
    (configuration,) = (one["data"]["picker.yaml"] for one in example if one["kind"] == "ConfigMap")
    plugins = {one["type"]: one.get("parameters", {}) for one in yaml.safe_load(configuration)["plugins"]}
    (engine,) = plugins["core-metrics-extractor"]["engineConfigs"]
    assert engine["name"] == inference_pool.ENGINE
    return {value for name, value in engine.items() if name.endswith("Spec")}


async def test_a_scrape_shows_the_gauges_that_the_example_names_to_endpoint_pickers(fleet):
    provider = MeterProvider([PrometheusMetricReader()])
    try:
        fleet.polling.measure(provider.get_meter("test"))
        await fleet.report(0, queued=2, running=3, kv_tokens_capacity=100, kv_tokens_used=50)
        scraped = prometheus_client.generate_latest().decode()
    finally:
        provider.shutdown()
    found = set(re.findall(r"^# TYPE (moe_frontend_replicas_\w+) gauge$", scraped, re.MULTILINE))
    assert found == read_by_endpoint_pickers()


@given(st.binary(max_size=200), *[st.integers(0, 2**64 - 1)] * 2, *[st.integers(0, 2**32 - 1)] * 2)
def test_whatever_a_replica_reports_stays_within_bounds(junk, capacity, used, queued, running):
    load = worker_pb2.Load(kv_tokens_capacity=capacity, kv_tokens_used=used, queued=queued, running=running)
    with contextlib.suppress(Exception):
        load.MergeFromString(junk)
    found = reported(load)
    assert 0 <= found.requests <= 2**21
    assert 0 <= found.kv_tokens_used <= found.kv_tokens_capacity

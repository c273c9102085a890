"""Asking replicas and frontends over real gRPC, on loopback addresses of our own."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from moe_api.clock import ForwardClock
from moe_api.frontend.v1 import frontend_pb2, frontend_pb2_grpc
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_operator.autoscaling.model.samples import MinuteRates
from moe_operator.autoscaling.polling import Poller
from moe_operator.autoscaling.subject import subject
from moe_operator.controller.operator import in_loop
from moe_operator.observed.observation import observe
from moe_operator.rpc.pods import PodClient
from tests.operator.autoscaling.simulated import START, pod
from tests.operator.worlds import deployment


class Replica(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, silent=False, **fields):
        self.silent, self.fields = silent, fields
        self.asked = asyncio.Event()

    async def GetLoad(self, request, context):
        self.asked.set()
        if self.silent:
            await asyncio.sleep(3600)
        load = worker_pb2.Load(**self.fields)
        if not load.HasField("started"):
            load.started.FromNanoseconds(10**18)
        return load


class Front(frontend_pb2_grpc.FrontendServiceServicer):
    def __init__(self, held):
        self.held = held
        self.waited_for = asyncio.Event()
        """Somebody waits for a first request."""

    async def GetDemand(self, request, context):
        wait_s = request.wait.ToTimedelta().total_seconds()
        if not self.held and wait_s:
            self.waited_for.set()
            await asyncio.sleep(wait_s)
        return frontend_pb2.Demand(held=self.held)


def seen(leaders, frontends=(), **scaling):
    pods = []
    for rank, address in enumerate(leaders):
        made = pod("docs", rank, f"u{rank}", START, 5, ready=True)
        made["status"]["podIP"] = address
        pods.append(made)
    found = subject(deployment(scaling={"maxReplicas": 4, **scaling}), observe(pods_there=pods))
    return replace(found, frontends=tuple(frontends))


@pytest.fixture
async def client():
    made = PodClient(timeout_s=1.0)
    yield made
    await made.close()


@pytest.fixture
def poller(client):
    return Poller(client, speed=1.0, clock=lambda: 2e9)


async def test_a_silent_replica_costs_the_others_nothing(world, poller):
    kv = {"kv_tokens_capacity": 3000, "kv_tokens_used": 1000}
    good = Replica(requests_received=7, requests_completed=5, queued=2, running=1, **kv)
    leaders = await world(good, Replica(silent=True), Replica(requests_completed=1))
    started = time.monotonic()
    reading = await poller.read(seen(leaders))
    assert time.monotonic() - started < 60
    (report,) = reading.reports
    assert (report.replica, report.arrived, report.completed, report.waiting) == ("docs-0-0", 7, 5, 2)
    assert (report.started, report.at) == (1e9, 2e9)
    assert reading.silent == {"docs-1-0"}
    assert "1 requests ended although 0 arrived" in reading.wrong["docs-2-0"]
    assert reading.running == 3
    (load,) = reading.loads
    assert (load.pod, load.queued, load.running, load.kv_used_percent) == ("docs-0-0", 2, 1, 33)


async def test_nobody_there_is_silence(poller):
    reading = await poller.read(seen(["127.250.250.250"]))
    assert reading.silent == {"docs-0-0"}


async def test_held_requests_of_all_frontends_count_and_only_where_zero_is_allowed(world, poller):
    frontends = await world(Front(2), Front(3))
    both = await poller.read(seen([], frontends, minReplicas=0))
    assert both.held == 5
    assert (await poller.read(seen([], frontends, minReplicas=1))).held == 0


async def test_the_first_held_request_ends_the_wait(world, poller):
    frontends = await world(Front(0), Front(1))
    started = time.monotonic()
    assert await poller.first_held(seen([], frontends, minReplicas=0), 120.0)
    assert time.monotonic() - started < 60


async def test_without_a_request_the_wait_ends_in_time(world, poller):
    frontends = await world(Front(0))
    assert not await poller.first_held(seen([], frontends, minReplicas=0), 0.2)


async def test_a_connection_that_is_closed_during_a_call_is_silence(world, poller, client):
    replica, front = Replica(silent=True), Front(0)
    leader, frontend = await world(replica, front)
    at = seen([leader], [frontend], minReplicas=0)
    reading = asyncio.create_task(poller.read(at))
    waiting = asyncio.create_task(poller.first_held(at, 120.0))
    async with asyncio.timeout(60):
        await replica.asked.wait()
        await front.waited_for.wait()
    await client.release(at.addresses)
    assert (await asyncio.wait_for(reading, 60)).silent == {"docs-0-0"}
    assert not await asyncio.wait_for(waiting, 60)


async def test_a_thread_reads_the_active_requests_of_those_that_respond(world, client):
    """As a reconcile does, which chooses the least busy replica to delete."""
    busy, idle, hangs = await world(Replica(queued=2, running=1), Replica(), Replica(silent=True))
    active = in_loop(client.active)
    assert await asyncio.to_thread(active, [busy, idle, hangs]) == {busy: 3, idle: 0}
    assert client._channels == {}


async def test_a_cancelled_reading_ends(world, poller):
    replica = Replica(silent=True)
    reading = asyncio.create_task(poller.read(seen(await world(replica))))
    async with asyncio.timeout(60):
        await replica.asked.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_reports_stay_in_order_when_the_wall_clock_is_set_back(world, client):
    leaders, wall = await world(Replica(requests_received=7)), [2e9]
    poller, rates = Poller(client, 1.0, ForwardClock(lambda: wall[0])), MinuteRates()
    for step_s in (0.0, -3600.0, 0.0):
        wall[0] += step_s
        (report,) = (await poller.read(seen(leaders))).reports
        assert rates.observe(report) is None


async def test_one_replica_that_reports_nonsense_leaves_the_others_readable(world, poller):
    odd = Replica(started=Timestamp(seconds=2**62))
    long = Replica(time_to_first_token_seconds=worker_pb2.Histogram(counts=[2**40] * 20_000))
    leaders = await world(odd, long, Replica(requests_received=7, queued=2))
    reading = await poller.read(seen(leaders))
    assert [report.replica for report in reading.reports] == ["docs-2-0"]
    assert (list(reading.wrong), reading.silent) == (["docs-0-0"], {"docs-1-0"})

"""Health as probes and watchers see it, whatever one of them does."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moe_api import health as module
from moe_api.health import LIVENESS, Health
from moe_api.server import create_server
from tests.http2 import RawClient, answers

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
WATCH = "/grpc.health.v1.Health/Watch"


@pytest.fixture
async def served():
    """(health, port) of a server with nothing else."""
    health, server = Health(("a.B",)), create_server()
    await health.register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield health, port
    await server.stop(0)


async def test_a_watcher_that_reads_nothing_delays_neither_changes_nor_other_watchers(served, monkeypatch):
    monkeypatch.setattr(module, "WRITE_TIMEOUT_S", 600.0)
    health, port = served
    with RawClient(port, window=0) as silent:
        for service in ("", "a.B"):
            silent.call(health_pb2.HealthCheckRequest(service=service), WATCH)
        await asyncio.to_thread(silent.receive, 0.2)
        async with asyncio.timeout(60), grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == NOT_SERVING
            await health.set_ready(ready=True)
            assert (await watch.read()).status == SERVING
            await health.close()
            assert (await watch.read()).status == NOT_SERVING
            assert await watch.read() is grpc.aio.EOF


async def test_a_watcher_that_reads_nothing_is_given_up(served, monkeypatch):
    monkeypatch.setattr(module, "WRITE_TIMEOUT_S", 0.2)
    _, port = served
    with RawClient(port, window=0) as silent:
        stream = silent.call(health_pb2.HealthCheckRequest(), WATCH)
        await asyncio.to_thread(silent.receive, 1.0)
        silent.h2.increment_flow_control_window(1000, stream)
        silent.flush()
        found = answers(await asyncio.to_thread(silent.receive, 1.0))
    assert [code for _, code, _ in found if code] == [str(grpc.StatusCode.ABORTED.value[0])]


async def test_checks_name_each_service(served):
    health, port = served
    await health.set_ready(ready=True)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "a.B", LIVENESS):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="c"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="c"))
        assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        unknown.cancel()

"""The operator, probes and Prometheus have ports of their own, where clients need a key or TLS."""

import asyncio

import grpc
import pytest
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moe_api.frontend.v1 import frontend_pb2, frontend_pb2_grpc
from moe_frontend.identity import keys
from moe_frontend.identity.credentials import Authenticator
from moe_frontend.transport.service import Frontend


@pytest.fixture
async def ports(bench):
    """Addresses for clients and for the operator, of a frontend that asks clients for a key."""
    b = await bench(workers=1)
    none = keys.parse({})
    front = Frontend(b.forwarder, b.hold, authenticator=Authenticator(lambda: none))
    clients = await front.start("127.0.0.1:0", administered=False)
    admin = await front.start_admin("127.0.0.1:0")
    await front.set_ready(ready=True)
    yield f"127.0.0.1:{clients}", f"127.0.0.1:{admin}"
    await front.drain(0)


async def test_the_operator_asks_its_own_port_without_a_key(ports):
    clients, admin = ports
    async with grpc.aio.insecure_channel(admin) as channel:
        stub = frontend_pb2_grpc.FrontendServiceStub(channel)
        (route,) = (await stub.GetRoutes(frontend_pb2.GetRoutesRequest())).routes
        assert route.name == "w-0"
        demand = await stub.GetDemand(frontend_pb2.GetDemandRequest(wait=duration_pb2.Duration()))
        assert demand.held == 0
        checked = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert checked.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/moe_api.inference.v1.InferenceService/GetModel")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    async with grpc.aio.insecure_channel(clients) as channel:
        stub = frontend_pb2_grpc.FrontendServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetRoutes(frontend_pb2.GetRoutesRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_metrics_have_a_port_of_their_own(command, unused_tcp_port):
    port = unused_tcp_port
    await command(
        "--static", "127.0.0.1:9", "--hold", "5", "--http", "127.0.0.1:0", "--metrics-port", str(port)
    )
    assert b"moe_frontend" in await fetched(f"127.0.0.1:{port}")
    assert b"404 Not Found" in await fetched(command.http)


async def fetched(address):
    reader, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer

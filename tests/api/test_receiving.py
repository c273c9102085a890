"""Requests that are received and in progress hold so much together, whatever clients send."""

import asyncio
import functools
import gc
import weakref

import grpc
import h2.events
import pytest

from moe_api import requests, rich_status, transport
from moe_api.inference.v1 import inference_pb2 as pb
from moe_api.inference.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from moe_api.receiving import InProgress, NotReceivedError, Receiver
from moe_api.server import create_server
from tests.http2 import GENERATE, RawClient

MB = 2**20


async def outcome(receiving):
    try:
        return await receiving
    except NotReceivedError as error:
        return str(error)


async def never():
    await asyncio.Event().wait()


async def at_once():
    return "message"


async def test_a_few_messages_are_received_at_a_time():
    receiver, running, most = Receiver(3, contended_s=60), 0, 0

    async def read():
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1

    await asyncio.gather(*(receiver.receive(read) for _ in range(20)))
    assert most == 3


async def test_slow_messages_end_once_others_have_waited_and_not_before():
    receiver = Receiver(2, limit_s=60, contended_s=0.1)
    slow = [asyncio.create_task(outcome(receiver.receive(never))) for _ in range(5)]
    await asyncio.sleep(0)
    assert await receiver.receive(at_once) == "message"
    await asyncio.sleep(0.3)  # nobody waits now
    done = [task.result() for task in slow if task.done()]
    assert 3 <= len(done) < 5
    assert all("did not arrive in time" in sentence for sentence in done)
    for task in slow:
        task.cancel()


async def test_a_message_that_does_not_come_ends_its_call():
    assert "did not arrive in time" in await outcome(Receiver(1, limit_s=0.01).receive(never))


async def test_so_many_calls_wait():
    receiver = Receiver(1, contended_s=60, waiting=2)
    waiting = [asyncio.create_task(receiver.receive(never)) for _ in range(3)]
    await asyncio.sleep(0)
    assert "too many large requests" in await outcome(receiver.receive(at_once))
    waiting[2].cancel()
    waiting[0].cancel()
    waiting[1].cancel()
    await asyncio.wait(waiting)
    assert await receiver.receive(at_once) == "message"


def test_large_requests_leave_room_for_small_ones():
    progress = InProgress(most=10 * MB, small_only=2 * MB)
    with progress.place(8 * MB):
        with (
            pytest.raises(NotReceivedError, match="no room for one of 100000 bytes"),
            progress.place(100_000),
        ):
            pass
        with progress.place(1_000):
            pass
    with progress.place(8 * MB):
        pass


class Servicer(InferenceServiceServicer):
    """Aborts every call of Generate while it holds `held`."""

    held = None

    async def Generate(self, request, context):
        class Large:
            pass

        here = Large()
        self.held = weakref.ref(here)
        try:
            raise ValueError(here)
        except ValueError:
            await context.abort(grpc.StatusCode.NOT_FOUND, "x")
        yield

    async def Tokenize(self, request, context):
        return pb.TokenizeResponse(tokens={"ids": [len(request.text)]})


@pytest.fixture
async def serve():
    """`await serve()` starts a server; the servicer and its port."""
    servers = []

    async def start():
        servicer, server = Servicer(), create_server(transport.server_options(most_streams=1024))
        servers.append(server)
        add_InferenceServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return servicer, port

    yield start
    for server in servers:
        await server.stop(0)


async def test_a_call_that_was_aborted_holds_nothing(serve):
    servicer, port = await serve()
    gc.disable()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
                await InferenceServiceStub(channel).Generate(pb.GenerateRequest()).read()
            async with asyncio.timeout(60):
                while servicer.held() is not None:
                    await asyncio.sleep(0.001)
    finally:
        gc.enable()


async def test_a_call_without_a_request_is_told_so(serve):
    _, port = await serve()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream(GENERATE)()
        await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    (violation,) = rich_status.field_violations(rich_status.from_error(caught.value))
    assert violation.description == "the call has no request; send one message"


def windows(client):
    """The updates of streams' windows that arrive for a moment."""
    events = client.receive(0.2)
    return [e for e in events if isinstance(e, h2.events.WindowUpdated) and e.stream_id]


async def test_what_is_not_read_yet_holds_64_kib_and_no_request_waits_for_ever(serve, monkeypatch):
    """32 calls that send nothing, twice as many as there are places; then one that sends 1 MiB."""
    quick = functools.partial(Receiver, contended_s=1.0)
    monkeypatch.setattr(requests, "Receiver", quick)
    _, port = await serve()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        silent = [channel.stream_stream(GENERATE)() for _ in range(32)]
        await asyncio.gather(*(call.wait_for_connection() for call in silent))
        with RawClient(port) as client:
            stream = client.headers()
            client.h2.send_data(stream, b"\0" + MB.to_bytes(4, "big"))
            client.flush()
            assert await asyncio.to_thread(windows, client) == []
            assert client.h2.local_flow_control_window(stream) < 65_536
        stub = InferenceServiceStub(channel)
        assert (await stub.Tokenize(pb.TokenizeRequest(text="x" * MB), timeout=30)).tokens.ids == [MB]
        for call in silent:
            call.cancel()

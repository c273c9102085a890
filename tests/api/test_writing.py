"""A stream whose client does not read is given up; one that is read slowly is not."""

import asyncio
import contextlib

import grpc
import pytest
from google.protobuf import wrappers_pb2

from moe_api import rich_status
from moe_api.server import create_server
from moe_api.writing import SlowReaderError, Writer
from tests.http2 import RawClient, answers

METHOD = "/test.Streams/Count"
MESSAGES = 5
TIMEOUT_S = 0.5


@pytest.fixture
async def served():
    """The port of a server that streams MESSAGES of 64 KiB, and how its streams have ended."""
    ended = asyncio.Queue()

    async def count(request, context):
        writer = Writer(context, TIMEOUT_S)
        try:
            for number in range(MESSAGES):
                await writer.write(wrappers_pb2.StringValue(value=str(number) * 65_536))
            ended.put_nowait("all")
        except SlowReaderError as error:
            ended.put_nowait("slow")
            await rich_status.abort(context, error.status)

    handler = grpc.unary_stream_rpc_method_handler(
        count, wrappers_pb2.StringValue.FromString, wrappers_pb2.StringValue.SerializeToString
    )
    server = create_server()
    server.add_registered_method_handlers("test.Streams", {"Count": handler})
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield port, ended
    await server.stop(0)


async def test_a_client_that_opens_no_window_is_given_up_and_told_so_once_it_reads(served):
    port, ended = served
    with RawClient(port, window=0) as client:
        stream = client.call(wrappers_pb2.StringValue(), METHOD)
        assert await asyncio.wait_for(ended.get(), 60) == "slow"
        client.h2.increment_flow_control_window(10 * 65_536)
        client.h2.increment_flow_control_window(10 * 65_536, stream)
        client.flush()
        events = await asyncio.to_thread(client.receive, 0.5)
    (last,) = [answer for answer in answers(events) if answer[1] is not None]
    assert last[:2] == (stream, str(grpc.StatusCode.ABORTED.value[0]))
    assert "read nothing for 0.5 s" in last[2]


async def test_a_client_that_is_given_up_and_disconnects_leaves_no_traceback(served, caplog):
    port, ended = served
    with RawClient(port, window=0) as client:
        client.call(wrappers_pb2.StringValue(), METHOD)
        assert await asyncio.wait_for(ended.get(), 60) == "slow"
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_stream(METHOD, wrappers_pb2.StringValue.SerializeToString, len)
        assert len([size async for size in call(wrappers_pb2.StringValue())]) == MESSAGES
    assert caplog.record_tuples == []


async def test_a_client_that_reads_no_bytes_at_all_is_given_up(served):
    port, ended = served
    with contextlib.ExitStack() as clients:
        client = clients.enter_context(RawClient(port, window=2**30))
        for _ in range(20):  # more than the buffers of both sockets hold
            client.call(wrappers_pb2.StringValue(), METHOD)
        assert "slow" in [await asyncio.wait_for(ended.get(), 60) for _ in range(20)]


async def test_a_client_that_reads_slowly_gets_every_message(served):
    port, ended = served
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_stream(METHOD, wrappers_pb2.StringValue.SerializeToString, len)
        sizes = []
        async for size in call(wrappers_pb2.StringValue()):
            sizes.append(size)
            await asyncio.sleep(TIMEOUT_S / 3)
    assert len(sizes) == MESSAGES
    assert await asyncio.wait_for(ended.get(), 60) == "all"

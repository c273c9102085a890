"""The limits of a server against clients that speak HTTP/2 as no gRPC client does."""

import asyncio
import contextlib
import socket
import time

import grpc
import h2.errors
import h2.events
import pytest
from google.protobuf import wrappers_pb2

from moe_api import transport
from tests.http2 import RawClient, answers

METHOD = "/test.Echo/Echo"
CANCEL = h2.errors.ErrorCodes.CANCEL
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# Of the tests' servers, in place of minutes; what they do is the same.
SOON = {
    "grpc.server_handshake_timeout_ms": 500,
    "grpc.http2.settings_timeout": 500,
    "grpc.keepalive_time_ms": 500,
    "grpc.keepalive_timeout_ms": 500,
    "grpc.http2.ping_timeout_ms": 500,
    "grpc.max_connection_idle_ms": 1_000,
    "grpc.max_allowed_incoming_connections": 5,
}


@contextlib.asynccontextmanager
async def serving(**changed):
    """The port of a server with our options; `changed` are others, with _ for the dot."""
    options = dict(transport.SERVER_OPTIONS)
    assert changed.keys() <= options.keys(), "only what we set is tested"

    async def echo(request, context):
        await asyncio.sleep(0.01)
        return request

    handler = grpc.unary_unary_rpc_method_handler(
        echo, wrappers_pb2.StringValue.FromString, wrappers_pb2.StringValue.SerializeToString
    )
    server = grpc.aio.server(options=tuple((options | changed).items()))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Echo", {"Echo": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def call_until(port, end):
    """Calls one after the other on a connection of its own; how many, and the errors."""
    calls, errors = 0, []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        echo = channel.unary_unary(METHOD, wrappers_pb2.StringValue.SerializeToString)
        while time.monotonic() < end:
            try:
                await echo(wrappers_pb2.StringValue(value="x"), timeout=30)
            except grpc.aio.AioRpcError as error:
                errors.append((error.code(), error.details()))
            calls += 1
    return calls, errors


def reset_until(port, end):
    """Makes calls and resets them at once, as fast as it can; how many."""
    resets = 0
    with RawClient(port) as client:
        while time.monotonic() < end:
            for _ in range(100):
                client.h2.reset_stream(client.headers(METHOD), CANCEL)
            client.flush()
            client.receive(0.001)
            resets += 100
    return resets


async def test_calls_that_are_reset_at_once_cancel_no_calls_of_other_connections():
    async with serving() as port:
        end = time.monotonic() + 4
        attackers = [asyncio.to_thread(reset_until, port, end) for _ in range(4)]
        (calls, errors), *resets = await asyncio.gather(call_until(port, end), *attackers)
    assert sum(resets) > 2_000  # twice gRPC's default for calls that wait
    assert errors == []
    assert calls


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_messages_are_refused(algorithm):
    text = wrappers_pb2.StringValue(value="x" * 2**20).SerializeToString()
    async with (
        serving() as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=transport.CLIENT_OPTIONS) as plain,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", compression=algorithm) as compressing,
    ):
        assert await plain.unary_unary(METHOD)(text, timeout=30) == text
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await compressing.unary_unary(METHOD)(text, timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_metadata_of_a_long_token_is_accepted_each_time_and_more_never():
    async with serving() as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        echo = channel.unary_unary(METHOD)
        long, longer = ((("authorization", "a" * kib * 1024),) for kib in (15, 17))
        for _ in range(20):
            await echo(b"", metadata=long, timeout=30)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await echo(b"", metadata=longer, timeout=30)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_connection_has_so_many_calls_at_a_time():
    async with serving() as port:
        with RawClient(port) as client:
            await asyncio.to_thread(client.receive, 0.2)
            assert client.h2.remote_settings.max_concurrent_streams == 256


@pytest.mark.parametrize(
    "begin", [b"", b"PRI * HTTP/2.0\r\n", PREFACE], ids=["silent", "half", "no settings"]
)
async def test_a_connection_that_does_not_begin_is_closed(begin):
    async with serving(**SOON) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(begin)
            assert await asyncio.to_thread(closes, client)


async def test_a_connection_that_answers_nothing_is_closed():
    async with serving(**SOON) as port:
        with RawClient(port) as client:
            client.call(wrappers_pb2.StringValue(), METHOD)
            assert await asyncio.to_thread(closes, client.socket)


async def test_a_connection_without_calls_is_told_to_go():
    async with serving(**SOON) as port:
        with RawClient(port) as client:
            events = await asyncio.to_thread(client.receive, 10)
    assert events[-1] is None
    assert any(isinstance(event, h2.events.ConnectionTerminated) for event in events)


async def test_connections_are_bounded():
    async with serving(**SOON) as port:
        with contextlib.ExitStack() as opened:
            answered = 0
            for _ in range(20):
                client = opened.enter_context(RawClient(port))
                with contextlib.suppress(ConnectionError):
                    client.call(wrappers_pb2.StringValue(), METHOD)
                    events = await asyncio.to_thread(client.receive, 0.1)
                    answered += any(status == "0" for _, status, _ in answers(e for e in events if e))
    assert answered <= 5


def closes(connection):
    """Whether the server closes it within 10 s."""
    connection.settimeout(10)
    try:
        while connection.recv(65_536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True

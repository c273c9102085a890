"""One request for an unknown method stops no server, whatever its path is."""

import asyncio
import time

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_api.server import create_server
from tests.http2 import GENERATE, RawClient, answers


class Echo(inference_pb2_grpc.InferenceServiceServicer):
    async def Generate(self, request, context):
        yield inference_pb2.GenerateResponse(text=request.prompt)


@pytest.fixture
async def port():
    running = create_server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Echo(), running)
    port = running.add_insecure_port("127.0.0.1:0")
    await running.start()
    yield port
    await running.stop(0)


def ask(port, path):
    """The status and message that a call of a path ends with."""
    end = time.monotonic() + 30
    with RawClient(port) as client:
        client.call(inference_pb2.GenerateRequest(prompt="x"), path)
        while time.monotonic() < end:
            for _, code, message in answers(client.receive(0.05)):
                if code is not None:
                    return code, message
    raise AssertionError("the call was not answered")


PATHS = [b"/moe_api\x8f.Service/Generate", b"/\xff", b"/", b"/unknown.Service/Method", b"/" + b"x" * 4000]


@pytest.mark.parametrize("path", PATHS)
async def test_a_server_outlives_a_call_to_an_unknown_method(port, path):
    for _ in range(3):
        code, message = await asyncio.to_thread(ask, port, path)
        assert code == str(grpc.StatusCode.UNIMPLEMENTED.value[0])
        assert message.startswith("method not found")
    assert await asyncio.to_thread(ask, port, GENERATE.encode()) == ("0", "")


async def test_a_stream_under_way_goes_on(port):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        unknown = channel.unary_unary("/a.B/C", StringValue.SerializeToString)
        refused = await asyncio.gather(*(unknown(StringValue()) for _ in range(100)), return_exceptions=True)
        assert {error.code() for error in refused} == {grpc.StatusCode.UNIMPLEMENTED}
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            inference_pb2.GenerateRequest(prompt="x")
        )
        assert [part.text async for part in call] == ["x"]

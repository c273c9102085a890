"""What a client reads out of the errors that a server sends."""

import grpc
import pytest
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st

from moe_api import rich_status
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_api.rich_status import FieldViolation
from moe_api.server import create_server

GENERATE = "/moe_api.inference.v1.InferenceService/Generate"
TOKENIZE = "/moe_api.inference.v1.InferenceService/Tokenize"


class Refusing(inference_pb2_grpc.InferenceServiceServicer):
    """Answers with one status, or with an empty message."""

    def __init__(self, status=None):
        self.status = status

    async def Generate(self, request, context):
        if self.status is not None:
            await rich_status.abort(context, self.status)
        yield inference_pb2.GenerateResponse(text=request.prompt)

    async def Tokenize(self, request, context):
        if self.status is not None:
            await rich_status.abort(context, self.status)
        return inference_pb2.TokenizeResponse()

    async def GetModel(self, request, context):
        return inference_pb2.Model(name=request.model)


class WritingServicer(Refusing):
    """Streams by the other interface: a coroutine that writes."""

    async def Generate(self, request, context):
        await context.write(inference_pb2.GenerateResponse(text=request.prompt))


@pytest.fixture
async def serve():
    """Starts servers on loopback; gives a channel to each."""
    servers, channels = [], []

    async def start(servicer):
        server = create_server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        return channels[-1]

    yield start
    for channel in channels:
        await channel.close()
    for server in servers:
        await server.stop(0)


async def read_all(channel, request):
    return [r async for r in inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)]


async def failure(channel, request=None):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(channel, request or inference_pb2.GenerateRequest())
    return rich_status.from_error(caught.value)


async def test_field_violations_reach_the_client(serve):
    violations = [
        FieldViolation("sampling.top_p", "is 3; use a number in (0, 1]"),
        FieldViolation("prompt", "is empty; send at least one character"),
    ]
    status = await failure(await serve(Refusing(rich_status.invalid_argument(violations))))
    assert rich_status.status_code(status) is grpc.StatusCode.INVALID_ARGUMENT
    assert status.message == (
        "sampling.top_p: is 3; use a number in (0, 1]; prompt: is empty; send at least one character"
    )
    assert rich_status.field_violations(status) == tuple(violations)


async def test_the_retry_delay_reaches_the_client(serve):
    full = rich_status.retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", 1.5)
    status = await failure(await serve(Refusing(full)))
    assert rich_status.retry_delay(status) == 1.5
    assert rich_status.field_violations(status) == ()


@pytest.mark.parametrize("character", ["e", "é", "\N{GRINNING FACE}"])
async def test_a_sentence_that_quotes_a_huge_request_still_arrives_with_its_code(serve, character):
    violations = [FieldViolation(f"sampling.stop[{i}]", character * 100_000) for i in range(16)]
    refusal = rich_status.invalid_argument(violations)
    # gRPC drops what exceeds 8,192 bytes by chance, the more likely the larger; so measure as it does.
    assert 3 * len(refusal.message.encode()) + 4 * refusal.ByteSize() / 3 < 7168
    status = await failure(await serve(Refusing(refusal)))
    assert rich_status.status_code(status) is grpc.StatusCode.INVALID_ARGUMENT
    assert len(rich_status.field_violations(status)) == 4


async def test_a_plain_error_reads_as_a_status_without_details(serve):
    class Plain(Refusing):
        async def Generate(self, request, context):
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
            yield

    status = await failure(await serve(Plain()))
    assert (status.code, status.message, list(status.details)) == (5, "no such model", [])


def test_details_that_contradict_the_call_are_not_believed():
    lie = rich_status.build(grpc.StatusCode.OK, "all is well").SerializeToString()
    for value in (lie, b"\xff\xff not a protobuf"):
        error = grpc.aio.AioRpcError(
            grpc.StatusCode.INTERNAL,
            grpc.aio.Metadata(),
            grpc.aio.Metadata((rich_status.DETAILS_KEY, value)),
            "broken",
        )
        assert rich_status.from_error(error).message == "broken"


@given(st.floats(min_value=0, max_value=1e6))
def test_delays_survive_to_the_nanosecond(delay):
    status = rich_status.retry_later(grpc.StatusCode.UNAVAILABLE, "later", delay)
    assert rich_status.retry_delay(status) == pytest.approx(delay, abs=1e-9, rel=1e-12)


def request_with_latin1_stop():
    """A GenerateRequest whose `stop` is the byte 0xE9: valid on the wire, not valid UTF-8."""
    stop = b"\x32\x01\xe9"  # field 6, one byte
    return b"\x12\x01a" + b"\x22" + bytes([len(stop)]) + stop


@pytest.mark.parametrize("servicer", [Refusing, WritingServicer])
@pytest.mark.parametrize("data", [request_with_latin1_stop(), b"\xff\xff\xff", b"\x12\x7fshort"])
async def test_a_malformed_stream_request_is_the_callers_fault(serve, servicer, data):
    channel = await serve(servicer())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in channel.unary_stream(GENERATE)(data):
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in caught.value.details()
    assert rich_status.field_violations(rich_status.from_error(caught.value))


async def test_a_malformed_unary_request_is_the_callers_fault(serve):
    channel = await serve(Refusing())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(TOKENIZE)(b"\x12\x01\xe9")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("servicer", [Refusing, WritingServicer])
async def test_the_server_goes_on_after_a_malformed_request(serve, servicer):
    channel = await serve(servicer())
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in channel.unary_stream(GENERATE)(request_with_latin1_stop()):
            pass
    responses = await read_all(channel, inference_pb2.GenerateRequest(prompt="hallo"))
    assert [r.text for r in responses] == ["hallo"]


def test_the_malformed_example_is_what_it_says():
    """Guards the hand-made bytes above: the same fields with an ASCII stop text parse."""
    data = request_with_latin1_stop().replace(b"\xe9", b"e")
    request = inference_pb2.GenerateRequest.FromString(data)
    assert (request.prompt, list(request.sampling.stop)) == ("a", ["e"])


def test_a_reason_is_read_in_our_domain_only():
    died = rich_status.retry_later(grpc.StatusCode.UNAVAILABLE, "gone", 1.0, rich_status.ENGINE_DIED)
    assert rich_status.reason(died) == "ENGINE_DIED"
    assert rich_status.retry_delay(died) == 1.0
    foreign = error_details_pb2.ErrorInfo(reason="ENGINE_DIED", domain="example.com")
    assert rich_status.reason(rich_status.build(grpc.StatusCode.UNAVAILABLE, "gone", [foreign])) == ""
    assert rich_status.reason(rich_status.retry_later(grpc.StatusCode.UNAVAILABLE, "gone", 1.0)) == ""

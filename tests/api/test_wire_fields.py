"""Messages with absurdly many fields are refused before they are parsed; all others are as they were."""

import time

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from moe_api import rich_status
from moe_api.inference.v1 import inference_pb2 as pb
from moe_api.inference.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from moe_api.server import create_server
from moe_api.wire_fields import NotWireFormatError, crowded_field

GENERATE = pb.GenerateRequest.DESCRIPTOR
LARGEST = pb.GenerateRequest(
    prompt_tokens={"ids": range(200_000)},
    sampling={
        "stop": ["x" * 256] * 16,
        "stop_token_ids": range(64),
        "logit_bias": dict.fromkeys(range(1024), 1.0),
    },
    resume={"tokens": range(100_000)},
)
HUGE = {
    "stop texts": pb.GenerateRequest(sampling={"stop": [""] * 1_000_000}),
    "biases": pb.GenerateRequest(sampling={"logit_bias": dict.fromkeys(range(300_000), 1.0)}),
    "samplings": b"\x22\x00" * 1_000_000,
    "unknown fields": b"\x98\x06\x01" * 1_000_000,
}
FIELDS = {
    "stop texts": "sampling.stop",
    "biases": "sampling.logit_bias",
    "samplings": "sampling",
    "unknown fields": "",
}


def encoded(message):
    return message if isinstance(message, bytes) else message.SerializeToString()


@pytest.mark.parametrize("what", HUGE)
def test_counting_ends_at_its_bound(what):
    data, started = encoded(HUGE[what]), time.process_time()
    assert crowded_field(data, GENERATE) == FIELDS[what]
    assert time.process_time() - started < 0.5


def test_the_largest_valid_request_is_not_too_large():
    assert crowded_field(LARGEST.SerializeToString(), GENERATE) is None


@given(st.binary(max_size=200))
def test_nothing_that_the_parser_takes_is_refused_but_groups(data):
    try:
        pb.GenerateRequest.FromString(data)
    except DecodeError:
        return
    try:
        assert crowded_field(data, GENERATE) is None
    except NotWireFormatError as error:
        if not str(error).startswith("wire type"):
            raise


@given(st.lists(st.text(max_size=5), max_size=30), st.integers(0, 40))
def test_every_element_counts(texts, most):
    request = pb.GenerateRequest(sampling={"stop": texts})
    crowded = crowded_field(request.SerializeToString(), GENERATE, most)
    assert (crowded is not None) == (len(texts) + 1 > most)


class Echo(InferenceServiceServicer):
    async def Generate(self, request, context):
        yield pb.GenerateResponse(tokens=[len(request.sampling.stop)])


@pytest.mark.parametrize("what", HUGE)
async def test_a_server_refuses_them_with_a_sentence(what):
    server = create_server()
    add_InferenceServiceServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_stream("/moe_api.inference.v1.InferenceService/Generate")(encoded(HUGE[what]))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        (violation,) = rich_status.field_violations(rich_status.from_error(raised.value))
        assert "more than 4,096 fields" in violation.description
        assert violation.field == FIELDS[what]
        stub = InferenceServiceStub(channel)
        assert [part.tokens async for part in stub.Generate(LARGEST)] == [[16]]
    await server.stop(0)

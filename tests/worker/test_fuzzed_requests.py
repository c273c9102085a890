"""Whatever a client sends to a running worker, it gets text or the status that names its mistake."""

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_api import rich_status
from moe_api.inference.v1 import inference_pb2
from tests.worker.messages import INPUTS, SAMPLINGS
from tests.worker.serving import DEADLINE_S, Worker

FUZZED = settings(deadline=None, max_examples=150)
MISTAKES = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


@pytest.fixture(scope="module")
def sturdy(endless):
    """A worker that must be as it was once all have tried."""
    with Worker(endless, "--context-length", "128") as worker:
        worker.wait_ready()
        yield worker
        worker.wait_load(running=0, queued=0)
        assert list(worker.generate("x", max_tokens=9))[-1].usage.completion_tokens == 9
        assert worker.process.poll() is None
        assert not [line for line in worker.lines if "Traceback" in line]


def first_answer(call):
    """The first response of a call, which is given up then; or its error."""
    try:
        return next(iter(call))
    except grpc.RpcError as error:
        return error
    finally:
        call.cancel()


def check(answer, request):
    """A refusal has one of the statuses of MISTAKES and, for a wrong field, its name and a sentence."""
    if isinstance(answer, inference_pb2.GenerateResponse):
        assert answer.tokens
        return
    assert answer.code() in MISTAKES, answer.details()
    if answer.code() is grpc.StatusCode.NOT_FOUND:
        assert request.model not in ("", "tiny")
        return
    violations = rich_status.field_violations(rich_status.from_error(answer))
    assert violations
    assert all(violation.field and violation.description for violation in violations)


@FUZZED
@given(model=st.sampled_from(["", "tiny", "another"]), given_input=INPUTS, sampling=SAMPLINGS)
def test_any_message_is_answered_or_refused_by_name(sturdy, model, given_input, sampling):
    request = inference_pb2.GenerateRequest(model=model, **given_input, sampling=sampling)
    check(first_answer(sturdy.inference.Generate(request, timeout=DEADLINE_S)), request)


def damaged(content, position, byte):
    """`content` with one byte changed."""
    at = position % len(content)
    return content[:at] + bytes([byte]) + content[at + 1 :]


BYTES = st.binary(max_size=120) | st.builds(
    damaged,
    st.builds(
        lambda given, sampling: inference_pb2.GenerateRequest(**given, sampling=sampling), INPUTS, SAMPLINGS
    )
    .map(inference_pb2.GenerateRequest.SerializeToString)
    .filter(bool),
    st.integers(0, 1000),
    st.integers(0, 255),
)


@FUZZED
@given(BYTES)
def test_any_bytes_are_answered_or_refused(sturdy, content):
    call = sturdy.channel.unary_stream(
        "/moe_api.inference.v1.InferenceService/Generate",
        response_deserializer=inference_pb2.GenerateResponse.FromString,
    )
    answer = first_answer(call(content, timeout=DEADLINE_S))
    try:
        request = inference_pb2.GenerateRequest.FromString(content)
    except DecodeError:
        assert answer.code() is grpc.StatusCode.INVALID_ARGUMENT
    else:
        check(answer, request)

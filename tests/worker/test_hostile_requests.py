"""What one client sends or does not read must not hold up the others of a worker."""

import subprocess
import threading
import time

import grpc
import pytest

from moe_api import rich_status
from moe_api.inference.v1 import inference_pb2
from moe_api.worker.v1 import worker_pb2
from tests.http2 import RawClient
from tests.worker.serving import DEADLINE_S, Worker, refused

# 0.1 s on an idle core, and more where processes wait for one; the same requests took 13 to 78 s.
AT_ONCE_S = 8
MIB = 2**20
PLACES = 4


@pytest.fixture(scope="module")
def guarded(endless):
    """2 sequences at once, 2 more in the queue; streams that nobody reads end after 2 s."""
    flags = ("--max-batch-size", "2", "--max-queue", "2", "--write-timeout", "2", "--grace", "3")
    with Worker(endless, *flags) as worker:
        worker.wait_ready()
        yield worker


def request(**fields):
    return inference_pb2.GenerateRequest(**fields)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": "x", "sampling": {"stop": [""] * (MIB // 3)}}, "sampling.stop"),
        ({"prompt": "x", "sampling": {"stop_token_ids": [1] * (MIB // 2)}}, "sampling.stop_token_ids"),
        (
            {"prompt": "x", "sampling": {"logit_bias": dict.fromkeys(range(70_000), 1)}},
            "sampling.logit_bias",
        ),
        ({"prompt_tokens": {"ids": [1] * (MIB // 2)}}, "prompt_tokens"),
        ({"prompt": "x", "resume": {"tokens": [1] * (MIB // 2)}}, "resume.tokens"),
        ({"prompt": "xyz !?" * (MIB // 8)}, "prompt"),
    ],
)
def test_what_is_too_long_is_refused_by_its_length_while_others_are_answered(guarded, fields, field):
    message, slowest, done = request(**fields), [0.0], threading.Event()

    def ask():
        while not done.is_set():
            begin = time.monotonic()
            guarded.load.GetLoad(worker_pb2.GetLoadRequest(), timeout=DEADLINE_S)
            slowest[0] = max(slowest[0], time.monotonic() - begin)

    asking = threading.Thread(target=ask)
    asking.start()
    begin = time.monotonic()
    error = refused(guarded.inference.Generate(message, timeout=DEADLINE_S))
    took = time.monotonic() - begin
    done.set()
    asking.join()
    [violation] = rich_status.field_violations(rich_status.from_error(error))
    assert (error.code(), violation.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert max(took, slowest[0]) < AT_ONCE_S


def test_a_message_that_no_valid_request_needs_is_not_received(guarded):
    text = "x" * 15_000_000
    generate = guarded.inference.Generate(request(prompt=text), timeout=DEADLINE_S)
    tokenize = guarded.inference.Tokenize.future(inference_pb2.TokenizeRequest(text=text), timeout=DEADLINE_S)
    for error in (refused(generate), tokenize.exception()):
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in error.details()


def test_a_text_of_too_many_tokens_is_not_tokenized(guarded):
    with pytest.raises(grpc.RpcError) as raised:
        guarded.inference.Tokenize(
            inference_pb2.TokenizeRequest(text="xyz !?" * (MIB // 8)), timeout=DEADLINE_S
        )
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def stalled(worker, calls):
    """A connection that opens no window, with so many requests on it."""
    client = RawClient(worker.port, window=0)
    for _ in range(calls):
        client.call(request(prompt="x", sampling={"max_tokens": 3}))
    return client


def test_streams_that_nobody_reads_count_as_load_and_end(guarded):
    with stalled(guarded, PLACES):
        guarded.wait_load(running=PLACES, queued=0)
        assert refused(guarded.generate()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        guarded.wait_load(running=0)
        assert list(guarded.generate(max_tokens=2))[-1].usage.completion_tokens == 2


def test_a_terminating_worker_hands_off_what_is_not_read_in_time(endless):
    with Worker(endless, "--max-batch-size", "2", "--grace", "2") as worker:
        worker.wait_ready()
        reading = worker.generate(max_tokens=4000, ignore_eos=True)
        next(reading)
        with stalled(worker, 1):
            worker.wait_load(running=2)
            worker.terminate()
            begin = time.monotonic()
            error = refused(reading)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert rich_status.reason(rich_status.from_error(error)) == ""
            try:
                assert worker.process.wait(DEADLINE_S) == 0
            except subprocess.TimeoutExpired:
                pytest.fail("the worker did not end")
            assert time.monotonic() - begin < 2 + 60

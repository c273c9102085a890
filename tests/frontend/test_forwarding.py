"""What clients see of a frontend with workers behind it, over real connections."""

import asyncio
import collections
import dataclasses
import time

import grpc
import pytest
from opentelemetry import trace

from moe_api import rich_status, semconv, telemetry
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_frontend.discovery.endpoints import Endpoint
from moe_frontend.policy import routing
from moe_frontend.transport import attempts, bounds, metadata
from tests.frontend.fake_worker import FakeWorker
from tests.http2 import RawClient, answers


async def failure(call):
    """Reads a stream to its error; gives the messages before it, and the error."""
    messages = []
    try:
        async for message in call:
            messages.append(message)
    except grpc.aio.AioRpcError as error:
        return messages, error
    raise AssertionError("the call succeeded")


async def test_an_answer_arrives_as_the_worker_sent_it(bench):
    b = await bench(workers=1)
    responses = [r async for r in b.generate("count 3")]
    assert [r.text for r in responses] == ["w-0:0 ", "w-0:1 ", "w-0:2 ", ""]
    assert responses[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert responses[-1].usage == inference_pb2.Usage(prompt_tokens=3, completion_tokens=3)


async def test_unary_calls_pass_through(bench):
    b = await bench(workers=1)
    tokens = await b.stub.Tokenize(inference_pb2.TokenizeRequest(text="né"))
    assert list(tokens.tokens.ids) == list("né".encode())
    assert (await b.stub.GetModel(inference_pb2.GetModelRequest())).name == "w-0"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await b.stub.GetModel(inference_pb2.GetModelRequest(model="other"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "no model of that name; this is m"


async def test_text_arrives_while_the_worker_still_generates(bench):
    b = await bench(workers=1)
    call = b.generate("hold")
    assert (await call.read()).text == "first "
    assert b.workers[0].running == 1
    call.cancel()


async def test_requests_go_where_fewest_run(bench):
    b = await bench(workers=3)
    holds = [b.generate("hold") for _ in range(9)]
    for call in holds:
        await call.read()
    assert [w.running for w in b.workers] == [3, 3, 3]
    for call in holds:
        call.cancel()


async def test_idle_replicas_take_turns(bench):
    b = await bench(workers=3)
    for _ in range(9):
        await b.text("count 1")
    assert [w.requests for w in b.workers] == [3, 3, 3]


async def test_512_streams_run_at_once(bench):
    b = await bench(workers=2)
    # Each worker begins to answer when 256 requests run on it: fewer would never end.
    answers = await asyncio.gather(*(b.text("together 256") for _ in range(512)))
    assert collections.Counter(answers) == {"w-0 ": 256, "w-1 ": 256}


async def test_errors_pass_through_with_their_details(bench):
    b = await bench(workers=2)
    _, bad = await failure(b.generate("bad"))
    assert bad.code() is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = rich_status.field_violations(rich_status.from_error(bad))
    assert violation.field == "sampling.top_p"
    assert sum(w.requests for w in b.workers) == 1, "it would be as wrong elsewhere"


async def test_a_full_replica_is_passed_over_before_the_first_token(bench):
    b = await bench(workers=3)
    b.workers[0].full = b.workers[1].full = True
    assert [await b.text("count 1") for _ in range(6)] == ["w-2:0 "] * 6


async def test_where_all_replicas_are_full_the_client_hears_at_once_when_to_come_back(bench):
    b = await bench(workers=2, patience_s=60)
    started = time.monotonic()
    _, full = await failure(b.generate("full"))
    assert time.monotonic() - started < 30, "a client that is told when to come back need not wait here"
    assert full.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert rich_status.retry_delay(rich_status.from_error(full)) == 2.5
    assert [w.requests for w in b.workers] == [1, 1]


async def test_a_worker_that_still_loads_is_passed_over_and_its_sentence_kept(bench):
    b = await bench(workers=2)
    _, error = await failure(b.generate("loading"))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == "the model is still loading"
    assert rich_status.retry_delay(rich_status.from_error(error)) == 4.0
    assert sum(w.requests for w in b.workers) == routing.MAX_ATTEMPTS


async def test_a_bug_in_a_worker_is_not_hidden(bench):
    b = await bench(workers=2)
    _, error = await failure(b.generate("crash"))
    assert error.code() is grpc.StatusCode.UNKNOWN
    assert "a bug" in error.details()


async def test_a_client_that_goes_away_frees_the_worker_at_once(bench):
    b = await bench(workers=1)
    for prompt in ("hold", "silent"):
        call = b.generate(prompt)
        await b.workers[0].until(lambda w: w.running == 1)
        call.cancel()
        await b.workers[0].until(lambda w: w.running == 0)
    assert b.workers[0].cancelled == 2
    assert await b.text("count 1") == "w-0:0 "


async def test_deadlines_reach_the_worker_and_end_the_call(bench):
    b = await bench(workers=1)
    _, error = await failure(b.generate("hold", timeout=2))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await b.workers[0].until(lambda w: w.running == 0)
    assert 0 < b.workers[0].deadlines[0] < 2.01
    await asyncio.wait_for(_finished(b), 60)
    (span,) = b.spans.get_finished_spans()
    assert span.attributes[semconv.RPC_RESPONSE_STATUS_CODE] == "DEADLINE_EXCEEDED"


async def statuses(client, number):
    """The gRPC statuses of so many calls."""
    events = []
    async with asyncio.timeout(60):
        while len(found := [status for _, status, _ in answers(events) if status]) < number:
            events += await asyncio.to_thread(client.receive, 0.1)
    return found


async def test_a_deadline_of_centuries_is_none_too_many(bench):
    b = await bench(workers=1)
    with RawClient(int(b.address.rpartition(":")[2])) as client:
        client.call(inference_pb2.GenerateRequest(prompt="count 1"), more=[("grpc-timeout", "2562047H")])
        await b.workers[0].until(lambda w: w.sent == 2)
        assert await statuses(client, 1) == ["0"]
    assert 300 * 86_400 < b.workers[0].deadlines[0] <= 366 * 86_400, "gRPC rounds it up to hours"


async def test_metadata_that_grpc_cannot_carry_as_text_are_dropped(bench):
    b = await bench(workers=1)
    with RawClient(int(b.address.rpartition(":")[2])) as client:
        for value in (b"caf\xc3\xa9", b"\xff\xfe", b"a\x7f", b"tab\there"):
            client.call(inference_pb2.GenerateRequest(prompt="count 1"), more=[("x-request-id", value)])
        await b.workers[0].until(lambda w: w.sent == 8)
        assert await statuses(client, 4) == ["0"] * 4
    assert not any("x-request-id" in seen for seen in b.workers[0].metadata)


async def test_only_named_metadata_reach_the_worker_and_come_back(bench):
    b = await bench(workers=1, keys=metadata.parse_keys("x-tenant, X-Key-bin"))
    sent = (("x-tenant", "a"), ("x-key-bin", b"\x00\xff"), ("authorization", "Bearer s"), ("x-other", "b"))
    call = b.generate("count 1", metadata=sent)
    assert len([response async for response in call]) == 2
    seen = b.workers[0].metadata[0]
    assert (seen["x-tenant"], seen["x-key-bin"]) == ("a", b"\x00\xff")
    assert not {"authorization", "x-other"} & seen.keys()
    assert dict(await call.trailing_metadata()) == {"x-tenant": "w-0"}


@pytest.mark.parametrize("key", ["authorization", "Cookie", "grpc-timeout", "traceparent", "x tenant"])
def test_some_keys_cannot_be_named(key):
    with pytest.raises(ValueError, match=key.lower()):
        metadata.parse_keys(f"x-tenant,{key}")


async def test_a_slow_reader_holds_the_worker_back(bench):
    b = await bench(workers=1)
    call = b.generate("flood 2000")  # 125 MiB in all
    await call.read()
    # The worker stops when the windows on both ways are full: wait until it sends no more.
    sent = -1
    while sent != b.workers[0].sent:
        sent = b.workers[0].sent
        await asyncio.sleep(0.2)
    assert sent < 1000, "windows grow with the speed of the machine, to some 30 MiB; all would be 125"
    call.cancel()


async def test_a_client_that_never_reads_does_not_keep_a_worker(bench):
    b = await bench(workers=1, write_timeout_s=0.5)
    with RawClient(int(b.address.rpartition(":")[2]), window=0) as client:
        for _ in range(20):
            client.call(inference_pb2.GenerateRequest(prompt="count 1000000"))
        await b.workers[0].until(lambda w: w.requests == 20)
        await b.workers[0].until(lambda w: w.running == 0)
        assert [running for _, running in b.replicas.routes()] == [0]
        assert await b.text("count 1") == "w-0:0 ", "an honest client at the same time"


async def test_a_malformed_request_is_the_callers_fault(bench):
    b = await bench(workers=1)
    method = "/moe_api.inference.v1.InferenceService/Generate"
    _, error = await failure(b.channel.unary_stream(method)(b"\x22\x03\x32\x01\xe9"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in error.details()
    assert b.workers[0].requests == 0


async def test_without_a_worker_the_answer_says_so(bench):
    b = await bench(workers=0)
    _, error = await failure(b.generate("count 1"))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details().startswith("demo has no ready replica")
    assert rich_status.retry_delay(rich_status.from_error(error)) == 1.0


async def test_an_unreachable_replica_costs_a_retry_and_no_error(bench):
    b = await bench(workers=1)
    b.extra = frozenset({Endpoint("gone-0", "127.0.0.1:1")})
    await b.publish()
    answers = [await b.text("count 1") for _ in range(10)]
    assert answers == ["w-0:0 "] * 10


async def test_when_no_replica_can_be_reached_the_answer_names_one(bench):
    b = await bench(workers=0)
    b.extra = frozenset({Endpoint("gone-0", "127.0.0.1:1")})
    await b.publish()
    started = time.monotonic()
    _, error = await failure(b.generate("count 1"))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details().startswith("replica gone-0 cannot be reached")
    assert time.monotonic() - started < 30


async def test_a_retry_after_the_deadline_is_not_begun(bench):
    b = await bench(workers=1)
    b.extra = frozenset({Endpoint("gone-0", "127.0.0.1:1"), Endpoint("gone-1", "127.0.0.1:2")})
    await b.publish()
    started = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError):
        await b.text("silent", timeout=0.3)
    assert time.monotonic() - started < 30


async def test_requests_on_a_replica_that_leaves_run_to_their_end(bench):
    b = await bench(workers=2)
    call = b.generate("count 5 0.1")
    first = (await call.read()).text
    name = first.split(":")[0]
    b.replicas.update(frozenset(w.endpoint for w in b.workers if w.name != name))
    rest = [r.text async for r in _rest(call)]
    assert rest[:4] == [f"{name}:{i} " for i in range(1, 5)]
    assert not (await b.text("count 1")).startswith(name)


async def _rest(call):
    while (message := await call.read()) is not grpc.aio.EOF:
        yield message


async def test_the_trace_says_where_the_request_went_and_why(bench):
    b = await bench(workers=1)
    b.extra = frozenset({Endpoint("gone-0", "127.0.0.1:1")})
    await b.publish()
    for _ in range(2):  # one of the two meets the dead replica first
        client = b.tracer.start_span("client")
        metadata = telemetry.inject((), trace.set_span_in_context(client))
        await b.text("count 1", metadata=metadata)
        client.end()
        span = next(s for s in b.spans.get_finished_spans() if s.kind is trace.SpanKind.SERVER)
        if len(span.events) == 2:
            break
        b.spans.clear()
    assert span.name == "moe_api.inference.v1.InferenceService/Generate"
    assert span.parent.span_id == client.get_span_context().span_id
    assert span.attributes[semconv.RPC_METHOD] == span.name
    assert span.attributes[semconv.RPC_RESPONSE_STATUS_CODE] == "OK"
    assert [e.attributes[attempts.ROUTING_REPLICA] for e in span.events] == ["gone-0", "w-0"]
    assert span.attributes[attempts.ROUTING_REPLICA] == "w-0"
    assert span.attributes[attempts.ROUTING_ATTEMPT] == 2
    assert span.events[0].attributes[attempts.ROUTING_CANDIDATES] == 2
    sent = b.workers[0].metadata[-1]["traceparent"]
    assert sent.startswith(f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-")


@pytest.mark.parametrize(
    ("prompt", "code", "failed"),
    [
        ("bad", "INVALID_ARGUMENT", False),
        ("full", "RESOURCE_EXHAUSTED", False),
        ("loading", "UNAVAILABLE", True),
    ],
)
async def test_the_span_carries_the_status(bench, prompt, code, failed):
    b = await bench(workers=1)
    await failure(b.generate(prompt))
    await asyncio.wait_for(_finished(b), 60)
    (span,) = b.spans.get_finished_spans()
    assert span.attributes[semconv.RPC_RESPONSE_STATUS_CODE] == code
    assert (span.status.status_code is trace.StatusCode.ERROR) == failed


async def test_the_span_of_a_cancelled_call_ends_too(bench):
    b = await bench(workers=1)
    call = b.generate("hold")
    await call.read()
    call.cancel()
    await asyncio.wait_for(_finished(b), 60)
    (span,) = b.spans.get_finished_spans()
    assert span.attributes[semconv.RPC_RESPONSE_STATUS_CODE] == "CANCELLED"


async def _finished(b):
    while not b.spans.get_finished_spans():
        await asyncio.sleep(0.01)


async def test_a_storm_of_cancellations_leaves_nothing_behind(bench, caplog):
    b = await bench(workers=2)

    async def use(number):
        call = b.generate(("count 20 0.01", "hold", "silent", "flood 50")[number % 4])
        await asyncio.sleep(number % 7 * 0.02)
        call.cancel()

    for _ in range(3):
        await asyncio.gather(*(use(number) for number in range(100)))
    for worker in b.workers:
        await worker.until(lambda w: w.running == 0)
    assert await asyncio.gather(*(b.text("count 1") for _ in range(4)))
    assert [replica.load.in_flight for replica in b.replicas._ready.values()] == [0, 0]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


TOO_LONG = {
    "sampling.stop": inference_pb2.GenerateRequest(
        prompt="p", sampling=inference_pb2.SamplingParameters(stop=[""] * 2_000)
    ),
    "sampling.stop_token_ids": inference_pb2.GenerateRequest(
        prompt="p", sampling=inference_pb2.SamplingParameters(stop_token_ids=[1] * 65)
    ),
    "sampling.logit_bias": inference_pb2.GenerateRequest(
        prompt="p", sampling=inference_pb2.SamplingParameters(logit_bias=dict.fromkeys(range(1025), 0.0))
    ),
    "resume.tokens": inference_pb2.GenerateRequest(
        prompt="p",
        sampling=inference_pb2.SamplingParameters(max_tokens=5),
        resume=inference_pb2.Resume(tokens=[1] * 5),
    ),
    "prompt": inference_pb2.GenerateRequest(prompt="x" * 32_761),
    "model": inference_pb2.GenerateRequest(model="m" * 254, prompt="p"),
    "prompt_tokens": inference_pb2.GenerateRequest(prompt_tokens=inference_pb2.TokenIds(ids=[1] * 1_000_000)),
    "resume.revision": inference_pb2.GenerateRequest(
        prompt="p", resume=inference_pb2.Resume(revision="r" * 300)
    ),
}


@pytest.mark.parametrize("field", TOO_LONG)
async def test_what_is_too_long_to_be_valid_is_refused_by_its_length(bench, field):
    b = await bench(workers=1)
    b.replicas.update(
        frozenset({dataclasses.replace(b.workers[0].endpoint, context_length=4096, characters_per_token=8)})
    )
    _, error = await failure(b.stub.Generate(TOO_LONG[field]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = rich_status.field_violations(rich_status.from_error(error))
    assert violation.field == field
    assert b.workers[0].requests == 0


@pytest.mark.parametrize("call", ["Tokenize", "Generate"])
async def test_a_text_that_waited_for_its_replica_is_refused_by_its_length_then(bench, call):
    b = await bench(workers=1, hold_s=30)
    replica = dataclasses.replace(b.workers[0].endpoint, context_length=100, characters_per_token=8)
    b.replicas.update(frozenset())
    await b.frontend.set_ready(ready=False)
    waiting = asyncio.ensure_future(refused(CALLS[call](b.stub, "x" * 801)))
    async with asyncio.timeout(60):
        while not b.hold.held:
            await asyncio.sleep(0.01)
    b.replicas.update(frozenset({replica}))
    await b.frontend.set_ready(ready=True)
    error = await waiting
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "has 801 characters" in error.details()
    assert b.workers[0].requests == 0


async def refused(answer):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer
    return caught.value


CALLS = {
    "Generate": lambda stub, text: stub.Generate(inference_pb2.GenerateRequest(prompt=text)).read(),
    "Tokenize": lambda stub, text: stub.Tokenize(inference_pb2.TokenizeRequest(text=text)),
}


@pytest.mark.parametrize("limits", [(0, 8), (4096, 0)])
async def test_a_text_passes_where_its_bound_is_not_known(bench, limits):
    b = await bench(workers=1)
    length, per_token = limits
    known = dataclasses.replace(b.workers[0].endpoint, context_length=length, characters_per_token=per_token)
    b.replicas.update(frozenset({known}))
    assert await b.text("count" + " " * 40_000 + "1") == "w-0:0 "


def test_the_check_reads_lengths_only():
    started = time.thread_time()
    for request in TOO_LONG.values():
        assert bounds.violations(request, bounds.Limits(4096, 8))
    assert time.thread_time() - started < 0.05


async def test_a_request_that_a_worker_does_not_take_for_its_size_is_sent_once(bench):
    b = await bench(workers=0)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 10_000)])
    worker = FakeWorker("small")
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(worker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    b.extra = frozenset({Endpoint("small", f"127.0.0.1:{port}")})
    await b.publish()
    _, error = await failure(b.generate("x" * 20_000))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "too large" in error.details()
    assert len([s for s in b.spans.get_finished_spans() if len(s.events) > 1]) == 0
    await server.stop(None)

"""The worker as its clients see it: a real process, over gRPC."""

import os
import signal
import statistics
import subprocess
import sys
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import moe_worker
from moe_api import rich_status
from moe_api.clock import Anchor
from moe_api.inference.v1 import inference_pb2
from moe_api.prefixes import names_of
from moe_api.tenancy import Tenancy
from moe_api.worker.v1 import worker_pb2
from moe_worker.engine.requests import Delta, FinishReason
from moe_worker.errors import EngineDiedError
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.service.streams import Stream, Timeline
from tests.worker.serving import DEADLINE_S, Worker, endless_loading, refused, wait_gone

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# Takes seconds: long enough for whatever a test does meanwhile.
LONG = {"max_tokens": 4000}


@pytest.fixture
def own_worker(endless):
    """A worker for a test that ends it."""
    with Worker(endless) as worker:
        worker.wait_ready()
        yield worker


def test_a_stream_is_what_the_library_generates(worker, engine):
    responses = list(worker.generate("the quick", max_tokens=50))
    [expected] = engine.generate("the quick", SamplingParameters(max_tokens=50))
    assert "".join(response.text for response in responses) == expected.text
    assert [token for response in responses for token in response.tokens] == expected.token_ids
    assert [response.finish_reason for response in responses[:-1]] == [0] * (len(responses) - 1)
    assert responses[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH
    usage = responses[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.prompt_tokens, 50)
    assert len(responses) > 5


def test_tenants_share_no_prefix_and_get_the_same_tokens(worker):
    """Cached tokens are told to the client, and tell by their time what others sent."""
    prompt = "a prompt of some length that two tenants send, one after the other, to the same worker"

    def ask(**tenancy):
        metadata = Tenancy(**tenancy).metadata()
        parts = list(worker.generate(prompt, max_tokens=8, temperature=1.0, seed=3, metadata=metadata))
        return [token for part in parts for token in part.tokens], parts[-1].usage.cached_tokens

    first, cold = ask(tenant="a", salt="aa", weight=3, priority=2)
    again, warm = ask(tenant="a", salt="aa", weight=3)
    other, colder = ask(tenant="b", salt="bb")
    assert first == again == other
    assert (cold, warm > 0, colder) == (0, True, 0)


def test_malformed_metadata_of_a_frontend_and_a_priority_out_of_range_are_refused(worker):
    error = refused(worker.generate(metadata=[("x-moe-weight", "0")]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "x-moe-weight: is malformed; send it once, as a whole number from 1 to 1000" in error.details()
    request = inference_pb2.GenerateRequest(prompt="a", priority=10)
    error = refused(worker.inference.Generate(request))
    assert "priority: is 10; use 0 to 9" in error.details()


def test_token_ids_and_sampling_give_what_the_library_gives(worker, engine):
    sampling = {"max_tokens": 30, "temperature": 0.5, "top_p": 0.75, "top_k": 40, "seed": 2**63 + 1}
    request = inference_pb2.GenerateRequest(
        prompt_tokens=inference_pb2.TokenIds(ids=[5, 6, 7]),
        sampling=inference_pb2.SamplingParameters(**sampling),
    )
    tokens = [token for response in worker.inference.Generate(request) for token in response.tokens]
    [expected] = engine.generate([5, 6, 7], SamplingParameters(**sampling))
    assert tokens == expected.token_ids


def test_a_stop_text_ends_the_stream(worker, engine):
    [free] = engine.generate("hello", SamplingParameters(max_tokens=40))
    stop = free.text[10:13]
    responses = list(worker.generate("hello", max_tokens=40, stop=[stop]))
    assert "".join(response.text for response in responses) == free.text[: free.text.index(stop)]
    assert responses[-1].finish_reason == inference_pb2.FINISH_REASON_STOP


def test_model_and_tokens(worker, engine):
    model = worker.inference.GetModel(inference_pb2.GetModelRequest(model="tiny"))
    assert (model.name, model.architecture, model.format) == ("tiny", "deepseek_v3", "fp32")
    assert (model.context_length, model.vocabulary_size) == (4096, 320)
    assert model.parameters_total == engine.config.parameters_total > model.parameters_active
    for special in (False, True):
        request = inference_pb2.TokenizeRequest(text="naïve 🙂", add_special_tokens=special)
        ids = worker.inference.Tokenize(request).tokens.ids
        assert list(ids) == engine.tokenizer.encode("naïve 🙂", add_special_tokens=special)


def test_reflection_lists_the_services(worker):
    stub = reflection_pb2_grpc.ServerReflectionStub(worker.channel)
    [answer] = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in answer.list_services_response.service}
    assert {"moe_api.inference.v1.InferenceService", "moe_api.worker.v1.WorkerService"} <= names


@pytest.mark.parametrize(
    ("fields", "violated", "sentence"),
    [
        ({}, "prompt", "set either prompt or prompt_tokens"),
        ({"prompt": ""}, "prompt", "is empty"),
        ({"prompt_tokens": {}}, "prompt_tokens", "is empty"),
        ({"prompt": "x" * 5000}, "prompt", "has 5001 tokens; use 4095 at most"),
        ({"prompt_tokens": {"ids": [1, 320]}}, "prompt_tokens", "token id 320; ids are 0 to 319"),
        ({"prompt": "x", "sampling": {"max_tokens": 0}}, "sampling.max_tokens", "is 0; use 1 or more"),
        ({"prompt": "x", "sampling": {"temperature": 3}}, "sampling.temperature", "is 3; use 0 to 2"),
        ({"prompt": "x", "sampling": {"top_p": float("nan")}}, "sampling.top_p", "not a number"),
        ({"prompt": "x", "sampling": {"stop": ["a", ""]}}, "sampling.stop[1]", "takes 0 bytes; use 1 to 256"),
    ],
)
def test_a_field_out_of_range_is_named(worker, fields, violated, sentence):
    error = refused(worker.inference.Generate(inference_pb2.GenerateRequest(**fields)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    [violation] = rich_status.field_violations(rich_status.from_error(error))
    assert violation.field == violated
    assert sentence in violation.description


def test_all_wrong_fields_are_named_at_once(worker):
    error = refused(worker.generate("", max_tokens=0, top_p=2))
    violations = rich_status.field_violations(rich_status.from_error(error))
    assert [violation.field for violation in violations] == [
        "prompt",
        "sampling.max_tokens",
        "sampling.top_p",
    ]


def test_another_model_is_not_found(worker):
    error = refused(worker.inference.Generate(inference_pb2.GenerateRequest(model="big", prompt="x")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "ask for 'tiny'" in error.details()


def test_text_that_is_not_utf8_is_refused(worker):
    """Field 4 (sampling), in it field 6 (stop): two bytes that are no UTF-8."""
    call = worker.channel.unary_stream("/moe_api.inference.v1.InferenceService/Generate")
    error = refused(call(b'\x12\x01x"\x04\x32\x02\xff\xfe'))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_full_queue_says_when_to_try_again_and_serves_on(worker):
    calls = [worker.generate(**LONG) for _ in range(4)]
    worker.wait_load(running=2, queued=2)
    error = refused(worker.generate())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert rich_status.retry_delay(rich_status.from_error(error)) > 0
    for call in calls:
        call.cancel()
    worker.wait_load(running=0, queued=0, kv_tokens_used=0)
    assert list(worker.generate(max_tokens=3))[-1].usage.completion_tokens == 3


def test_kv_memory_for_one_context_still_runs_a_batch(endless):
    """Pages are taken as texts grow: four requests begin at once where four contexts would not fit."""
    one_context = str(4096 * 3 * (16 + 8) * 4)
    flags = ("--kv-memory", one_context, "--max-batch-size", "4", "--max-queue", "1")
    with Worker(endless, *flags) as worker:
        worker.wait_ready()
        calls = [worker.generate(**LONG) for _ in range(5)]
        worker.wait_load(running=4, queued=1)
        assert refused(worker.generate()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in calls:
            call.cancel()
        assert list(worker.generate(max_tokens=3))[-1].usage.completion_tokens == 3


def test_a_cancelled_stream_frees_its_slot(worker):
    call = worker.generate(**LONG)
    next(call)
    worker.wait_load(running=1)
    call.cancel()
    load = worker.wait_load(running=0, kv_tokens_used=0)
    assert load.kv_tokens_capacity == 2 * 4096


def test_a_deadline_frees_its_slot(worker):
    error = refused(worker.generate(timeout=0.5, **LONG))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    worker.wait_load(running=0, queued=0)


def test_a_slow_reader_holds_up_nobody_and_misses_nothing(worker):
    slow = worker.generate(max_tokens=600)
    first = next(slow)
    assert list(worker.generate(max_tokens=20))[-1].usage.completion_tokens == 20
    worker.wait_load(running=0)
    tokens = [token for response in (first, *slow) for token in response.tokens]
    assert len(tokens) == 600


async def test_what_a_reader_has_not_taken_yet_becomes_one_message():
    stream = Stream(Timeline(Anchor(0, 0), submitted_ns=0))
    for token in range(100):
        stream.push(Delta(1, str(token), token), end_ns=token + 1)
    stream.push(Delta(1, "!", 100, FinishReason.LENGTH), end_ns=101)
    chunk = await stream.take()
    assert chunk.tokens == tuple(range(101))
    assert chunk.text == "".join(map(str, range(100))) + "!"
    assert chunk.finish_reason is FinishReason.LENGTH
    assert not stream.pending


async def test_a_dead_engine_takes_nothing_back():
    stream = Stream(Timeline(Anchor(0, 0), submitted_ns=0))
    stream.push(Delta(1, "a", 7), end_ns=1)
    stream.fail(EngineDiedError("gone"))
    assert (await stream.take()).tokens == (7,)
    for _ in range(2):
        with pytest.raises(EngineDiedError, match="gone"):
            await stream.take()


def test_health_of_a_ready_worker(worker):
    assert worker.status("") == worker.status("liveness") == SERVING


def test_while_the_model_loads_it_is_alive_and_not_ready(checkpoint, tmp_path):
    with Worker(checkpoint, environment=endless_loading(tmp_path)) as worker:
        assert worker.status("liveness") == SERVING
        assert worker.status("") == NOT_SERVING
        error = refused(worker.generate())
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "still loading" in error.details()
        worker.terminate()
        assert worker.process.wait(DEADLINE_S) == 0


def test_sigterm_drains(own_worker):
    engine = own_worker.engine_pid()
    with own_worker.halted():
        running = own_worker.generate(max_tokens=100)
        own_worker.wait_load(queued=1)
        own_worker.terminate()
        own_worker.wait_line("draining: 1 active requests")
        assert own_worker.status("") == NOT_SERVING
        assert own_worker.status("liveness") == SERVING
        error = refused(own_worker.generate())
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in error.details()
    assert list(running)[-1].usage.completion_tokens == 100
    assert own_worker.process.wait(DEADLINE_S) == 0
    wait_gone(engine)


def test_an_open_health_watch_does_not_hold_up_the_end(own_worker):
    """It is told and ended; cut off by the worker's death, it would raise."""
    watch = own_worker.health.Watch(health_pb2.HealthCheckRequest(service=""))
    assert next(watch).status == SERVING
    own_worker.terminate()
    assert own_worker.process.wait(DEADLINE_S) == 0
    assert [update.status for update in watch] == [NOT_SERVING]


def test_ctrl_c_while_the_model_loads_is_no_stack_trace(checkpoint):
    """A terminal sends it to the whole process group."""
    with Worker(checkpoint, start_new_session=True) as worker:
        os.killpg(worker.process.pid, signal.SIGINT)
        assert worker.process.wait(DEADLINE_S) == 0
    assert "Traceback" not in "\n".join(worker.lines)


def test_a_killed_engine_ends_streams_and_worker_with_a_sentence(own_worker):
    running = own_worker.generate(**LONG)
    next(running)
    os.kill(own_worker.engine_pid(), signal.SIGKILL)
    error = refused(running)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "killed by SIGKILL" in error.details()
    assert rich_status.reason(rich_status.from_error(error)) == rich_status.ENGINE_DIED
    assert own_worker.process.wait(DEADLINE_S) == 1
    own_worker.wait_line("error: the engine process was killed by SIGKILL")
    assert own_worker.lines[-1].startswith("error: ")


def test_the_engine_ends_with_its_worker(own_worker):
    call = own_worker.generate(**LONG)
    next(call)
    engine = own_worker.engine_pid()
    own_worker.process.kill()
    wait_gone(engine)
    assert refused(call).code() is grpc.StatusCode.UNAVAILABLE


def test_load_is_answered_while_the_engine_computes(worker):
    call = worker.generate(**LONG)
    next(call)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        worker.wait_load(running=1)
        times.append(time.perf_counter() - start)
    call.cancel()
    worker.wait_load(running=0)
    assert statistics.median(times) < 1


def test_one_trace_a_request_with_times_of_the_engine(checkpoint, collector):
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with Worker(checkpoint, environment=environment) as worker:
        worker.wait_ready()
        metadata = [("traceparent", f"00-{trace_id}-b7ad6b7169203331-01")]
        list(worker.generate("hello", max_tokens=5, metadata=metadata))

        def own(spans):
            """Of this request; workers of other tests sent theirs to the same collector."""
            return {span.name: span for span in spans if span.trace_id == trace_id}

        spans = own(collector.wait_for(lambda spans: len(own(spans)) == 4, timeout_s=60))
    server = spans["moe_api.inference.v1.InferenceService/Generate"]
    assert server.parent_id == "b7ad6b7169203331"
    assert server.attributes["gen_ai.request.model"] == "tiny"
    assert int(server.attributes["gen_ai.usage.input_tokens"]) == 5
    assert int(server.attributes["gen_ai.usage.output_tokens"]) == 5
    assert float(server.attributes["gen_ai.response.time_to_first_chunk"]) > 0
    queue, prefill, decode = (spans[name] for name in ("queue", "prefill", "decode"))
    assert {span.parent_id for span in (queue, prefill, decode)} == {server.span_id}
    assert server.start_ns <= queue.start_ns <= queue.end_ns == prefill.start_ns
    assert prefill.start_ns < prefill.end_ns == decode.start_ns < decode.end_ns <= server.end_ns


def test_the_library_needs_no_grpc():
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('grpc', 'opentelemetry', 'moe_api'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import moe_worker; moe_worker.Engine"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert moe_worker.Engine is not None


def test_the_cache_can_be_watched(endless):
    """The names are those that a frontend computes of the same request and salt."""
    request = inference_pb2.GenerateRequest(
        prompt="a text that many share " * 60, sampling={"max_tokens": 2, "temperature": 0.0}
    )
    other = inference_pb2.GenerateRequest(prompt_tokens={"ids": range(300)}, sampling={"max_tokens": 2})
    tenancy = Tenancy(tenant="a", salt="5a17")
    names = {*names_of(request, "5a17"), *names_of(other, "5a17")}
    assert len(names) == 4
    with Worker(endless, "--context-length", "2048", "--max-batch-size", "1") as worker:
        worker.wait_ready()
        first = worker.load.WatchCache(worker_pb2.WatchCacheRequest(), timeout=DEADLINE_S)
        message = next(first)
        assert (message.sequence, message.reset, list(message.stored)) == (1, True, [])
        for given in (request, other):
            list(worker.inference.Generate(given, timeout=DEADLINE_S, metadata=tenancy.metadata()))
        held, sequence = set(), 1
        while held != names:
            message, sequence = next(first), sequence + 1
            assert (message.sequence, message.reset) == (sequence, False)
            held = (held | set(message.stored)) - set(message.evicted)
        snapshot = next(worker.load.WatchCache(worker_pb2.WatchCacheRequest(), timeout=DEADLINE_S))
        assert set(snapshot.stored) == names
        # One context fills the cache, which is as large as one.
        list(
            worker.inference.Generate(
                inference_pb2.GenerateRequest(prompt_tokens={"ids": [7] * 2000}, sampling={"max_tokens": 40}),
                timeout=DEADLINE_S,
            )
        )
        evicted = set()
        while not evicted >= names:
            evicted |= set(next(first).evicted)
        worker.terminate()
        assert refused(first).code() is grpc.StatusCode.UNAVAILABLE

"""What a worker measures, as the real collector receives it and as GetLoad tells it."""

import os
import re
import signal
import statistics
import time
import uuid
from pathlib import Path

import grpc
import pytest
from opentelemetry import metrics

from moe_api.inference.v1 import inference_pb2
from moe_api.worker.v1 import worker_pb2
from moe_worker.engine.requests import Load
from moe_worker.engine.statistics import Statistics
from moe_worker.service.load_messages import load_message
from moe_worker.service.request_metrics import RequestMetrics
from tests.worker.serving import Worker, refused

# 33 tokens: two full pages of 16 and one token behind them.
PROMPT = range(5, 38)
LONG = {"max_tokens": 4000}
LOAD = worker_pb2.GetLoadRequest()


@pytest.fixture
def measured(endless, collector):
    """A worker that sends metrics every 200 ms, and where its metrics begin in the collector's log."""
    collector.run = str(uuid.uuid4())
    environment = {
        "OTEL_RESOURCE_ATTRIBUTES": f"test.run={collector.run}",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
        "OTEL_METRIC_EXPORT_INTERVAL": "200",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }

    def start(*flags):
        return Worker(endless, *flags, environment=environment), collector.size()

    yield start
    collector.run = ""


def request(tokens, **sampling):
    return inference_pb2.GenerateRequest(
        prompt_tokens=inference_pb2.TokenIds(ids=tokens),
        sampling=inference_pb2.SamplingParameters(**sampling),
    )


def value(found, name, **attributes):
    """The only point of a metric that has these attributes."""
    wanted = {key.replace("__", "."): text for key, text in attributes.items()}
    [point] = [p for p in found.get(name, []) if wanted.items() <= p.attributes.items()]
    return point


def counted(found, name):
    points = found.get(name, [])
    return points[0].value if points else None


def test_a_known_sequence_of_requests_arrives_with_its_figures(measured, collector):
    worker, since = measured("--max-batch-size", "1")
    with worker:
        worker.wait_ready()
        for _ in range(2):
            list(worker.inference.Generate(request(PROMPT, max_tokens=5)))
        found = collector.wait_for_metrics(
            lambda found: counted(found, "moe_worker.steps") == 10 and "moe_worker.experts.active" in found,
            since=since,
        )
        load = worker.load.GetLoad(LOAD)
    expected = {
        "steps": 10,
        "prompt_tokens": 66,
        "prefix_hit_tokens": 32,
        "prefill_tokens": 34,
        "decode_tokens": 8,
        "recomputed_tokens": 0,
        "preemptions": 0,
        "requests.expired": 0,
        "requests.queued": 0,
        "requests.running": 0,
        "kv_cache.capacity": 4096,
        "kv_cache.used": 0,
        "kv_cache.cached": 32,
        "kv_cache.evictions": 0,
    }
    assert {name: counted(found, f"moe_worker.{name}") for name in expected} == expected
    assert value(found, "moe_worker.step.tokens").count == 10
    assert value(found, "moe_worker.step.tokens").sum == 34 + 8
    assert value(found, "moe_worker.step.sequences").sum == 10
    assert 0 < value(found, "moe_worker.step.duration").sum == pytest.approx(load.step_seconds, abs=1e-5)
    for layer in ("1", "2"):
        assert 2 <= value(found, "moe_worker.experts.active", moe_worker__layer=layer).value <= 8
        assert value(found, "moe_worker.experts.imbalance", moe_worker__layer=layer).sum >= 1
    assert set(found) == documented_metrics() - {"moe_worker.mesh.computing"}, "which ranks that follow have"
    check_requests(found, load)
    assert (load.requests_received, load.requests_completed, load.requests_refused) == (2, 2, 0)
    assert (load.prompt_tokens, load.prefix_hit_tokens, load.output_tokens, load.steps) == (66, 32, 10, 10)
    assert load.kv_tokens_cached == 32
    assert abs(load.started.seconds - time.time()) < 120


def documented_metrics():
    page = Path(__file__).parents[2] / "docs/observability.md"
    return set(
        re.findall(
            r"^\| `([\w.]+)` \| (?:histogram|counter|up-down|gauge) \|", page.read_text(), re.MULTILINE
        )
    )


def check_requests(found, load):
    """The GenAI metrics, with the buckets that the conventions ask for."""
    usage = [value(found, "gen_ai.client.token.usage", gen_ai__token__type=k) for k in ("input", "output")]
    assert [(point.count, point.sum, point.unit) for point in usage] == [
        (2, 66, "{token}"),
        (2, 10, "{token}"),
    ]
    assert usage[0].bounds == [4**power for power in range(14)]
    told = {
        "gen_ai.server.request.duration": load.request_seconds,
        "gen_ai.server.time_to_first_token": load.time_to_first_token_seconds,
        "gen_ai.server.time_per_output_token": load.time_per_output_token_seconds,
    }
    for name, histogram in told.items():
        point = value(found, name)
        assert (point.kind, point.unit, point.count) == ("Histogram", "s", 2)
        assert point.sum == pytest.approx(histogram.sum, abs=2e-6)
        assert point.bounds == pytest.approx(list(histogram.bounds))
        assert point.buckets == list(histogram.counts)
        assert point.attributes["gen_ai.request.model"] == "tiny"
        assert point.attributes["gen_ai.operation.name"] == "text_completion"
    whole, first, each = (value(found, name).sum for name in told)
    assert whole == pytest.approx(first + 4 * each, abs=1e-5)
    assert value(found, "moe_worker.request.largest_gap").count == 2


def test_requests_that_fail_are_counted_with_their_reason(measured, collector):
    worker, since = measured("--max-batch-size", "1", "--max-queue", "0")
    with worker:
        worker.wait_ready()
        call = worker.generate(**LONG)
        next(call)
        assert refused(worker.generate()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        call.cancel()
        worker.wait_load(running=0)
        assert refused(worker.generate(timeout=2, **LONG)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        name, wanted = (
            "gen_ai.server.request.duration",
            {"RESOURCE_EXHAUSTED", "CANCELLED", "DEADLINE_EXCEEDED"},
        )
        found = collector.wait_for_metrics(
            lambda found: {point.attributes.get("error.type") for point in found.get(name, [])} == wanted,
            since=since,
        )
        load = worker.wait_load(running=0)
    assert [point.count for point in found[name]] == [1, 1, 1]
    assert "gen_ai.server.time_to_first_token" not in found
    assert (load.requests_received, load.requests_refused, load.requests_completed) == (3, 1, 0)
    assert load.requests_expired == 1


def test_a_span_tells_of_the_cache_and_of_giving_way(measured, collector):
    """Room for one context and two texts that grow: the later one is preempted, and starts again."""
    memory = str(512 * 3 * (16 + 8) * 4)
    worker, since = measured("--context-length", "512", "--kv-memory", memory, "--max-batch-size", "2")
    with worker:
        worker.wait_ready()
        calls = [worker.inference.Generate(request(range(n, n + 33), max_tokens=400)) for n in (5, 105)]
        assert [sum(len(response.tokens) for response in call) for call in calls] == [400, 400]
        list(worker.inference.Generate(request(PROMPT, max_tokens=1)))
        load = worker.load.GetLoad(LOAD)
        servers = collector.wait_for(lambda spans: len(server_spans(spans)) == 3, since=since)
    events = [event for span in server_spans(servers) for event in span.events]
    preempted = [event for event in events if event["event.name"] == "moe_worker.preempted"]
    assert len(preempted) == load.preemptions > 0
    assert all(33 < event["moe_worker.recomputed_tokens"] <= 433 for event in preempted)
    last = max(server_spans(servers), key=lambda span: span.start_ns)
    assert [event["moe_worker.cached_tokens"] for event in last.events] == [32]
    assert last.attributes["gen_ai.usage.cache_read.input_tokens"] == 32


def server_spans(spans):
    return [span for span in spans if span.kind == "Server"]


def test_the_load_of_experts_adds_up(endless):
    """Without a collector too: 2 experts for each token that was computed."""
    with Worker(endless) as worker:
        error = refused_unary(worker)
        worker.wait_ready()
        list(worker.inference.Generate(request(PROMPT, max_tokens=5)))
        experts = worker.load.GetExpertLoad(worker_pb2.GetExpertLoadRequest())
    assert error is None or error.code() is grpc.StatusCode.UNAVAILABLE
    assert experts.steps == 5
    assert (experts.tokens, experts.experts_per_token) == (33 + 4, 2)
    assert [layer.layer for layer in experts.layers] == [1, 2]
    for layer in experts.layers:
        assert (len(layer.tokens), sum(layer.tokens)) == (8, 2 * (33 + 4))
        assert 5 * 2 <= layer.active <= 4 * 2 + 8


def refused_unary(worker):
    try:
        worker.load.GetExpertLoad(worker_pb2.GetExpertLoadRequest())
    except grpc.RpcError as error:
        return error
    return None


def ask(worker):
    """200 answers one after the other, and the median of their times in seconds."""
    times, answers = [], []
    for _ in range(200):
        start = time.perf_counter()
        answers.append(worker.load.GetLoad(LOAD, timeout=10))
        times.append(time.perf_counter() - start)
    return answers, statistics.median(times)


def test_load_is_told_at_once_under_load_and_without_the_engine(endless):
    """16 streams are computed, then the engine process is halted: it is never asked.

    An answer takes 0.8 ms on two cores, nearly all of it gRPC's on both sides; 100 ms leave room for machines
    that do other things too.
    """
    with Worker(endless, "--max-batch-size", "16") as worker:
        worker.wait_ready()
        calls = [worker.generate(**LONG) for _ in range(16)]
        worker.wait_load(running=16)
        answers, median_s = ask(worker)
        assert {answer.running for answer in answers} == {16}
        assert answers[0].steps < answers[-1].steps
        assert median_s < 0.1
        os.kill(worker.engine_pid(), signal.SIGSTOP)
        answers, median_s = ask(worker)
        assert answers[-1].running == 16
        assert median_s < 0.1
        os.kill(worker.engine_pid(), signal.SIGCONT)
        for call in calls:
            call.cancel()
        worker.wait_load(running=0)


def test_the_answer_itself_is_made_in_less_than_a_millisecond():
    requests = RequestMetrics(metrics.NoOpMeter("test"))
    times = []
    for _ in range(200):
        start = time.thread_time()
        load_message(Load(), Statistics(), 1.0, requests).SerializeToString()
        times.append(time.thread_time() - start)
    assert statistics.median(times) < 0.001

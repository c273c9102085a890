"""The thin line on real parts: applied, served, traced, broken, healed."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import openai
import pytest

import moe_worker
from localcluster import Forward, traces
from moe_api.inference.v1 import inference_pb2 as pb
from tests.e2e.serving import EXAMPLE, eventually, kill_processes, request
from tests.operator.live import Live

PROMPT = "The kernel maps a page of memory"


def test_text_through_the_frontend_is_what_the_engine_generates(served):
    expected = moe_worker.Engine(EXAMPLE).generate([PROMPT], moe_worker.SamplingParameters(max_tokens=40))[0]
    with served.frontend() as stub:
        responses = list(stub.Generate(request(PROMPT, 40), timeout=60))
    assert "".join(response.text for response in responses) == expected.text
    assert [token for response in responses for token in response.tokens] == expected.token_ids
    assert responses[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert responses[-1].usage.completion_tokens == 40


def test_openais_client_gets_the_same_text_over_http(served):
    expected = moe_worker.Engine(EXAMPLE).generate([PROMPT], moe_worker.SamplingParameters(max_tokens=40))[0]
    with Forward(served.cluster.directory, served.namespace, "docs-moe-frontend", "http") as frontend:
        client = openai.OpenAI(base_url=f"http://{frontend.address}/v1", api_key="unused")
        asked = {"model": "docs-moe", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
        chunks = list(client.completions.create(**asked, stream=True))
        whole = client.completions.create(**asked)
        assert [model.id for model in client.models.list()] == ["docs-moe"]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text == expected.text
    assert whole.usage.completion_tokens == 40


def test_the_status_knows_the_model(served):
    status = json.loads(served.kubectl("get", "moed", "docs-moe", "-o", "json"))["status"]
    assert status["model"]["architecture"] == "deepseek_v3"
    assert status["model"]["parametersTotal"] == 12_022_848
    assert status["model"]["parametersActive"] < status["model"]["parametersTotal"]


def test_a_bad_request_is_answered_with_a_sentence_through_the_frontend(served):
    with served.frontend() as stub, pytest.raises(grpc.RpcError) as raised:
        list(stub.Generate(request("word " * 2000, 10), timeout=60))
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "prompt" in raised.value.details()


def collected(served):
    log = served.cluster.kubectl("-n", "observability", "logs", "deployment/otelcol")
    return traces.trees(traces.parse(log))


def test_one_trace_leads_from_the_client_to_decode(served):
    cluster = served.cluster
    with (
        Forward(cluster.directory, served.namespace, "docs-moe-frontend", 8000) as frontend,
        Forward(cluster.directory, "observability", "otelcol", 4317) as collector,
    ):
        command = [Path(sys.executable).with_name("moe"), "generate", "--endpoint", frontend.address]
        environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.address}"}
        done = subprocess.run(
            [*command, PROMPT, "--max-tokens", "8"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    trace_id = done.stderr.split("trace: ")[1][:32]

    def whole():
        mine = [trace for trace in collected(served) if trace[0].trace_id == trace_id]
        return mine and traces.is_complete(mine[0]) and len(mine[0]) >= 6

    eventually(whole, "the trace arrives", 90)
    (spans,) = (trace for trace in collected(served) if trace[0].trace_id == trace_id)
    by_id = {span.span_id: span for span in spans}

    def path(span):
        above = by_id.get(span.parent_id)
        return [*(path(above) if above else []), (span.service, span.name.rsplit("/")[-1])]

    leaves = [path(span) for span in spans if span.name in ("queue", "prefill", "decode")]
    line = [("moe", "moe generate"), ("moe-frontend", "Generate"), ("moe-worker", "Generate")]
    assert leaves == [[*line, ("moe-worker", name)] for name in ("queue", "prefill", "decode")]
    worker = next(span for span in spans if span.service == "moe-worker" and "Generate" in span.name)
    assert worker.attributes["gen_ai.request.model"] == "docs-moe"
    assert worker.attributes["gen_ai.usage.output_tokens"] == 8
    assert 0 < worker.attributes["gen_ai.response.time_to_first_chunk"] < 30


def test_a_reconcile_is_a_trace_of_its_own(served):
    endpoint = "OTEL_EXPORTER_OTLP_ENDPOINT=http://otelcol.observability:4317"
    operator = ("-n", "moe-system", "deployment/moe-operator")
    served.cluster.kubectl("set", "env", *operator, endpoint)
    served.cluster.kubectl("rollout", "status", *operator, "--timeout=60s")

    def reconciled():
        return [
            span
            for trace in collected(served)
            for span in trace
            if span.service == "moe-operator" and served.namespace in span.attributes.values()
        ]

    eventually(reconciled, "a span of a reconcile arrives", 90)
    assert not reconciled()[0].parent_id


def kill_worker(served):
    (first, *_) = served.pods("worker")
    return kill_processes(f"HOSTNAME={first}")


def kill_frontend(served):
    (first, *_) = served.pods("frontend")
    return kill_processes(f"HOSTNAME={first}")


def kill_operator(served):
    pods = Live(served.cluster, "moe-system").list("pods", "app.kubernetes.io/name")
    (running,) = [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]
    return kill_processes(f"HOSTNAME={running}")


@pytest.mark.timeout(480)
@pytest.mark.parametrize("kill", [kill_worker, kill_frontend, kill_operator])
def test_after_a_kill_no_request_hangs_and_the_deployment_is_ready_again(served, kill):
    with served.frontend() as stub, ThreadPoolExecutor(20) as threads:
        first_messages = []

        def stream(number):
            call = stub.Generate(request(f"{number}. {PROMPT}", 300), timeout=180)
            try:
                for count, _ in enumerate(call):
                    if count == 0:
                        first_messages.append(number)
            except grpc.RpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        running = [threads.submit(stream, number) for number in range(20)]
        eventually(lambda: len(first_messages) >= 8, "eight requests stream", 60)
        assert kill(served) > 0
        outcomes = [future.result(timeout=200) for future in running]
    assert set(outcomes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    if kill is not kill_frontend:
        assert set(outcomes) == {grpc.StatusCode.OK}

    def answers():
        try:
            with served.frontend() as stub:
                return list(stub.Generate(request(PROMPT, 2), timeout=30))
        except grpc.RpcError:
            return False

    eventually(lambda: served.ready().get("status") == "True", "docs-moe Ready again", 90)
    eventually(answers, "a request succeeds", 90)


def test_a_checkpoint_that_cannot_be_loaded_says_why_in_the_condition(served, tmp_path):
    truncated = shutil.copytree(EXAMPLE, tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    other = shutil.copytree(EXAMPLE, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    untokenized = shutil.copytree(EXAMPLE, tmp_path / "untokenized")
    (untokenized / "tokenizer.json").unlink()
    sentences = {
        "truncated": "model.safetensors",
        "other": "llama",
        "untokenized": "tokenizer.json is missing",
    }
    for name in sentences:
        served.apply(f"broken-{name}", f"file://{tmp_path / name}", replicas=1, worker={})
    live = Live(served.cluster, served.namespace)
    for name, sentence in sentences.items():
        assert sentence in live.wait("Ready", "ModelLoadFailed", f"broken-{name}")["message"]
        assert "Traceback" not in served.kubectl("logs", f"broken-{name}-0-0")
    served.kubectl("delete", "moed", *(f"broken-{name}" for name in sentences), "--wait=false")

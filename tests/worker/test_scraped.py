"""`moe-worker serve --metrics-port`: what Prometheus fetches from a real worker."""

import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe_api.inference.v1 import inference_pb2
from moe_worker.errors import SettingsError
from moe_worker.service.server import metrics_server
from tests.frontend.apiserver import free_port
from tests.worker.serving import Worker


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return {family.name: family for family in text_string_to_metric_families(answer.read().decode())}


def test_a_worker_serves_its_metrics_under_the_names_of_otlp(checkpoint):
    port = free_port()
    with Worker(checkpoint, "--metrics-port", str(port)) as worker:
        worker.wait_ready()
        request = inference_pb2.GenerateRequest(model="tiny", prompt="a")
        request.sampling.max_tokens = 2
        list(worker.inference.Generate(request, timeout=60))
        found = scrape(port)
    assert {
        "gen_ai_server_time_to_first_token_seconds",
        "gen_ai_server_request_duration_seconds",
        "moe_worker_requests_queued",
        "moe_worker_requests_running",
        "moe_worker_kv_cache_used",
        "moe_worker_decode_tokens",
        "moe_worker_step_duration_seconds",
        "moe_background_loops",
    } <= found.keys(), sorted(found)
    (family,) = (found["gen_ai_server_request_duration_seconds"],)
    (count,) = (sample.value for sample in family.samples if sample.name.endswith("_count"))
    assert count == 1


def test_a_port_that_is_taken_is_said():
    server = metrics_server(free_port())
    with pytest.raises(SettingsError, match=r"is not available: .*; set another --metrics-port"):
        metrics_server(server.port)

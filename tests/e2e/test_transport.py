"""Mutual TLS between the components, turned on while the example serves: who gets in, and what is lost."""

import base64
import json
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from localcluster import Cluster, Forward
from moe_api import mutual, tls
from moe_operator.certificates.issuing import issue, new_authority
from tests.e2e.serving import Served, eventually, request
from tests.operator.live import Live

PROMPT = "The kernel maps a page of memory"


@pytest.fixture
def serving(operator: Cluster) -> Iterator[Served]:
    namespace = f"mutual-{secrets.token_hex(4)}"
    operator.kubectl("create", "namespace", namespace)
    deployment = Served(operator, namespace)
    # Small enough for a second worker next to the first one, and those of the other tests of the node.
    worker = {"resources": {"requests": {"cpu": "50m"}}}
    off = {"telemetry": {}, "transport": {"mode": "Plaintext"}}
    deployment.apply("docs-moe", "file:///mnt/models/docs-moe", replicas=1, worker=worker, **off)
    eventually(lambda: deployment.ready().get("status") == "True", "Ready", 180)
    yield deployment
    operator.kubectl("delete", "namespace", namespace, "--wait=false")


class Load:
    """Streams one after the other; each has to have all its tokens, the same ones.

    A frontend that ends refuses new streams, and tells clients to send them again: to another one.
    """

    def __init__(self, served):
        self.served, self.done, self.wrong, self.expected = served, 0, [], None
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        while not self.stop.is_set():
            with self.served.frontend() as stub:
                self.stream(stub)

    def stream(self, stub):
        found = []
        try:
            for answer in stub.Generate(request(PROMPT, 48), timeout=60, wait_for_ready=True):
                found += answer.tokens
        except grpc.RpcError as error:
            if found or "is shutting down; send the request again" not in error.details():
                self.wrong.append(str(error))
            return
        self.expected = self.expected or found
        if found != self.expected:
            self.wrong.append(found)
        self.done += 1

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join(90)
        assert not self.thread.is_alive()


def body(served):
    return Live(served.cluster, served.namespace).get("moed", "docs-moe")


def model_revision(served):
    """Of the worker that told the operator its model."""
    return body(served)["status"]["model"]["revision"]


def settled(served):
    found = body(served)
    current = [
        condition
        for condition in found["status"]["conditions"]
        if condition["observedGeneration"] == found["metadata"]["generation"]
    ]
    return {one["type"] for one in current if one["status"] == "True"} >= {"Ready"} and (
        len(served.pods("worker")) == len(served.pods("frontend")) == 1
    )


def accepted(served, pair=None, port="grpc-tls"):
    """Whether the worker responds to a client with this certificate; none stands for plaintext."""
    options = mutual.expecting(mutual.WORKER)
    with Forward(served.cluster.directory, served.namespace, "docs-moe-workers", port) as forward:
        opened = (
            grpc.insecure_channel(forward.address, options)
            if pair is None
            else grpc.secure_channel(forward.address, mutual.channel_credentials(pair), options)
        )
        with opened as channel:
            try:
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
            except grpc.RpcError:
                return False
            return True


def secret(served, name):
    data = json.loads(served.kubectl("get", "secret", name, "-o", "json"))["data"]
    return {key: base64.b64decode(text) for key, text in data.items()}


@pytest.mark.timeout(360)
def test_turning_it_on_loses_no_stream_and_lets_frontends_and_the_operator_in_alone(serving):
    assert accepted(serving, port="grpc"), "without TLS, workers let everybody in"
    with Load(serving) as load:
        eventually(lambda: load.done > 0, "a stream", 60)
        patch = json.dumps({"spec": {"transport": {"mode": "MutualTLS"}}})
        serving.kubectl("patch", "moed", "docs-moe", "--type=merge", "-p", patch)
        eventually(lambda: settled(serving) and serving.pods("worker") != ["docs-moe-0-0"], "rolled", 180)
        before = load.done
        eventually(lambda: load.done > before + 1, "streams over TLS", 60)
    assert load.wrong == []

    worker = mutual.parse(secret(serving, "moe-internal-worker"))
    frontend = mutual.parse(secret(serving, "moe-internal-frontend"))
    foreign = new_authority("elsewhere", datetime.now(UTC))
    stranger = issue(foreign, mutual.FRONTEND, worker.authorities, datetime.now(UTC))
    assert accepted(serving, frontend)
    assert not accepted(serving)
    assert not accepted(serving, stranger)
    assert not accepted(serving, worker)

    # The operator read the model of the new revision over TLS, and its users see it.
    eventually(lambda: model_revision(serving) == body(serving)["status"]["revision"], "the model", 60)
    with Forward(serving.cluster.directory, serving.namespace, "docs-moe-workers", "grpc-tls") as worker_port:
        shown = subprocess.run(
            [
                *(Path(sys.executable).with_name("moe"), "status", "docs-moe", "-n", serving.namespace),
                *("--endpoint", worker_port.address),
            ],
            env={"KUBECONFIG": str(serving.cluster.kubeconfig), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert shown.returncode == 0, shown.stderr
    asked = re.search(r"^Experts +127\.0\.0\.1:\d+: [\d.]+ of", shown.stdout, re.MULTILINE)
    assert asked, f"with the certificate of the namespace: {shown.stdout}"
    assert tls.AUTHORITIES in secret(serving, "moe-internal-frontend")

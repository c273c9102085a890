"""`moe experts` prints what GetExpertLoad of a worker says."""

import socketserver
import threading
from concurrent import futures

import grpc
import pytest
from click.testing import CliRunner

from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_cli.experts import experts, lines
from moe_client.errors import ABSENT, WRONG


def domain(name, tokens, shares):
    return worker_pb2.ExpertDomain(name=name, tokens=tokens, shares=[worker_pb2.ExpertShares(experts=shares)])


LOAD = worker_pb2.ExpertLoad(
    steps=10,
    layers=[worker_pb2.ExpertLayer(layer=1, tokens=[60, 20, 20, 0], active=23)],
    domains=[domain("git\n", 70, [0.9, 0.1, 0, 0]), domain("man", 30, [0.3, 0.3])],
    fit=0.75,
)


class Service(worker_pb2_grpc.WorkerServiceServicer):
    def GetExpertLoad(self, request, context):
        return LOAD


@pytest.fixture
def endpoint():
    server = grpc.server(futures.ThreadPoolExecutor(1))
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def test_layers_busiest_experts_and_their_domains_are_printed(endpoint):
    result = CliRunner().invoke(experts, ["--endpoint", endpoint, "--top", "2"], catch_exceptions=False)
    assert result.output.splitlines() == [
        "10 steps",
        "layer 1: 2.3 experts a step, utilisation 42%; busiest 0 (60%: git  man), 1 (20%: man)",
        "domains: git  (70 tokens), man (30 tokens); fit 75%",
    ]


def test_a_worker_that_computed_nothing_has_no_layers():
    assert list(lines(worker_pb2.ExpertLoad(layers=[worker_pb2.ExpertLayer(tokens=[0, 0])]), 4)) == [
        "0 steps"
    ]


def test_a_worker_that_is_not_there_is_told():
    result = CliRunner().invoke(experts, ["--endpoint", "127.0.0.1:1", "--timeout", "2"])
    assert result.exit_code == ABSENT
    assert "cannot connect to 127.0.0.1:1" in result.stderr


def test_a_frontend_is_told_to_be_no_worker():
    server = grpc.server(futures.ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    result = CliRunner().invoke(experts, ["--endpoint", address])
    server.stop(None)
    assert result.exit_code == WRONG
    assert (
        result.stderr == f"error: {address} is no worker, which alone knows experts; give a worker's port\n"
    )


class Http(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.recv(1)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def test_a_port_of_http_is_told():
    with socketserver.TCPServer(("127.0.0.1", 0), Http) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_address[1]}"
        result = CliRunner().invoke(experts, ["--endpoint", address])
        server.shutdown()
    assert result.exit_code == ABSENT
    assert (
        f"{address} serves HTTP, not gRPC; give the port of gRPC, which is 8000 by default" in result.stderr
    )

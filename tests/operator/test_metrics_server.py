"""Where Prometheus fetches metrics."""

from __future__ import annotations

import socket
import threading
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe_api.metrics_server import CONNECTIONS_MOST, MetricsServer
from moe_api.supervision import Supervisor
from moe_operator.controller.registration import _metrics_server
from moe_operator.errors import InstallationError
from moe_operator.settings import Settings


@pytest.fixture
def server():
    made = MetricsServer(0)
    yield made
    made.stop()


def test_metrics_are_served_by_a_supervised_loop(server):
    supervisor = Supervisor()
    server.start(supervisor)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    assert "python_info" in {family.name for family in families}
    assert [state.loop for state in supervisor.states] == ["metrics"]


def test_metrics_are_served_over_ipv6(server):
    server.start(Supervisor())
    with urllib.request.urlopen(f"http://[::1]:{server.port}/metrics", timeout=60) as answer:
        assert answer.status == 200


def test_silent_connections_take_neither_threads_nor_the_place_of_prometheus(server):
    server.start(Supervisor())
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3 * CONNECTIONS_MOST)]
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as answer:
        assert answer.status == 200
    silent[0].settimeout(5)  # an idle connection is closed after 10 s
    assert silent[0].recv(1) == b"", "the oldest is closed"
    answering = [each for each in threading.enumerate() if "process_request_thread" in each.name]
    assert len(answering) <= 2 * CONNECTIONS_MOST, "some may still be ending"
    for each in silent:
        each.close()


def test_a_port_that_is_taken_is_said(server):
    with pytest.raises(
        InstallationError, match=r"is not available: .*; set another MOE_OPERATOR_METRICS_PORT"
    ):
        _metrics_server(Settings(metrics_port=server.port))
    server.start(Supervisor())

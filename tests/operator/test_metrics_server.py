"""Where Prometheus fetches metrics."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe_api.metrics_server import MetricsServer
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
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    assert "python_info" in {family.name for family in families}
    assert [state.loop for state in supervisor.states] == ["metrics"]


def test_a_port_that_is_taken_is_said(server):
    with pytest.raises(
        InstallationError, match=r"is not available: .*; set another MOE_OPERATOR_METRICS_PORT"
    ):
        _metrics_server(Settings(metrics_port=server.port))
    server.start(Supervisor())

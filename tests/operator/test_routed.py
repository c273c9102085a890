"""What frontends say of their routes, from real servers on addresses of their own."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import grpc
import pytest
from kubernetes.client import ApiClient, Configuration

from moe_api.frontend.v1 import frontend_pb2, frontend_pb2_grpc
from moe_frontend.discovery import publishing
from moe_frontend.discovery.endpoints import Endpoint
from moe_operator.apiserver.requests import Requests
from moe_operator.errors import ReadForbiddenError
from moe_operator.kube.client import Cluster
from moe_operator.observed.pod_status import PodStatus
from moe_operator.observed.pods import Pod
from moe_operator.observed.routes import published
from moe_operator.resources import names
from moe_operator.rpc.frontends import routed

# All of 127/8 is this machine's own.
FIRST, SECOND, NOBODY = "127.77.0.1", "127.77.0.2", "127.77.0.3"
LEADERS = [Pod(f"docs-{rank}-0", f"10.0.0.{rank}", False, False, "r", rank, None) for rank in (1, 2)]
ONE, TWO = ({pod.name: pod.address} for pod in LEADERS)


class Routes(frontend_pb2_grpc.FrontendServiceServicer):
    def __init__(self, routes):
        self.routes = routes

    def GetRoutes(self, request, context):
        found = (frontend_pb2.Route(name=name, address=f"{host}:8000") for name, host in self.routes.items())
        return frontend_pb2.Routes(routes=found)


@contextmanager
def serving(address, service):
    server = grpc.server(ThreadPoolExecutor(1))
    if service is not None:
        frontend_pb2_grpc.add_FrontendServiceServicer_to_server(service, server)
    server.add_insecure_port(f"{address}:{names.GRPC_PORT}")
    server.start()
    try:
        yield Pod(address, address, True, False, "", 0, None)
    finally:
        server.stop(None)


def test_a_leader_is_routed_when_every_frontend_says_so():
    with serving(FIRST, Routes(ONE | TWO)) as first, serving(SECOND, Routes(TWO)) as second:
        assert routed([first], LEADERS, 5, {}) == ONE | TWO
        assert routed([first, second], LEADERS, 5, {}) == TWO
        assert routed([], LEADERS, 5, {}) == {}


def test_a_frontend_that_is_silent_counts_only_while_clients_reach_it():
    silent = Pod(NOBODY, NOBODY, True, False, "", 0, None)
    starting = Pod(NOBODY, NOBODY, False, False, "", 0, None)
    with serving(FIRST, Routes(ONE)) as first:
        assert routed([first, silent], LEADERS, 1, {}) == {}
        assert routed([first, starting], LEADERS, 1, {}) == ONE


def test_what_a_frontend_published_before_it_crashed_holds_up_nobody():
    stale, current = frozenset(ONE.items()), frozenset((ONE | TWO).items())
    crashed, serves = (Pod(uid, NOBODY, uid == "b", False, "", 0, None, uid=uid) for uid in "ab")
    assert routed([crashed, serves], LEADERS, 5, {"a": stale, "b": current}) == ONE | TWO
    assert routed([crashed], LEADERS, 5, {"a": stale}) == ONE, "at the start none is ready"


def test_a_pod_that_was_evicted_holds_up_nobody():
    evicted = Pod("a", NOBODY, False, False, "", 0, None, uid="a", status=PodStatus(phase="Failed"))
    starting = Pod("b", NOBODY, False, False, "", 0, None, uid="b")
    assert routed([evicted, starting], LEADERS, 5, {"a": frozenset(), "b": frozenset(ONE.items())}) == ONE
    assert routed([evicted], LEADERS, 5, {"a": frozenset(ONE.items())}) == {}


def test_a_terminating_frontend_that_still_answers_holds_up_nobody():
    with serving(FIRST, Routes(ONE | TWO)) as first, serving(SECOND, Routes({})) as second:
        assert routed([first, second], LEADERS, 5, {}) == {}
        leaving = replace(second, ready=False, terminating=True)
        assert routed([first, leaving], LEADERS, 5, {}) == ONE | TWO
        assert routed([leaving], LEADERS, 5, {}) == {}, "no client reaches any"


def test_a_frontend_that_published_its_routes_is_not_asked():
    unreachable = Pod(NOBODY, NOBODY, True, False, "", 0, None, uid="u1")
    began = time.monotonic()
    assert routed([unreachable], LEADERS, 60, {"u1": frozenset(ONE.items())}) == ONE
    assert routed([unreachable], LEADERS, 60, {"u1": frozenset()}) == {}
    assert time.monotonic() - began < 30
    with serving(FIRST, Routes(TWO)) as first:
        assert routed([first, unreachable], LEADERS, 5, {"u1": frozenset((ONE | TWO).items())}) == TWO


def test_what_frontends_publish_is_read_by_the_pod_that_owns_it():
    pod, routes = (
        publishing.OwnPod("ns", "docs-frontend-x", "u1", "docs"),
        [Endpoint("docs-1-0", "10.0.0.1:8000")],
    )
    mine = publishing.manifest(pod, [*routes, Endpoint("docs-2-0", "[fd00::2]:8000")], {})
    other = {"metadata": {"name": "docs-frontend-y", "ownerReferences": mine["metadata"]["ownerReferences"]}}
    found = published((mine, other))
    assert found == {"u1": {("docs-1-0", "10.0.0.1"), ("docs-2-0", "fd00::2")}}


def test_a_frontend_of_before_holds_up_nobody():
    with serving(FIRST, None) as before:
        assert routed([before], LEADERS, 5, {}) == ONE | TWO


def test_an_operator_newer_than_its_crds_does_not_wait_for_them(monkeypatch):
    """Its watchers settle, and say what is missing again and again."""
    cluster = Cluster(ApiClient(Configuration()), 1.0)
    monkeypatch.setattr(Requests, "_respond", lambda *_, **__: None)
    with pytest.raises(
        ReadForbiddenError, match="/frontendroutes is unknown to the API server; apply the CRDs"
    ):
        list(cluster.collection(names.ROUTES_KIND, names.LABEL_NAME).pages())
    assert cluster.list(names.ROUTES_KIND, "default", "docs") == []

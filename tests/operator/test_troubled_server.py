"""The operator's process, and an API server that is slow, that goes away, or whose watches break.

The API server is real and has no controllers. What happened meanwhile is never found by looking again at
everything: that is an hour away here.
"""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from moe_operator.resources import names
from tests.frontend.apiserver import ACCESS
from tests.operator.by_hand import COLLECTION, Api
from tests.operator.live import ROOT, eventually, manifest
from tests.operator.outside import Operator, Proxy, kubeconfig

pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
MINUTE_S = 60.0
DEPLOYMENTS = ("dropped", "often", "slow", "another", "contested", "away")


@pytest.fixture(scope="module")
def site(api_server, tmp_path_factory):
    """An API server, a proxy, and the operator, which knows only the proxy."""
    proxy = Proxy(api_server.port)
    config = kubeconfig(api_server.directory, proxy.port, ACCESS)
    settings = {"resync_seconds": "3600", "reconcile_seconds": "1", "retry_most_seconds": "5"}
    operator = Operator(tmp_path_factory.mktemp("operator"), config, ROOT, **settings)
    api = Api(api_server)
    yield SimpleNamespace(api=api, proxy=proxy, operator=operator)
    proxy.close()
    operator.kill()
    for name in DEPLOYMENTS:
        api.clear(name)


def make(site, name, **spec):
    assert site.api.ask("POST", COLLECTION, manifest(name, **spec))[0] == 201


def scale(site, name, replicas):
    assert site.api.ask("PATCH", f"{COLLECTION}/{name}", {"spec": {"replicas": replicas}})[0] == 200


def sets(site, name):
    return [one["metadata"]["name"] for one in site.api.cluster.list("StatefulSet", "default", name)]


def condition(site, name, kind):
    """A condition that speaks of the latest spec, as (status, reason, message)."""
    body = site.api.cluster.get(names.KIND, "default", name)
    found = {c["type"]: c for c in body.get("status", {}).get("conditions", ())}.get(kind)
    if found is None or found["observedGeneration"] != body["metadata"]["generation"]:
        return None
    return found["status"], found["reason"], found["message"]


def wait_for(site, name, replicas, seconds=90.0):
    """Waits until the deployment has so many replicas, and says so."""
    wanted = [f"{name}-{rank}" for rank in range(replicas)]
    eventually(lambda: sets(site, name), lambda found: found == wanted, "replicas", seconds)
    said = eventually(lambda: condition(site, name, "Ready"), bool, "Ready", seconds)
    assert said[:2] == ("False", "ReplicasNotReady")
    assert said[2].startswith(f"0/{replicas} replicas ready")


def events(site, name, reason):
    found = site.api.ask("GET", "/api/v1/namespaces/default/events")[1]["items"]
    return [one for one in found if (one["involvedObject"]["name"], one["reason"]) == (name, reason)]


def test_what_happens_while_watches_are_broken_is_noticed_afterwards(site):
    make(site, "dropped", replicas=1)
    wait_for(site, "dropped", 1)
    site.proxy.away = True
    site.proxy.drop()
    service = "/api/v1/namespaces/default/services/dropped-workers"
    before = site.api.ask("GET", service)[1]["metadata"]["uid"]
    site.api.ask("DELETE", service)
    scale(site, "dropped", 2)
    site.proxy.away = False
    wait_for(site, "dropped", 2)
    again = eventually(lambda: site.api.ask("GET", service), lambda answer: answer[0] == 200, "made again")
    assert again[1]["metadata"]["uid"] != before
    assert site.operator.process.poll() is None


def test_watches_that_break_all_the_time_lose_no_edit(site):
    make(site, "often", replicas=1)
    for replicas in (2, 1, 3, 2):
        site.proxy.drop()
        scale(site, "often", replicas)
    wait_for(site, "often", 2)


def test_a_slow_api_server_makes_the_operator_slow_and_nothing_else(site):
    site.proxy.delay_s = 0.15
    try:
        make(site, "slow", replicas=2)
        make(site, "another", replicas=1)
        # A reconcile runs out of time before all objects exist, and others get theirs.
        wait_for(site, "another", 1)
        wait_for(site, "slow", 2)
    finally:
        site.proxy.delay_s = 0.0
    scale(site, "slow", 3)
    wait_for(site, "slow", 3)
    told = eventually(lambda: events(site, "slow", "ReplicasNotReady"), bool, "an event")
    assert len(told) == 1, "a decision is not repeated in the next reconcile"


def test_others_who_write_all_the_time_keep_nothing_from_being_put_right(site):
    make(site, "contested", replicas=1)
    wait_for(site, "contested", 1)
    path = "/apis/apps/v1/namespaces/default"
    frontend = f"{path}/deployments/contested-frontend"
    stop = threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            number += 1
            note = {"metadata": {"annotations": {"somebody.else/note": str(number)}}}
            site.api.ask("PATCH", f"{path}/statefulsets/contested-0", note)
            site.api.ask("PATCH", frontend, {"spec": {"replicas": number % 3}})
            site.api.ask("PATCH", f"{COLLECTION}/contested", note)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        scale(site, "contested", 2)
        wait_for(site, "contested", 2)
        eventually(lambda: events(site, "contested", "DriftCorrected"), bool, "an event")
    finally:
        stop.set()
        thread.join()

    def frontends():
        return site.api.ask("GET", frontend)[1]["spec"]["replicas"]

    eventually(frontends, lambda count: count == 1, "drift corrected")


@pytest.mark.slow
def test_after_a_minute_without_the_api_server_an_edit_is_carried_out_within_seconds(site):
    make(site, "away", replicas=1)
    wait_for(site, "away", 1)
    before = site.operator.cpu_seconds()
    site.proxy.away = True
    site.proxy.drop()
    began = time.monotonic()
    scale(site, "away", 2)
    eventually(lambda: time.monotonic() - began, lambda passed: passed > MINUTE_S, "a minute", MINUTE_S + 5)
    assert site.operator.cpu_seconds() - before < 6, "it asks in a hot loop"
    site.proxy.away = False
    wait_for(site, "away", 2, seconds=30)
    assert site.operator.process.poll() is None

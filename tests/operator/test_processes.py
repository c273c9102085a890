"""More than one operator process, and none."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from kubernetes import config
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from moe_operator.controller.reconcile import Reconciler
from moe_operator.kube import peering
from moe_operator.kube.client import Cluster
from moe_operator.resources.deployment import Name
from moe_operator.settings import Settings
from tests.operator.live import Live, eventually, manifest


class Processes:
    """The operator's pods."""

    def __init__(self, live: Live) -> None:
        self._live = Live(live.cluster, "moe-system")

    def scale(self, count: int) -> None:
        self._live.kubectl("scale", "deployment/moe-operator", f"--replicas={count}")
        eventually(self.peers, lambda peers: len(peers) == count, f"{count} operator processes")

    def peers(self) -> dict[str, int]:
        """Processes that say they are alive, each with its rank."""
        body = json.loads(
            self._live.cluster.kubectl("get", "clusterkopfpeering", "moe-operator", "-o", "json")
        )
        return {pod: peer["priority"] for pod, peer in (body.get("status") or {}).items()}

    def acting(self) -> str:
        peers = self.peers()
        return max(peers, key=lambda pod: peers[pod])

    def logs(self, pod: str) -> str:
        return self._live.kubectl("logs", pod)

    def kill(self, pod: str) -> None:
        """Ends a process without any goodbye."""
        self._live.kubectl("delete", "pod", pod, "--force", "--grace-period=0")


@pytest.fixture
def processes(live):
    found = Processes(live)
    yield found
    found.scale(1)


def test_of_two_operators_one_acts_and_the_other_takes_over(live, processes):
    processes.scale(2)
    first = processes.acting()
    (other,) = set(processes.peers()) - {first}
    eventually(lambda: processes.logs(other), lambda log: "Pausing operations in favour of" in log, "pause")
    live.apply(manifest("one", replicas=1))
    live.settled("one")
    live.patch("statefulset", "one-0", {"spec": {"replicas": 0}})
    eventually(lambda: live.events("DriftCorrected", "one"), len, "drift corrected")
    live.settled("one")
    assert len(live.events("Created", "one")) == 1
    assert len(live.events("DriftCorrected", "one")) == 1
    eventually(
        lambda: processes.logs(first), lambda log: "/one: DriftCorrected: " in log, "a line of the log"
    )
    assert "/one: DriftCorrected: " not in processes.logs(other)


def test_a_killed_operator_comes_back_and_restarts_no_worker(live, processes):
    before = {name: pod["metadata"]["uid"] for name, pod in live.leaders("one").items()}
    killed = processes.acting()
    processes.kill(killed)
    live.kubectl("scale", "moed/one", "--replicas=2")
    eventually(lambda: live.get("moed", "one")["status"].get("readyReplicas"), lambda n: n == 2, "scaled")
    after = {name: pod["metadata"]["uid"] for name, pod in live.leaders("one").items()}
    assert after["one-0-0"] == before["one-0-0"]
    assert processes.acting() != killed


def test_a_reconcile_is_a_span_and_an_outranked_process_does_nothing(live):
    def reconcile(priority):
        spans = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(spans))
        api = Cluster(config.new_client_from_config(str(live.cluster.kubeconfig)), timeout_seconds=15)
        process = Reconciler(
            api,
            Settings(model_roots="/mnt/models"),
            peering.Rank(api, Settings().peering, priority),
            lambda: datetime.now(UTC),
            lambda _: {},
            provider.get_tracer("test"),
        )
        pause = process.reconcile(Name(live.namespace, "one"))
        (span,) = spans.get_finished_spans()
        return pause, span

    live.settled("one")
    pause, span = reconcile(priority=1)
    assert (pause, span.name) == (Settings().recheck_seconds, "reconcile")
    assert span.attributes["serving.moe-operator.dev.outranked"]
    pause, span = reconcile(priority=2**60)
    assert pause == Settings().resync_seconds
    assert span.attributes["serving.moe-operator.dev.name"] == "one"
    assert span.attributes["serving.moe-operator.dev.applied"] == 0

"""A replica of several workers, by kubectl apply: it gives what one process gives, and heals as a whole.

Frontends and the operator reach its leader over mutual TLS.
"""

import secrets
from collections.abc import Iterator

import grpc
import pytest

import moe_worker
from localcluster import Cluster
from tests.e2e.partition import partition
from tests.e2e.serving import EXAMPLE, Served, eventually, kill_processes, request
from tests.operator.live import Live

PROMPT = "The kernel maps a page of memory"
CUT_S = 4.0
"""Longer than a rank may be silent."""
SMALL = {"resources": {"requests": {"cpu": "100m", "memory": "256Mi"}}}


@pytest.fixture
def gang(operator: Cluster) -> Iterator[Served]:
    namespace = f"gang-{secrets.token_hex(4)}"
    operator.kubectl("create", "namespace", namespace)
    yield Served(operator, namespace)
    operator.kubectl("delete", "namespace", namespace, "--wait=false")


def apply(served, **parallelism):
    served.apply(
        "docs-moe",
        "file:///mnt/models/docs-moe",
        replicas=1,
        worker=SMALL,
        parallelism=parallelism,
        telemetry={},
        transport={"mode": "MutualTLS"},
    )


def tokens(served, count=24, at_first=lambda: None):
    """Of the greedy answer. at_first: called when the first ones have come."""
    found = []
    with served.frontend() as stub:
        for response in stub.Generate(request(PROMPT, count), timeout=120):
            if not found:
                at_first()
            found += response.tokens
    return found


def answers(served):
    """The tokens; None while the gang forms again for longer than the frontend waits."""
    try:
        return tokens(served)
    except grpc.RpcError:
        return None


def status(served):
    return Live(served.cluster, served.namespace).get("moed", "docs-moe")["status"]


def restarts(served, pod):
    status = Live(served.cluster, served.namespace).get("pod", pod)["status"]
    return sum(container["restartCount"] for container in status.get("containerStatuses", ()))


def addresses(served, *pods):
    path = "jsonpath={.status.podIP}"
    return {pod: served.kubectl("get", "pod", pod, "-o", path) for pod in pods}


@pytest.mark.parametrize(
    ("pipeline", "expert"),
    [(1, 2), pytest.param(2, 2, marks=pytest.mark.slow), pytest.param(1, 4, marks=pytest.mark.slow)],
)
def test_a_gang_gives_the_tokens_of_one_process_and_heals(gang, pipeline, expert):
    engine = moe_worker.Engine(EXAMPLE)
    expected, longer = (
        engine.generate([PROMPT], moe_worker.SamplingParameters(max_tokens=count))[0].token_ids
        for count in (24, 300)
    )
    apply(gang, pipeline=pipeline, expert=expert)
    eventually(lambda: gang.ready().get("status") == "True", "the gang Ready", 240)
    assert tokens(gang) == expected
    assert len(gang.pods("worker")) == pipeline * expert
    assert status(gang)["replicas"] == status(gang)["readyReplicas"] == 1

    first, *_, last = gang.pods("worker")
    with partition(addresses(gang, first, last), CUT_S) as cut:
        assert tokens(gang, 300, cut.begin) == longer
    said = gang.kubectl("logs", first)
    assert "no heartbeat received" in said
    assert "has formed again (1)" in said
    assert restarts(gang, last) == 0

    assert kill_processes(f"HOSTNAME={last}")
    eventually(lambda: restarts(gang, last) >= 1, f"{last} restarted")
    eventually(lambda: answers(gang) == expected, "the same tokens again", 90)

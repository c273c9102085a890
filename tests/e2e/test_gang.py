"""A replica of several workers, by kubectl apply: it gives what one process gives, and heals as a whole.

Frontends and the operator reach its leader over mutual TLS.
"""

import secrets
from collections.abc import Iterator

import grpc
import pytest

import moe_worker
from localcluster import Cluster
from tests.e2e.serving import EXAMPLE, Served, eventually, kill_processes, request
from tests.operator.live import Live

PROMPT = "The kernel maps a page of memory"
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


def tokens(served):
    with served.frontend() as stub:
        return [
            token for response in stub.Generate(request(PROMPT, 24), timeout=120) for token in response.tokens
        ]


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


@pytest.mark.parametrize(
    ("pipeline", "expert"),
    [(1, 2), pytest.param(2, 2, marks=pytest.mark.slow), pytest.param(1, 4, marks=pytest.mark.slow)],
)
def test_a_gang_gives_the_tokens_of_one_process_and_heals(gang, pipeline, expert):
    expected = moe_worker.Engine(EXAMPLE).generate([PROMPT], moe_worker.SamplingParameters(max_tokens=24))[0]
    apply(gang, pipeline=pipeline, expert=expert)
    eventually(lambda: gang.ready().get("status") == "True", "the gang Ready", 240)
    assert tokens(gang) == expected.token_ids
    assert len(gang.pods("worker")) == pipeline * expert
    assert status(gang)["replicas"] == status(gang)["readyReplicas"] == 1

    last = gang.pods("worker")[-1]
    assert kill_processes(f"HOSTNAME={last}")
    eventually(lambda: restarts(gang, last) >= 1, f"{last} restarted")
    eventually(lambda: answers(gang) == expected.token_ids, "the same tokens again", 90)

"""A model that is not where the spec says, and a node that does not report: what users are told."""

from __future__ import annotations

import pytest

from tests.operator.live import Live, eventually, manifest


def test_a_model_that_is_not_there_is_the_reason(live: Live) -> None:
    live.apply(manifest("gone", model={"uri": "file:///mnt/models/nothing-here"}))
    condition = live.wait("Ready", "ContainerCreateFailed", "gone")
    assert condition["message"].startswith("0/1 replicas ready; gone-0-0: ")
    assert "/mnt/models/nothing-here does not exist on the node" in condition["message"]
    progressing = live.condition("Progressing", "gone")
    assert (progressing["status"], progressing["reason"]) == ("True", "Starting"), "the model may still come"
    live.patch("moed", "gone", {"spec": {"model": {"uri": "file:///mnt/models/docs-moe"}}})
    live.settled("gone")
    live.kubectl("delete", "moed", "gone")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_node_that_does_not_report_is_the_reason_and_costs_no_replica(live: Live) -> None:
    """Kubernetes waits 50 s before it calls a node NotReady."""
    live.apply(manifest("cut", replicas=2))
    live.settled("cut")
    before = {name: pod["metadata"]["uid"] for name, pod in live.leaders("cut").items()}
    node = live.leaders("cut")["cut-0-0"]["spec"]["nodeName"]
    with live.cluster.paused("kubelet"):
        condition = live.wait("Ready", "NodeNotReady", "cut", seconds=120)
        assert condition["message"].startswith("0/2 replicas ready; cut-0-0: ")
        assert f"node {node} does not report" in condition["message"]
        assert live.condition("Progressing", "cut")["reason"] == "Starting"
    live.settled("cut")
    assert {name: pod["metadata"]["uid"] for name, pod in live.leaders("cut").items()} == before
    assert len(eventually(lambda: live.events("NodeNotReady", "cut"), bool, "an event")) == 1
    live.kubectl("delete", "moed", "cut")

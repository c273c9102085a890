"""Rollouts on a real cluster, seen through `moe rollout`. Workers are stand-ins without a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from localcluster.errors import CommandError
from moe_operator.resources import quantity
from tests.operator.live import STANDIN_PATH, Live, eventually, manifest

MOE = Path(sys.executable).with_name("moe")
WORKER = {"env": [{"name": "PATH", "value": STANDIN_PATH}], "terminationGracePeriodSeconds": 5}


@pytest.fixture(scope="module")
def docs(live: Live) -> Live:
    live.apply(manifest(replicas=1))
    live.settled()
    return live


def moe(live: Live, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KUBECONFIG": str(live.cluster.kubeconfig)}
    command = [MOE, "rollout", words[0], "-n", live.namespace, *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=170, check=False, env=environment)


def revision(live: Live) -> str:
    return live.get("moed", "docs")["status"]["revision"]


def change(live: Live, size: int) -> None:
    live.patch("moed", "docs", {"spec": {"engine": {"maxBatchSize": size}}})


def test_status_waits_until_the_change_is_through(docs):
    before = revision(docs)
    change(docs, 4)
    done = moe(docs, "status", "docs")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"Complete: 1/1 replicas ready at revision {revision(docs)}"
    assert revision(docs) != before


def test_undo_brings_back_the_revision_before(docs):
    history = moe(docs, "history", "docs").stdout.splitlines()
    assert [line.split()[0] for line in history] == ["1", "2"]
    assert "engine.maxBatchSize=4" in history[1]
    assert history[1].split()[1] == revision(docs)
    first = history[0].split()[1]
    done = moe(docs, "undo", "docs")
    assert done.stdout == "docs rolls back to revision 1; watch it with `moe rollout status docs`\n", (
        done.stderr
    )
    docs.settled()
    assert revision(docs) == first
    assert "maxBatchSize" not in docs.get("moed", "docs")["spec"]["engine"]
    before, restored = moe(docs, "history", "docs").stdout.splitlines()
    assert (before.split()[0], restored.split()[0]) == ("2", "3")
    assert "(current, restored from revision 1)" in restored
    assert "(" not in before
    unknown = moe(docs, "undo", "docs", "--to-revision", "99")
    assert unknown.returncode == 2
    assert "has no revision 99 on record" in unknown.stderr


def test_restart_replaces_the_pods_of_an_unchanged_spec(docs):
    def pods():
        return {pod["metadata"]["uid"] for pod in docs.list("pods")}

    before, generation = pods(), docs.get("moed", "docs")["metadata"]["generation"]
    said = moe(docs, "restart", "docs").stdout
    assert said == "docs restarts; watch it with `moe rollout status docs`\n"
    done = moe(docs, "status", "docs")
    assert done.returncode == 0, done.stdout
    eventually(pods, lambda now: now and not now & before, "no pod of before is left")
    assert docs.get("moed", "docs")["metadata"]["generation"] == generation


def test_a_paused_change_waits(docs):
    before = docs.leaders().keys()
    assert moe(docs, "pause", "docs").stdout == "docs is paused\n"
    change(docs, 8)
    docs.wait("Progressing", "Paused", seconds=120)
    stuck = moe(docs, "status", "docs")
    assert stuck.returncode == 1
    assert "set spec.rollout.paused to false" in stuck.stdout
    assert docs.leaders().keys() == before
    assert moe(docs, "resume", "docs").stdout == "docs is resumed\n"
    docs.settled()
    assert docs.leaders().keys() != before


def test_a_change_that_fits_no_node_does_not_take_the_only_replica(docs):
    """A typo in a selector, then a device that no node has; on the real scheduler."""
    before = docs.leaders().keys()
    gpu = {"resources": {"limits": {"nvidia.com/gpu": 1}}}
    for worker, reason, why in (
        ({"nodeSelector": {"pool": "gpuu"}}, "Unschedulable", "node affinity/selector"),
        (gpu, "InsufficientCapacity", "would have 0 nvidia.com/gpu left, and 1 is requested"),
    ):
        docs.patch("moed", "docs", {"spec": {"worker": worker, "rollout": {"maxUnavailable": 1}}})
        docs.wait("Progressing", reason, why=why)
        assert docs.condition("Ready")["status"] == "True"
        assert before <= docs.leaders().keys()
        assert moe(docs, "undo", "docs").returncode == 0
        docs.settled()
    docs.patch("moed", "docs", {"spec": {"rollout": None}})
    assert docs.leaders().keys() == before


def cores_for(live: Live) -> Decimal:
    """What the node can give to pods of this namespace, once what terminates in others has ended."""
    (node,) = json.loads(live.kubectl("get", "nodes", "-o", "json"))["items"]
    spaces = json.loads(live.kubectl("get", "namespaces", "-o", "json"))["items"]
    others = {one["metadata"]["name"] for one in spaces if one["status"]["phase"] == "Active"}
    pods = json.loads(live.kubectl("get", "pods", "-A", "-o", "json"))["items"]
    taken = (
        quantity.parse(container.get("resources", {}).get("requests", {}).get("cpu", "0"))
        for pod in pods
        if pod["metadata"]["namespace"] in others - {live.namespace}
        and "deletionTimestamp" not in pod["metadata"]
        and pod["status"]["phase"] in ("Pending", "Running")
        for container in pod["spec"]["containers"]
    )
    return quantity.parse(node["status"]["allocatable"]["cpu"]) - sum(taken, Decimal(0))


def test_an_old_replica_makes_room_where_the_new_one_fits_in_its_place(docs):
    """A node that has room for one pod of this size, and not for two; on the real scheduler."""
    millicores = int(cores_for(docs) * 1000 * 6 // 10)
    docs.patch("moed", "docs", {"spec": {"worker": {"resources": {"requests": {"cpu": f"{millicores}m"}}}}})
    docs.settled()
    before = docs.leaders().keys()
    change(docs, 5)
    condition = docs.wait("Progressing", "InsufficientCapacity")
    assert "free resources, add a node, or undo the rollout" in condition["message"]
    assert docs.leaders().keys() > before, "by default the only replica stays"
    docs.patch("moed", "docs", {"spec": {"rollout": {"maxUnavailable": 1}}})
    docs.settled()
    assert not before & docs.leaders().keys()
    small = [{"op": "remove", "path": f"/spec/{path}"} for path in ("worker/resources", "rollout")]
    docs.kubectl("patch", "moed", "docs", "--type=json", "-p", json.dumps(small))
    docs.settled()


def test_where_nothing_fits_no_replica_is_given_up(docs):
    resources = {"requests": {"nvidia.com/gpu": 8}, "limits": {"nvidia.com/gpu": 8}}
    before = docs.leaders().keys()
    docs.patch(
        "moed", "docs", {"spec": {"worker": {"resources": resources}, "rollout": {"maxUnavailable": 0}}}
    )
    condition = docs.wait("Progressing", "InsufficientCapacity")
    assert "Insufficient nvidia.com/gpu" in condition["message"]
    assert docs.condition("Ready")["status"] == "True"
    assert before <= docs.leaders().keys()
    assert moe(docs, "undo", "docs").returncode == 0
    docs.settled()
    assert docs.leaders().keys() == before


def test_a_change_that_does_not_get_ready_in_time_stops(docs):
    before = docs.leaders().keys()
    env = [*WORKER["env"], {"name": "STANDIN_ERROR", "value": "the driver is too old"}]
    docs.patch("moed", "docs", {"spec": {"worker": {"env": env}, "rollout": {"progressDeadlineSeconds": 5}}})
    # The deadline may pass before the pod has said why it fails.
    docs.wait("Progressing", "ProgressDeadlineExceeded", why="the driver is too old")
    assert docs.condition("Ready")["status"] == "True"
    assert before <= docs.leaders().keys()
    docs.patch("moed", "docs", {"spec": {"worker": {"env": WORKER["env"]}}})
    docs.settled()
    eventually(docs.leaders, lambda pods: pods.keys() == before, "the replica that served all the time")


def ready(pod: dict[str, Any]) -> bool:
    return any((one["type"], one["status"]) == ("Ready", "True") for one in pod["status"]["conditions"])


def evicted(live: Live, pod: str) -> bool:
    """Evicts a pod, if the disruption budget allows it."""
    body = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": live.namespace},
    }
    path = f"/api/v1/namespaces/{live.namespace}/pods/{pod}/eviction"
    try:
        live.kubectl("create", "--raw", path, "-f", "-", input=json.dumps(body))
    except CommandError as error:
        if "disruption budget" not in str(error):
            raise
        return False
    return True


def test_a_drained_node_takes_one_replica_at_a_time(docs):
    docs.kubectl("scale", "moed/docs", "--replicas=2")
    docs.settled()
    first, second = docs.leaders()
    before = {pod["metadata"]["uid"] for pod in docs.leaders().values()}
    # As `kubectl drain` does: ask again until the budget, which follows the pods a little later, allows it.
    eventually(lambda: evicted(docs, first), bool, "the first may go")
    eventually(lambda: evicted(docs, second), bool, "the second may go")
    others = (pod for pod in docs.leaders().values() if pod["metadata"]["uid"] not in before)
    assert any(ready(pod) for pod in others), "not before another one took the place of the first"
    docs.settled()

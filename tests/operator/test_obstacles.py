"""What keeps a pod from being ready is the reason of a condition, in plans as timelines."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from moe_operator.planner.plan import plan
from moe_operator.render.objects import Key
from moe_operator.resources import names
from moe_operator.resources.status import PROGRESSING, READY
from tests.operator.worlds import World, deployment, settled

POD_PROBLEMS = {
    "ImagePullFailed": {
        "containerStatuses": [
            {
                "name": "worker",
                "ready": False,
                "image": "nowhere/worker:1",
                "state": {"waiting": {"reason": "ErrImagePull", "message": "no such image; there are a, b"}},
            }
        ]
    },
    "Unschedulable": {
        "conditions": [
            {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.",
            }
        ]
    },
    "PodFailed": {
        "phase": "Failed",
        "reason": "UnexpectedAdmissionError",
        "message": "Pod was rejected: Allocate failed due to no healthy devices present",
    },
    "ContainerCrashed": {
        "containerStatuses": [
            {
                "name": "worker",
                "ready": False,
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {
                    "terminated": {"exitCode": 137, "reason": "OOMKilled", "message": "no error line"}
                },
            }
        ]
    },
}


def test_a_command_that_does_not_exist_is_the_reason_also_while_the_next_try_waits():
    world = World(deployment())
    world.step()
    end = {"exitCode": 128, "reason": "StartError", "message": 'exec: "moe-worker": not found'}
    waiting = {
        "waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container"}
    }
    container = {"name": "worker", "ready": False, "state": waiting, "lastState": {"terminated": end}}
    world.pods["docs-0-0"]["status"] = {"containerStatuses": [container]}
    world.step()
    assert world.condition(READY).reason == "ContainerCreateFailed"
    assert world.condition(READY).message.endswith('docs-0-0: exec: "moe-worker": not found')


@pytest.mark.parametrize("reason", POD_PROBLEMS)
def test_what_keeps_a_pod_down_is_the_reason_of_the_condition(reason):
    world = World(deployment())
    world.step()
    world.pods["docs-0-0"]["status"] = POD_PROBLEMS[reason]
    plan = world.step()
    assert world.condition(READY).reason == reason
    assert (world.condition(PROGRESSING).status, world.condition(PROGRESSING).reason) == (
        "True",
        "Starting",
    ), "a node, a registry or the next try may still help"
    warnings = [decision for decision in plan.decisions if decision.warning]
    assert [decision.reason for decision in warnings] == [reason]


def test_a_crashed_worker_that_starts_again_is_progress():
    world = settled()
    world.pods["docs-1-0"]["status"] = {
        "containerStatuses": [
            {
                "name": "worker",
                "ready": False,
                "state": {"running": {}},
                "lastState": {"terminated": {"exitCode": 137, "reason": "Error"}},
            }
        ]
    }
    world.step()
    assert world.condition(READY).message == (
        "1/2 replicas ready; docs-1-0: worker ended with exit code 137 (SIGKILL): usual causes are its "
        "memory limit, its liveness probe and its node; it is started again"
    )
    assert (world.condition(PROGRESSING).status, world.condition(PROGRESSING).reason) == (
        "True",
        "Starting",
    )


def test_a_replica_whose_node_is_away_says_so_and_is_back_when_the_node_is():
    world = settled()
    world.pods["docs-1-0"]["spec"] = {"nodeName": "rack-7"}
    world.lose_node(1)
    plan = world.step()
    ready = world.condition(READY)
    assert (ready.status, ready.reason) == ("False", "NodeNotReady")
    assert ready.message.startswith("1/2 replicas ready; docs-1-0: node rack-7 does not report")
    assert (world.condition(PROGRESSING).status, world.condition(PROGRESSING).reason) == (
        "True",
        "Starting",
    )
    assert (plan.apply, plan.delete) == ((), ())
    assert [decision.warning for decision in plan.decisions if decision.reason == "NodeNotReady"] == [True]
    world.all_ready()
    world.step()
    assert world.condition(READY).status == "True"


def test_another_replica_takes_the_place_of_one_whose_node_is_gone():
    world = settled()
    world.lose_node(1)
    world.evict(1, grace_s=30)
    plan = world.step()
    assert plan.recheck
    assert (plan.apply, plan.delete) == ((), ())
    world.now += timedelta(seconds=60)
    plan = world.step()
    assert [deletion.key.name for deletion in plan.delete] == ["docs-1"]
    assert sorted(world.revisions()) == [0, 2], "the name of the pod that does not end stays taken"
    (removed,) = (one for one in plan.decisions if one.reason == "ReplicaRemoved")
    assert removed.message.endswith("its pod does not end, and its node does not respond")
    world.ready(2)
    world.step()
    assert (world.condition(READY).status, world.condition(PROGRESSING).reason) == ("True", "Complete")
    assert sorted(world.pods) == ["docs-0-0", "docs-1-0", "docs-2-0"]


def test_a_frontend_that_fails_is_the_reason():
    world = settled()
    world.frontend_ready(0)
    end = {"terminated": {"exitCode": 2, "message": "error: --listen: there is no port 99999"}}
    world.pods["docs-frontend-x"] = {
        "metadata": {
            "name": "docs-frontend-x",
            "labels": {"serving.moe-operator.dev/name": "docs", "serving.moe-operator.dev/role": "frontend"},
        },
        "status": {"containerStatuses": [{"name": "frontend", "ready": False, "state": end}]},
    }
    world.step()
    assert world.condition(READY).reason == "FrontendFailed"
    assert "--listen: there is no port 99999" in world.condition(READY).message


def test_a_new_frontend_that_cannot_start_is_said_while_the_old_one_serves():
    world = settled()
    world.change(frontend={"image": "nope:1"})
    world.step()
    world.children[Key("Deployment", "docs-frontend")]["status"] = {
        "replicas": 2,
        "updatedReplicas": 1,
        "readyReplicas": 1,
    }
    world.step()
    assert world.condition(PROGRESSING).message == "1/1 frontends ready; the frontend rolls out"
    world.pods["docs-frontend-y"] = {
        "metadata": {
            "name": "docs-frontend-y",
            "labels": {"serving.moe-operator.dev/name": "docs", "serving.moe-operator.dev/role": "frontend"},
        },
        "status": POD_PROBLEMS["ImagePullFailed"],
    }
    world.step()
    assert world.condition(READY).status == "True"
    assert (world.condition(PROGRESSING).status, world.condition(PROGRESSING).reason) == (
        "True",
        "RollingOut",
    )
    assert "docs-frontend-y: no such image" in world.condition(PROGRESSING).message


def test_an_evicted_frontend_is_the_reason_for_a_minute():
    """Its pod stays for good, and its successor has another name."""
    world = settled()
    world.frontend_ready(0)
    pod = {"name": "docs-frontend-x", "labels": names.frontend_labels("docs")}
    said = "The node was low on resource: memory."
    world.pods[pod["name"]] = {
        "metadata": pod | {"creationTimestamp": (world.now - timedelta(days=1)).isoformat()},
        "spec": {"nodeName": "n"},
        "status": {
            "phase": "Failed",
            "reason": "Evicted",
            "message": said,
            "conditions": [{"type": "Ready", "status": "False", "lastTransitionTime": world.now.isoformat()}],
        },
    }
    due = world.now + timedelta(seconds=60)
    assert world.step().due == due
    assert world.condition(READY).message == (
        "2/2 replicas ready; 0/1 frontends ready; docs-frontend-x: node n evicted or rejected the pod "
        f"(Evicted); remove the cause; another pod takes its place by itself; the kubelet says: {said}"
    )
    world.now = due
    assert world.step().due is None
    assert world.condition(READY).reason == "FrontendNotReady"


def test_a_pod_that_no_scheduler_looks_at_is_the_reason():
    world = World(deployment(worker={"podTemplate": {"spec": {"schedulerName": "volcano"}}}))
    world.step()
    world.pods["docs-0-0"]["metadata"]["creationTimestamp"] = world.now.isoformat()
    world.pods["docs-0-0"] |= {"spec": {"schedulerName": "volcano"}, "status": {"phase": "Pending"}}
    due = world.now + timedelta(seconds=30)
    assert world.step().due == due
    assert world.condition(READY).reason == "ReplicasNotReady"
    world.now = due
    world.step()
    assert world.condition(READY).reason == "NotScheduled"
    assert world.condition(READY).message == (
        "0/1 replicas ready; docs-0-0: no scheduler has tried to place it; check that the scheduler volcano "
        "runs, or correct schedulerName in the podTemplate"
    )


def mounting(world: World, secret: str, reason: str = "ContainerCreating") -> dict[str, Any]:
    """A pod whose node looks for a Secret, as the kubelet reports it."""
    since = world.now.isoformat()
    containers = [{"name": "any", "ready": False, "state": {"waiting": {"reason": reason}}}]
    return {
        "spec": {
            "nodeName": "node",
            "volumes": [
                {"name": "moe-tls", "secret": {"secretName": secret}},
                {"name": "more", "secret": {"secretName": "not-needed", "optional": True}},
                {"name": "own", "secret": {"secretName": "moe-internal-worker"}},
            ],
        },
        "status": {
            "phase": "Pending",
            "conditions": [
                {"type": "PodReadyToStartContainers", "status": "False", "lastTransitionTime": since},
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": since},
            ],
            "containerStatuses": containers,
            **({"initContainerStatuses": containers} if reason == "PodInitializing" else {}),
        },
    }


UNMOUNTED = (
    "node node has not mounted its volumes or not set up its network; check that these Secrets exist: nope; "
    "its events say why (kubectl describe pod)"
)


def test_a_frontend_whose_secret_is_missing_says_so_in_time():
    world = settled()
    world.change(frontend={"tls": {"secretName": "nope"}})
    world.step()
    counts = {"replicas": 2, "updatedReplicas": 1, "readyReplicas": 1}
    world.children[Key("Deployment", "docs-frontend")]["status"] = counts
    labels = {"serving.moe-operator.dev/name": "docs", "serving.moe-operator.dev/role": "frontend"}
    world.pods["docs-frontend-y"] = {
        "metadata": {"name": "docs-frontend-y", "labels": labels},
        **mounting(world, "nope"),
    }
    rolling = "1/1 frontends ready; the frontend rolls out"
    due = world.now + timedelta(seconds=30)
    assert world.step().due == due
    assert world.condition(PROGRESSING).message == rolling
    world.now = due
    assert world.step().due is None
    assert world.condition(PROGRESSING).message == f"{rolling}; docs-frontend-y: {UNMOUNTED}"
    assert world.condition(READY).status == "True"


@pytest.mark.parametrize("reason", ["ContainerCreating", "PodInitializing"])
def test_a_worker_whose_secret_is_missing_is_the_reason(reason):
    """The kubelet's reason is the second one for a pod with init containers, such as one that downloads."""
    world = World(deployment())
    world.step()
    world.pods["docs-0-0"] |= mounting(world, "nope", reason)
    world.now += timedelta(seconds=29)
    world.step()
    assert world.condition(READY).reason == "ReplicasNotReady"
    world.now += timedelta(seconds=1)
    world.step()
    assert world.condition(READY).reason == "VolumesNotMounted"
    assert world.condition(READY).message == f"0/1 replicas ready; docs-0-0: {UNMOUNTED}"


def test_a_pod_that_somebody_refuses_is_the_reason_and_is_checked_again():
    world = World(deployment())
    world.step()
    world.pods.clear()
    replica = world.children[Key("StatefulSet", "docs-0")]
    replica["status"] = {"observedGeneration": 1, "replicas": 0}
    why = 'create Pod docs-0-0 failed error: pods "docs-0-0" is forbidden: violates PodSecurity'
    todo = plan(world.deployment, world.observed(refused={"docs-0-0": why}), world.now)
    ready = todo.status.condition(READY)
    assert ready.reason == "PodRefused"
    assert ready.message == (
        "0/1 replicas ready; docs-0-0: the namespace's Pod Security level forbids the pod; relax it, and "
        f"Kubernetes tries again by itself; the API server says: {why}"
    )
    assert todo.status.condition(PROGRESSING).message == ready.message
    assert todo.recheck

"""The plan as timelines: what the operator does, step by step, and what it says meanwhile."""

from __future__ import annotations

import copy
import dataclasses
from datetime import timedelta
from typing import Any

import pytest

from moe_operator.observed import children
from moe_operator.planner.pinning import with_pins
from moe_operator.planner.plan import Plan, plan
from moe_operator.planner.status_report import invalid, refused, transitions
from moe_operator.render.objects import Key, key
from moe_operator.render.worker import recipe
from moe_operator.resources import names
from moe_operator.resources.deployment import Identity
from moe_operator.resources.status import MODEL_LOADED, PROGRESSING, READY, Condition, Status
from tests.operator.worlds import START, World, deployment, settled


def condition(world: World, kind: str) -> Condition:
    found = world.status.condition(kind)
    assert found is not None
    return found


def kinds(plan: Plan) -> list[str]:
    return [manifest["kind"] for manifest in plan.apply]


def reasons(plan: Plan) -> list[str]:
    return [decision.reason for decision in plan.decisions]


def test_a_new_deployment_gets_its_objects_accounts_first():
    world = World(deployment(replicas=2))
    plan = world.step()
    kinds = [key(manifest) for manifest in plan.apply]
    assert kinds == [
        Key("ServiceAccount", "docs-worker"),
        Key("ServiceAccount", "docs-frontend"),
        Key("Role", "docs-frontend"),
        Key("RoleBinding", "docs-frontend"),
        Key("Service", "docs-workers"),
        Key("PodDisruptionBudget", "docs-workers"),
        Key("Service", "docs-frontend"),
        Key("Deployment", "docs-frontend"),
        Key("ControllerRevision", f"docs-{world.status.revision}"),
        Key("StatefulSet", "docs-0"),
        Key("StatefulSet", "docs-1"),
    ]
    assert all(m["metadata"]["ownerReferences"][0]["uid"] == "uid-docs" for m in plan.apply)
    assert reasons(plan) == ["Created", "ReplicasNotReady", "Starting"]


def test_it_becomes_ready_when_every_replica_and_the_frontend_answer():
    world = World(deployment(replicas=2))
    world.step()
    world.ready(0)
    world.step()
    assert condition(world, READY).reason == "ReplicasNotReady"
    assert "1/2 replicas ready; waiting for docs-1-0" in condition(world, READY).message
    assert condition(world, MODEL_LOADED).status == "True"
    world.ready(1)
    world.step()
    assert condition(world, READY).reason == "FrontendNotReady"
    world.frontend_ready()
    world.step()
    assert (condition(world, READY).status, condition(world, READY).reason) == ("True", "AllReplicasReady")
    assert condition(world, PROGRESSING).reason == "Complete"


def test_a_settled_deployment_is_left_alone():
    plan = settled().step()
    assert (plan.apply, plan.delete, plan.decisions, plan.recheck) == ((), (), (), False)


def test_a_transition_keeps_its_time_until_the_status_changes():
    world = World(deployment())
    world.step()
    first = condition(world, READY).last_transition_time
    world.now += timedelta(minutes=5)
    world.fail(0, 2, "error: no such directory")
    world.step()
    assert condition(world, READY).reason == "ModelLoadFailed"
    assert condition(world, READY).last_transition_time == first == "2026-01-01T00:00:00Z"
    world.ready(0)
    world.frontend_ready()
    world.step()
    assert condition(world, READY).last_transition_time == "2026-01-01T00:05:02Z"
    assert world.now > START


def test_a_change_brings_new_replicas_before_old_ones_leave():
    world = settled(replicas=2)
    old = world.revisions()[0]
    world.change(engine={"maxBatchSize": 4})
    seen = []
    for _ in range(6):
        world.step()
        seen.append({rank: revision == old for rank, revision in world.revisions().items()})
        assert condition(world, READY).status == "True"
        assert world.serving() >= 2
        world.all_ready()
    assert seen[:4] == [
        {0: True, 1: True, 2: False},
        {0: True, 2: False},
        {0: True, 1: False, 2: False},
        {1: False, 2: False},
    ]
    assert condition(world, PROGRESSING).reason == "Complete"
    assert (world.status.updated_replicas, world.status.rollout) == (2, None)


def test_where_there_is_no_room_an_old_replica_makes_it():
    world = settled(replicas=2)
    world.change(engine={"maxBatchSize": 4})
    world.step()
    world.unplace(2)
    assert world.step().recheck, "no event says that time has passed"
    assert sorted(world.revisions()) == [0, 1, 2], "the scheduler may still find a node"
    world.now += timedelta(seconds=10)
    plan = world.step()
    assert [deletion.key.name for deletion in plan.delete] == ["docs-1"]
    world.step()
    assert sorted(world.revisions()) == [0, 2]
    assert condition(world, READY).status == "False"
    world.ready(2)
    world.step()
    assert condition(world, READY).status == "True"


@pytest.mark.parametrize("surge", [0, 1])
def test_the_only_replica_stays_where_the_new_one_would_not_fit_in_its_place(surge):
    """Not even where the user lets it be missing: a typo must not take the last one that serves."""
    world = settled(replicas=1, rollout={"maxSurge": surge, "maxUnavailable": 1})
    world.obstacle = "node n1 lacks the label pool=gpuu"
    world.change(worker={"nodeSelector": {"pool": "gpuu"}})
    for _ in range(20):
        todo = world.step()
        assert (todo.delete, world.serving()) == ((), 1)
        for rank in world.revisions().keys() - {0}:
            world.unplace(rank, message="0/1 nodes are available: 1 node(s) didn't match Pod's selector.")
        world.now += timedelta(seconds=10)
    assert sorted(world.revisions()) == [0, 1][: surge + 1]
    assert condition(world, READY).status == "True"
    found = condition(world, PROGRESSING)
    if surge == 1:
        assert (found.reason, found.message.partition(":")[0]) == ("Unschedulable", "docs-1-0")
    else:
        assert found.reason == "InsufficientCapacity"
        assert "would not fit in the place of docs-0-0: node n1 lacks the label pool=gpuu" in found.message
    world.change(worker={})
    world.step()
    world.step()
    assert sorted(world.revisions()) == [0]
    assert condition(world, PROGRESSING).reason == "Complete"


@pytest.mark.parametrize(("unavailable", "gone"), [(1, []), (2, ["docs-0", "docs-1"])])
def test_two_old_replicas_make_room_together_where_both_may_be_missing(unavailable, gone):
    world = settled(replicas=2, rollout={"maxUnavailable": unavailable})
    world.obstacle, world.together = "node n1 would have 2 nvidia.com/gpu left, and 4 is requested", True
    world.change(worker={"resources": {"limits": {"nvidia.com/gpu": 4}}})
    world.step()
    world.unplace(2)
    world.now += timedelta(seconds=10)
    assert sorted(deletion.key.name for deletion in world.step().delete) == gone


def test_the_only_replica_makes_room_only_where_the_user_lets_it_be_missing():
    for rollout, stays in (({}, True), ({"maxUnavailable": 1}, False), ({"maxSurge": 0}, False)):
        world = settled(replicas=1, rollout=rollout)
        world.change(engine={"maxBatchSize": 4})
        world.step()
        if rollout.get("maxSurge") != 0:
            world.unplace(1)
        world.now += timedelta(seconds=10)
        world.step()
        assert (world.serving() == 1) == stays, rollout
        if stays:
            found = condition(world, PROGRESSING)
            assert found.reason == "InsufficientCapacity"
            assert "free resources, add a node, or undo the rollout" in found.message


def test_a_replica_that_is_slow_to_answer_survives_a_broken_change():
    world = settled(replicas=1)
    world.change(worker={"image": "nope:1"})
    world.step()
    world.falter(0)
    assert world.step().delete == ()
    world.ready(0)
    world.step()
    assert condition(world, READY).status == "True"
    world.falter(0)
    world.now += timedelta(seconds=61)
    assert [deletion.key.name for deletion in world.step().delete] == ["docs-0"]


def test_where_no_old_replica_may_make_room_the_condition_says_so():
    world = settled(replicas=2, rollout={"maxUnavailable": 0})
    world.change(engine={"maxBatchSize": 4})
    world.step()
    world.unplace(2)
    world.now += timedelta(seconds=10)
    for _ in range(3):
        assert world.step().delete == ()
    found = condition(world, PROGRESSING)
    assert (found.status, found.reason) == ("True", "InsufficientCapacity")
    assert "Insufficient nvidia.com/gpu" in found.message
    assert "spec.rollout.maxUnavailable" in found.message
    assert condition(world, READY).status == "True"


def test_a_broken_change_leaves_what_serves_alone_and_its_repair_takes_it_away():
    world = settled(replicas=3)
    good = world.revisions()[0]
    world.change(model={"uri": "file:///mnt/models/missing"})
    world.step()
    world.fail(3, 2, "loading\nerror: /mnt/models/missing/config.json: no such file\n")
    for _ in range(3):
        world.step()
    assert sum(revision == good for revision in world.revisions().values()) == 3
    assert condition(world, READY).status == "True"
    assert condition(world, PROGRESSING).message == (
        "docs-3-0 cannot start: /mnt/models/missing/config.json: no such file"
    )
    world.change(model={"uri": "file:///mnt/models/docs-moe"})
    plan = world.step()
    assert [deletion.key.name for deletion in plan.delete] == ["docs-3"]
    assert kinds(plan) == ["ControllerRevision"], "of which the good one is the newest again"
    world.step()
    assert (set(world.revisions().values()), condition(world, PROGRESSING).reason) == ({good}, "Complete")


def test_a_rollout_that_comes_no_further_stops_at_its_deadline():
    world = settled(replicas=2, rollout={"progressDeadlineSeconds": 60})
    world.change(engine={"maxBatchSize": 4})
    world.step()
    world.ready(2)
    world.step()
    world.step()
    world.now += timedelta(seconds=61)
    before = world.revisions()
    world.step()
    found = condition(world, PROGRESSING)
    assert (found.status, found.reason) == ("False", "ProgressDeadlineExceeded")
    assert "nothing further was ready for 60 s" in found.message
    assert world.revisions() == before
    assert condition(world, READY).status == "True"
    world.ready(*before)
    for _ in range(3):
        world.step()
        world.all_ready()
    assert condition(world, PROGRESSING).reason == "Complete", "late is better than never"


def test_a_paused_rollout_changes_nothing_and_scales_at_the_old_revision():
    world = settled(replicas=2)
    old = world.revisions()[0]
    world.change(engine={"maxBatchSize": 4}, rollout={"paused": True})
    assert "StatefulSet" not in kinds(world.step())
    assert condition(world, PROGRESSING).reason == "Paused"
    world.change(replicas=3)
    world.step()
    assert world.revisions() == {0: old, 1: old, 2: old}
    world.all_ready()
    assert world.step().apply == ()
    world.change(rollout={"paused": False})
    for _ in range(8):
        world.step()
        world.all_ready()
    assert old not in world.revisions().values()


def test_a_paused_rollout_scales_at_the_old_revision_of_a_replica_that_lost_its_label():
    """The pods say which revision a replica has; another client may have removed the label of its set."""
    world = settled(replicas=1)
    old = world.revisions()[0]
    del world.children[Key("StatefulSet", "docs-0")]["metadata"]["labels"][names.LABEL_REVISION]
    world.change(engine={"maxBatchSize": 4}, rollout={"paused": True}, replicas=2)
    world.step()
    assert world.revisions() == {0: old, 1: old}


def test_a_partition_keeps_so_many_at_the_old_revision():
    world = settled(replicas=3)
    old = world.revisions()[0]
    world.change(engine={"maxBatchSize": 4}, rollout={"partition": 2})
    for _ in range(6):
        world.step()
        world.all_ready()
    assert sorted(revision == old for revision in world.revisions().values()) == [False, True, True]
    found = condition(world, PROGRESSING)
    assert (found.status, found.reason) == ("True", "PartitionReached")
    assert found.message.endswith("spec.rollout.partition leaves 2 at an older one")


def test_replicas_that_do_not_serve_are_replaced_at_once():
    world = World(deployment(replicas=3, model={"uri": "file:///mnt/models/missing"}))
    world.step()
    broken = set(world.revisions().values())
    world.change(model={"uri": "file:///mnt/models/docs-moe"})
    world.step()
    world.step()
    assert len(world.revisions()) == 3
    assert not broken & set(world.revisions().values())


def test_scaling_down_deletes_the_highest_ranks_first():
    world = settled(replicas=4)
    world.change(replicas=2)
    plan = world.step()
    assert [deletion.key.name for deletion in plan.delete] == ["docs-3", "docs-2"]
    assert "ReplicaRemoved" in reasons(plan)
    world.step()
    assert (world.status.replicas, condition(world, READY).status) == (2, "True")


def test_of_replicas_that_may_leave_the_least_busy_does():
    world = settled(replicas=3)
    world.change(replicas=2)
    assert {pod.name for pod in world.look().choice} == {"docs-0-0", "docs-1-0", "docs-2-0"}
    world.work = {"docs-0-0": 3, "docs-1-0": 1, "docs-2-0": 2}
    plan = world.step()
    assert [deletion.key.name for deletion in plan.delete] == ["docs-1"]
    assert plan.drain == ("10.244.0.9",)
    (removal,) = (found for found in plan.decisions if found.reason == "ReplicaRemoved")
    assert removal.message == "deleted StatefulSet docs-1: 2 wanted; it finishes 1 requests"


def test_scaling_does_not_restart_the_replicas_that_stay():
    world = settled(replicas=2)
    world.change(replicas=3)
    assert [key(manifest).name for manifest in world.step().apply] == ["docs-2"]


def test_no_replicas_is_a_state_of_its_own():
    world = settled(replicas=1)
    world.change(replicas=0)
    world.step()
    world.step()
    assert (condition(world, READY).status, condition(world, READY).reason) == ("True", "ScaledToZero")
    assert condition(world, PROGRESSING).reason == "Complete"


def test_drift_of_a_field_is_corrected_with_a_warning():
    world = settled()
    world.children[Key("StatefulSet", "docs-1")]["spec"]["replicas"] = 5
    plan = world.step()
    assert [key(manifest).name for manifest in plan.apply] == ["docs-1"]
    (decision,) = (found for found in plan.decisions if found.reason == "DriftCorrected")
    assert decision.warning
    assert "StatefulSet docs-1: spec.replicas" in decision.message


def test_a_deleted_child_is_recreated_with_a_warning():
    world = settled()
    del world.children[Key("Service", "docs-workers")]
    plan = world.step()
    assert [key(manifest) for manifest in plan.apply] == [Key("Service", "docs-workers")]
    assert "Recreated" in reasons(plan)


def test_defaults_and_fields_of_others_are_no_difference():
    world = settled()
    child = world.children[Key("StatefulSet", "docs-0")]
    child["spec"]["persistentVolumeClaimRetentionPolicy"] = {"whenDeleted": "Retain"}
    child["metadata"]["annotations"]["someone.else/note"] = "hello"
    assert world.step().apply == ()


def test_an_amount_in_another_spelling_is_no_difference():
    world = settled(worker={"resources": {"requests": {"cpu": "0.5", "memory": 1073741824}}})
    pod = world.children[Key("StatefulSet", "docs-0")]["spec"]["template"]["spec"]
    pod["containers"][0]["resources"]["requests"] = {"cpu": "500m", "memory": "1Gi"}
    assert world.step().apply == ()
    pod["containers"][0]["resources"]["requests"]["cpu"] = "600m"
    assert len(world.step().apply) == 1


def test_objects_of_others_are_never_touched():
    world = World(deployment(replicas=2))
    name = Key("StatefulSet", "docs-1")
    world.children[name] = {"kind": "StatefulSet", "metadata": {"name": "docs-1", "uid": "other"}, "spec": {}}
    plan = world.step()
    assert [key(manifest).name for manifest in plan.apply if manifest["kind"] == "StatefulSet"] == [
        "docs-0",
        "docs-2",
    ]
    world.change(replicas=1)
    assert [deletion.key.name for deletion in world.step().delete] == ["docs-2"]


def test_a_child_whose_owner_was_taken_away_is_adopted_without_a_restart():
    world = settled()
    before = world.revisions()
    for name in (Key("Service", "docs-workers"), Key("StatefulSet", "docs-1")):
        del world.children[name]["metadata"]["ownerReferences"]
    plan = world.step()
    assert {change.message for change in plan.decisions if change.reason == "DriftCorrected"} == {
        "Service docs-workers: metadata.ownerReferences was changed by another client; drift corrected",
        "StatefulSet docs-1: metadata.ownerReferences was changed by another client; drift corrected",
    }
    assert world.step().apply == ()
    assert (world.revisions(), condition(world, READY).status) == (before, "True")


def test_a_child_that_another_object_controls_is_left_alone():
    world = settled()
    name = Key("Service", "docs-workers")
    world.children[name]["metadata"]["ownerReferences"] = [{"uid": "another", "controller": True}]
    assert world.step().apply == ()
    assert condition(world, READY).reason == "NameConflict"


def test_the_model_is_asked_for_once_a_revision():
    world = World(deployment())
    world.step()
    assert not world.look().recheck
    world.ready(0)
    assert world.look().recheck
    settled_world = settled()
    assert not settled_world.look().recheck
    assert (
        "11.2M parameters of which a token uses 4.1M, in fp32"
        in condition(settled_world, MODEL_LOADED).message
    )


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
    assert condition(world, READY).reason == "ContainerCreateFailed"
    assert condition(world, READY).message.endswith('docs-0-0: exec: "moe-worker": not found')


@pytest.mark.parametrize("reason", POD_PROBLEMS)
def test_what_keeps_a_pod_down_is_the_reason_of_the_condition(reason):
    world = World(deployment())
    world.step()
    world.pods["docs-0-0"]["status"] = POD_PROBLEMS[reason]
    plan = world.step()
    assert condition(world, READY).reason == reason
    assert (condition(world, PROGRESSING).status, condition(world, PROGRESSING).reason) == (
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
    assert condition(world, READY).message == (
        "1/2 replicas ready; docs-1-0: worker ended with exit code 137 (SIGKILL): usual causes are its "
        "memory limit, its liveness probe and its node; it is started again"
    )
    assert (condition(world, PROGRESSING).status, condition(world, PROGRESSING).reason) == (
        "True",
        "Starting",
    )


def test_a_replica_whose_node_is_away_says_so_and_is_back_when_the_node_is():
    world = settled()
    world.pods["docs-1-0"]["spec"] = {"nodeName": "rack-7"}
    world.lose_node(1)
    plan = world.step()
    ready = condition(world, READY)
    assert (ready.status, ready.reason) == ("False", "NodeNotReady")
    assert ready.message.startswith("1/2 replicas ready; docs-1-0: node rack-7 does not report")
    assert (condition(world, PROGRESSING).status, condition(world, PROGRESSING).reason) == (
        "True",
        "Starting",
    )
    assert (plan.apply, plan.delete) == ((), ())
    assert [decision.warning for decision in plan.decisions if decision.reason == "NodeNotReady"] == [True]
    world.all_ready()
    world.step()
    assert condition(world, READY).status == "True"


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
    assert (condition(world, READY).status, condition(world, PROGRESSING).reason) == ("True", "Complete")
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
    assert condition(world, READY).reason == "FrontendFailed"
    assert "--listen: there is no port 99999" in condition(world, READY).message


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
    assert condition(world, PROGRESSING).message == "1/1 frontends ready; the frontend rolls out"
    world.pods["docs-frontend-y"] = {
        "metadata": {
            "name": "docs-frontend-y",
            "labels": {"serving.moe-operator.dev/name": "docs", "serving.moe-operator.dev/role": "frontend"},
        },
        "status": POD_PROBLEMS["ImagePullFailed"],
    }
    world.step()
    assert condition(world, READY).status == "True"
    assert (condition(world, PROGRESSING).status, condition(world, PROGRESSING).reason) == (
        "True",
        "RollingOut",
    )
    assert "docs-frontend-y: no such image" in condition(world, PROGRESSING).message


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
    assert condition(world, PROGRESSING).message == rolling
    world.now = due
    assert world.step().due is None
    assert condition(world, PROGRESSING).message == f"{rolling}; docs-frontend-y: {UNMOUNTED}"
    assert condition(world, READY).status == "True"


@pytest.mark.parametrize("reason", ["ContainerCreating", "PodInitializing"])
def test_a_worker_whose_secret_is_missing_is_the_reason(reason):
    """The kubelet's reason is the second one for a pod with init containers, such as one that downloads."""
    world = World(deployment())
    world.step()
    world.pods["docs-0-0"] |= mounting(world, "nope", reason)
    world.now += timedelta(seconds=29)
    world.step()
    assert condition(world, READY).reason == "ReplicasNotReady"
    world.now += timedelta(seconds=1)
    world.step()
    assert condition(world, READY).reason == "VolumesNotMounted"
    assert condition(world, READY).message == f"0/1 replicas ready; docs-0-0: {UNMOUNTED}"


def test_what_two_conditions_say_alike_is_one_event():
    before = Status()
    after = invalid(before, deployment().identity, "no", START)
    assert [decision.message for decision in transitions(before, after)] == ["no"]


def test_a_refused_change_stops_the_progress_and_takes_nothing_away_from_replicas_that_serve():
    world = settled()
    serving = world.status
    world.change(worker={"resources": {"requests": {"cpu": 2}, "limits": {"cpu": 1}}})
    planned = world.look().status
    after = refused(serving, planned, "cpu: must be less than or equal to cpu limit of 1", world.now)
    ready, progressing = after.condition(READY), after.condition(PROGRESSING)
    assert (ready.status, ready.reason) == ("True", "AllReplicasReady")
    assert (progressing.status, progressing.reason) == ("False", "ApplyRefused")
    assert {c.observed_generation for c in after.conditions} == {world.deployment.identity.generation}
    (said,) = transitions(serving, after)
    assert (said.warning, said.message) == (True, "cpu: must be less than or equal to cpu limit of 1")


def test_a_refusal_is_why_a_new_deployment_is_not_ready():
    world = World(deployment())
    after = refused(world.status, world.look().status, "forbidden: exceeded quota", world.now)
    assert {c.type: c.reason for c in after.conditions if c.type in (READY, PROGRESSING)} == {
        READY: "ApplyRefused",
        PROGRESSING: "ApplyRefused",
    }


def records(world: World) -> dict[int, str]:
    """Numbers of the revisions on record, and their contextLength."""
    found = (child for name, child in world.children.items() if name.kind == "ControllerRevision")
    return {one["revision"]: one["data"]["spec"]["engine"].get("contextLength") for one in found}


def test_every_revision_is_on_record_the_newest_with_the_highest_number():
    world = settled(replicas=1, revisionHistoryLimit=2)
    for length in (100, 200, 300, 400):
        world.change(engine={"contextLength": length})
        for _ in range(4):
            world.step()
            world.all_ready()
    assert records(world) == {3: 200, 4: 300, 5: 400}
    world.change(engine={"contextLength": 300})
    world.step()
    assert records(world)[6] == 300


def test_a_pod_that_somebody_refuses_is_the_reason_and_is_looked_at_again():
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


# What was compared and has not changed since is not compared again.


def looks(world: World, verdicts: dict[Key, str]) -> Plan:
    observed = world.observed(model=world.model, verdicts=verdicts)
    return plan(with_pins(world.deployment, observed), observed, world.now)


def test_what_an_earlier_look_found_changes_no_plan_until_something_else_is_wanted():
    world = settled(replicas=3)
    first = looks(world, {})
    assert first.sound == tuple(Key("StatefulSet", f"docs-{rank}") for rank in range(3))
    verdicts = dict.fromkeys(first.sound, recipe(with_pins(world.deployment, world.observed())))
    again = looks(world, verdicts)
    assert (again.sound, again.apply, again.status) == ((), first.apply, first.status)
    for edit in ({"engine": {"maxBatchSize": 7}}, {"replicas": 1}, {"worker": {"resources": {}}}):
        world.change(**edit)
        fresh = looks(world, {})
        assert dataclasses.replace(looks(world, verdicts), sound=()) == dataclasses.replace(fresh, sound=())


def test_a_stateful_set_that_is_not_as_it_should_be_is_not_called_sound():
    world = settled(replicas=2)
    world.children[Key("StatefulSet", "docs-1")]["spec"]["serviceName"] = "another"
    found = looks(world, {})
    assert found.sound == (Key("StatefulSet", "docs-0"),)
    assert [key(manifest) for manifest in found.apply] == [Key("StatefulSet", "docs-1")]


# Whose an object is.


def orphan_of(world: World, kind: str, name: str) -> Key:
    """Takes the owner away, as `kubectl delete --cascade=orphan` does; returns the object's key."""
    found = Key(kind, name)
    del world.children[found]["metadata"]["ownerReferences"]
    return found


def belongs(manifest: dict[str, Any], owner: Identity) -> bool:
    return children.read(manifest).belongs_to(owner)


def test_an_orphan_is_adopted_where_its_labels_and_its_name_are_those_that_we_give():
    world = settled(replicas=1)
    owner = world.deployment.identity
    for found in [*world.children]:
        orphan = world.children[orphan_of(world, *found)]
        assert belongs(orphan, owner), found
        labels, metadata = orphan["metadata"]["labels"], orphan["metadata"]
        assert not belongs({**orphan, "metadata": {**metadata, "name": "another"}}, owner), found
        for label in ("app.kubernetes.io/managed-by", "serving.moe-operator.dev/name"):
            others = {**labels, label: "another"}
            assert not belongs({**orphan, "metadata": {**metadata, "labels": others}}, owner), found


def test_an_orphan_of_another_name_is_never_counted_as_a_replica():
    world = settled(replicas=1)
    copied = copy.deepcopy(world.children[orphan_of(world, "StatefulSet", "docs-0")])
    copied["metadata"]["name"] = "copied"
    world.children[Key("StatefulSet", "copied")] = copied
    world.change(replicas=0)
    assert [deletion.key.name for deletion in world.step().delete] == ["docs-0"]


def test_objects_of_a_deleted_deployment_of_the_same_name_are_waited_for_and_no_conflict():
    world = settled(replicas=1)
    again = World(dataclasses.replace(deployment(replicas=1), identity=Identity("default", "docs", "new", 1)))
    again.children, again.pods = copy.deepcopy(world.children), copy.deepcopy(world.pods)
    todo = again.look()
    assert {key(manifest).name for manifest in todo.apply} <= {"docs-1", *(n.name for n in again.children)}
    assert not [manifest for manifest in todo.apply if "uid" in manifest["metadata"]], "none is changed"
    reasons = {one.reason for one in todo.status.conditions}
    assert "NameConflict" not in reasons

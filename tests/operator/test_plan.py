"""The plan as timelines: what the operator does, step by step, and what it says meanwhile."""

from __future__ import annotations

from datetime import timedelta

import pytest

from moe_operator.planner.plan import Plan
from moe_operator.planner.status_report import invalid, refused, transitions
from moe_operator.render.objects import Key, key
from moe_operator.resources import names
from moe_operator.resources.status import MODEL_LOADED, PROGRESSING, READY, Status
from tests.operator.worlds import START, World, deployment, settled


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
    assert world.condition(READY).reason == "ReplicasNotReady"
    assert "1/2 replicas ready; waiting for docs-1-0" in world.condition(READY).message
    assert world.condition(MODEL_LOADED).status == "True"
    world.ready(1)
    world.step()
    assert world.condition(READY).reason == "FrontendNotReady"
    world.frontend_ready()
    world.step()
    assert (world.condition(READY).status, world.condition(READY).reason) == ("True", "AllReplicasReady")
    assert world.condition(PROGRESSING).reason == "Complete"


def test_a_settled_deployment_is_left_alone():
    plan = settled().step()
    assert (plan.apply, plan.delete, plan.decisions, plan.recheck) == ((), (), (), False)


def test_a_transition_keeps_its_time_until_the_status_changes():
    world = World(deployment())
    world.step()
    first = world.condition(READY).last_transition_time
    world.now += timedelta(minutes=5)
    world.fail(0, 2, "error: no such directory")
    world.step()
    assert world.condition(READY).reason == "ModelLoadFailed"
    assert world.condition(READY).last_transition_time == first == "2026-01-01T00:00:00Z"
    world.ready(0)
    world.frontend_ready()
    world.step()
    assert world.condition(READY).last_transition_time == "2026-01-01T00:05:02Z"
    assert world.now > START


def test_a_change_brings_new_replicas_before_old_ones_leave():
    world = settled(replicas=2)
    old = world.revisions()[0]
    world.change(engine={"maxBatchSize": 4})
    seen = []
    for _ in range(6):
        world.step()
        seen.append({rank: revision == old for rank, revision in world.revisions().items()})
        assert world.condition(READY).status == "True"
        assert world.serving() >= 2
        world.all_ready()
    assert seen[:4] == [
        {0: True, 1: True, 2: False},
        {0: True, 2: False},
        {0: True, 1: False, 2: False},
        {1: False, 2: False},
    ]
    assert world.condition(PROGRESSING).reason == "Complete"
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
    assert world.condition(READY).status == "False"
    world.ready(2)
    world.step()
    assert world.condition(READY).status == "True"


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
    assert world.condition(READY).status == "True"
    found = world.condition(PROGRESSING)
    if surge == 1:
        assert (found.reason, found.message.partition(":")[0]) == ("Unschedulable", "docs-1-0")
    else:
        assert found.reason == "InsufficientCapacity"
        assert "would not fit in the place of docs-0-0: node n1 lacks the label pool=gpuu" in found.message
    world.change(worker={})
    world.step()
    world.step()
    assert sorted(world.revisions()) == [0]
    assert world.condition(PROGRESSING).reason == "Complete"


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
            found = world.condition(PROGRESSING)
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
    assert world.condition(READY).status == "True"
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
    found = world.condition(PROGRESSING)
    assert (found.status, found.reason) == ("True", "InsufficientCapacity")
    assert "Insufficient nvidia.com/gpu" in found.message
    assert "spec.rollout.maxUnavailable" in found.message
    assert world.condition(READY).status == "True"


def test_a_broken_change_leaves_what_serves_alone_and_its_repair_takes_it_away():
    world = settled(replicas=3)
    good = world.revisions()[0]
    world.change(model={"uri": "file:///mnt/models/missing"})
    world.step()
    world.fail(3, 2, "loading\nerror: /mnt/models/missing/config.json: no such file\n")
    for _ in range(3):
        world.step()
    assert sum(revision == good for revision in world.revisions().values()) == 3
    assert world.condition(READY).status == "True"
    assert world.condition(PROGRESSING).message == (
        "docs-3-0 cannot start: /mnt/models/missing/config.json: no such file"
    )
    world.change(model={"uri": "file:///mnt/models/docs-moe"})
    plan = world.step()
    assert [deletion.key.name for deletion in plan.delete] == ["docs-3"]
    assert kinds(plan) == ["ControllerRevision"], "of which the good one is the newest again"
    world.step()
    assert (set(world.revisions().values()), world.condition(PROGRESSING).reason) == ({good}, "Complete")


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
    found = world.condition(PROGRESSING)
    assert (found.status, found.reason) == ("False", "ProgressDeadlineExceeded")
    assert "nothing further was ready for 60 s" in found.message
    assert world.revisions() == before
    assert world.condition(READY).status == "True"
    world.ready(*before)
    for _ in range(3):
        world.step()
        world.all_ready()
    assert world.condition(PROGRESSING).reason == "Complete", "late is better than never"


def test_a_paused_rollout_changes_nothing_and_scales_at_the_old_revision():
    world = settled(replicas=2)
    old = world.revisions()[0]
    world.change(engine={"maxBatchSize": 4}, rollout={"paused": True})
    assert "StatefulSet" not in kinds(world.step())
    assert world.condition(PROGRESSING).reason == "Paused"
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
    found = world.condition(PROGRESSING)
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
    assert (world.status.replicas, world.condition(READY).status) == (2, "True")


def test_of_replicas_that_may_leave_the_least_busy_does():
    world = settled(replicas=3)
    world.change(replicas=2)
    assert {pod.name for pod in world.planned().choice} == {"docs-0-0", "docs-1-0", "docs-2-0"}
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
    assert (world.condition(READY).status, world.condition(READY).reason) == ("True", "ScaledToZero")
    assert world.condition(PROGRESSING).reason == "Complete"


def test_the_model_is_asked_for_once_a_revision():
    world = World(deployment())
    world.step()
    assert not world.planned().recheck
    world.ready(0)
    assert world.planned().recheck
    settled_world = settled()
    assert not settled_world.planned().recheck
    assert (
        "11.2M parameters of which a token uses 4.1M, in fp32"
        in settled_world.condition(MODEL_LOADED).message
    )


def test_what_two_conditions_say_is_one_event():
    before = Status()
    after = invalid(before, deployment().identity, "no", START)
    assert [decision.message for decision in transitions(before, after)] == ["no"]


def test_a_refused_change_stops_the_progress_and_takes_nothing_away_from_replicas_that_serve():
    world = settled()
    serving = world.status
    world.change(worker={"resources": {"requests": {"cpu": 2}, "limits": {"cpu": 1}}})
    planned = world.planned().status
    after = refused(serving, planned, "cpu: must be less than or equal to cpu limit of 1", world.now)
    ready, progressing = after.condition(READY), after.condition(PROGRESSING)
    assert (ready.status, ready.reason) == ("True", "AllReplicasReady")
    assert (progressing.status, progressing.reason) == ("False", "ApplyRefused")
    assert {c.observed_generation for c in after.conditions} == {world.deployment.identity.generation}
    (said,) = transitions(serving, after)
    assert (said.warning, said.message) == (True, "cpu: must be less than or equal to cpu limit of 1")


def test_a_refusal_is_why_a_new_deployment_is_not_ready():
    world = World(deployment())
    after = refused(world.status, world.planned().status, "forbidden: exceeded quota", world.now)
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

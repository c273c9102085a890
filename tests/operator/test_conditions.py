"""What conditions say in states that are easily misread, and what kstatus and `kubectl` make of them."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from moe_operator.executor.execute import event
from moe_operator.observed import pod_status
from moe_operator.observed.problems import of_pod, of_workload
from moe_operator.planner.status_report import invalid, refused, transitions
from moe_operator.render.objects import Key
from moe_operator.resources import names, quantity
from moe_operator.resources.deprecated import as_quantity
from moe_operator.resources.scaling_status import ScalingStatus
from moe_operator.resources.status import (
    ACTIVE,
    DEPRECATED_FIELDS,
    MODEL_LOADED,
    PROGRESSING,
    QUALITY_GATE,
    READY,
    RECONCILING,
    STALLED,
    Status,
)
from tests.operator.kstatus import kstatus
from tests.operator.worlds import World, deployment, settled

FRONTEND = Key("Deployment", "docs-frontend")
QUOTA = 'pods "docs-frontend-7d9" is forbidden: exceeded quota: small, requested: pods=1, used: pods=4'


def said(world: World, kind: str) -> tuple[str, str]:
    found = world.condition(kind)
    return found.status, found.reason


def body(world: World, status: Status | None = None) -> dict[str, Any]:
    """The MoEDeployment as the API server gives it."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {
            "name": "docs",
            "namespace": "default",
            "generation": world.deployment.identity.generation,
        },
        "status": (status or world.status).manifest(),
    }


def computed(world: World, status: Status | None = None) -> str:
    return kstatus([body(world, status)])[0]


def frontend_pod(world: World, name: str, status: dict[str, Any]) -> None:
    labels = {names.LABEL_NAME: "docs", names.LABEL_ROLE: names.ROLE_FRONTEND}
    world.pods[name] = {"metadata": {"name": name, "labels": labels}, "status": status}


def loaded(world: World, *ranks: int) -> None:
    """The leaders' containers are ready; their gates wait for the frontends."""
    for rank in ranks:
        pod = world.pods[f"docs-{rank}-0"]
        pod["spec"] = {"readinessGates": [{"conditionType": names.ROUTED}]}
        pod["status"]["conditions"] = [{"type": "ContainersReady", "status": "True"}]


def waiting(reason: str, message: str) -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"containerStatuses": [{"name": "frontend", "image": "nope:1", "ready": False, "state": state}]}


UNSCHEDULABLE = {
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector.",
        }
    ]
}


@pytest.mark.parametrize(
    ("status", "reason", "sentence"),
    [
        (waiting("ErrImagePull", "no such image"), "ImagePullFailed", "no such image"),
        (UNSCHEDULABLE, "Unschedulable", "didn't match Pod's node affinity/selector"),
    ],
)
def test_a_frontend_that_cannot_start_is_the_reason_and_not_the_model(status, reason, sentence):
    world = World(deployment())
    world.step()
    loaded(world, 0)
    frontend_pod(world, "docs-frontend-x", status)
    world.step()
    ready = world.condition(READY)
    assert (ready.status, ready.reason) == ("False", reason)
    assert ready.message.startswith("0/1 replicas ready; 0/1 frontends ready; docs-frontend-x: ")
    assert sentence in ready.message
    assert "load the model" not in ready.message
    assert said(world, MODEL_LOADED) == ("True", "Loaded")


def test_a_quota_that_forbids_the_frontends_pods_is_the_reason():
    world = World(deployment())
    world.step()
    loaded(world, 0)
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": QUOTA}
    world.children[FRONTEND]["status"] = {"conditions": [failure]}
    world.step()
    ready = world.condition(READY)
    assert ready.reason == "PodRefused"
    assert ready.message == (
        "0/1 replicas ready; 0/1 frontends ready; Deployment docs-frontend: a quota has no room for the pod; "
        f"raise the quota, and Kubernetes tries again by itself; the API server says: {QUOTA}"
    )


def test_a_loaded_worker_that_no_frontend_routes_to_says_so():
    world = World(deployment())
    world.step()
    loaded(world, 0)
    world.step()
    assert world.condition(READY).message == (
        "0/1 replicas ready; 0/1 frontends ready; waiting for the frontends to route to docs-0-0"
    )


def test_ready_wants_every_frontend():
    world = settled(frontend={"replicas": 3})
    world.children[FRONTEND]["status"] = {"replicas": 3, "updatedReplicas": 3, "readyReplicas": 1}
    world.step()
    assert said(world, READY) == ("False", "FrontendNotReady")
    assert world.condition(READY).message.startswith("2/2 replicas ready; 1/3 frontends ready; ")
    assert (said(world, PROGRESSING)[0], computed(world)) == ("True", "InProgress")
    world.children[FRONTEND]["status"]["readyReplicas"] = 3
    world.step()
    assert world.condition(READY).message == "2/2 replicas ready, 3/3 frontends ready"
    assert (said(world, PROGRESSING), computed(world)) == (("True", "Complete"), "Current")


def test_kstatus_sees_a_first_rollout_through():
    world = World(deployment(replicas=2))
    assert kstatus([{**body(world), "status": {}}]) != ["Failed"]
    world.step()
    assert (computed(world), said(world, ACTIVE)) == ("InProgress", ("Unknown", "Activating"))
    world.ready(0)
    world.step()
    assert (computed(world), said(world, ACTIVE)) == ("InProgress", ("True", "Serving"))
    world.ready(1)
    world.frontend_ready()
    world.step()
    assert computed(world) == "Current"
    assert world.status.condition(RECONCILING) is None
    assert world.status.rollout is None


def test_a_first_rollout_that_never_gets_ready_fails_at_its_deadline_and_heals():
    world = World(deployment(rollout={"progressDeadlineSeconds": 60}))
    world.step()
    world.pods["docs-0-0"]["status"] = waiting("ErrImagePull", "no such image")
    todo = world.step()
    assert (said(world, PROGRESSING), computed(world)) == (("True", "Starting"), "InProgress")
    assert todo.deadline is not None, "no event says that time has passed"
    world.now = todo.deadline + timedelta(seconds=1)
    assert world.step().deadline is None
    progressing = world.condition(PROGRESSING)
    assert (progressing.status, progressing.reason) == ("False", "ProgressDeadlineExceeded")
    assert progressing.message.endswith(
        "nothing further was ready for 60 s; docs-0-0: no such image; "
        "correct the image's name, or let the node pull it"
    )
    assert "undo" not in progressing.message, "there is nothing to go back to"
    assert (said(world, STALLED), computed(world)) == (("True", "ProgressDeadlineExceeded"), "Failed")
    world.ready(0)
    world.frontend_ready()
    world.step()
    assert (said(world, PROGRESSING), computed(world)) == (("True", "Complete"), "Current")
    assert world.status.condition(STALLED) is None


def test_a_frontend_that_never_gets_ready_fails_the_rollout_too():
    world = settled(rollout={"progressDeadlineSeconds": 60})
    world.change(frontend={"image": "nope:1"})
    world.step()
    world.children[FRONTEND]["status"] = {"replicas": 2, "updatedReplicas": 1, "readyReplicas": 1}
    frontend_pod(world, "docs-frontend-y", waiting("ErrImagePull", "no such image"))
    world.step()
    assert (said(world, READY)[0], computed(world)) == ("True", "InProgress")
    world.now += timedelta(seconds=61)
    world.step()
    assert (said(world, READY)[0], computed(world)) == ("True", "Failed")
    assert said(world, PROGRESSING) == ("False", "ProgressDeadlineExceeded")


def test_kstatus_fails_a_second_rollout_that_is_stuck_while_ready_stays_true():
    world = settled(rollout={"progressDeadlineSeconds": 60})
    world.change(engine={"maxBatchSize": 4})
    world.step()
    assert (said(world, READY)[0], computed(world)) == ("True", "InProgress")
    world.now += timedelta(seconds=62)
    world.step()
    assert (said(world, READY)[0], computed(world)) == ("True", "Failed")
    assert "undo the rollout" in world.condition(PROGRESSING).message


def test_a_replica_that_is_ready_on_and_off_does_not_move_the_deadline():
    world = World(deployment(replicas=2, rollout={"progressDeadlineSeconds": 60}))
    world.step()
    for number in range(64):
        assert number > 60 or said(world, PROGRESSING)[0] == "True"
        world.ready(0, ready=number % 2 == 0)
        world.step()
    assert said(world, PROGRESSING) == ("False", "ProgressDeadlineExceeded")


def test_what_fails_after_a_complete_rollout_has_no_deadline():
    world = settled(rollout={"progressDeadlineSeconds": 60})
    world.ready(1, ready=False)
    world.step()
    world.now += timedelta(hours=1)
    world.step()
    assert (said(world, READY)[0], said(world, PROGRESSING)) == ("False", ("True", "Starting"))
    assert computed(world) == "InProgress"
    world.change(replicas=3)
    world.step()
    world.now += timedelta(hours=1)
    world.step()
    assert said(world, PROGRESSING)[0] == "True"


def test_a_checkpoint_that_is_refused_stalls_at_once():
    world = World(deployment())
    world.step()
    world.fail(0, 2, "error: /mnt/models/docs-moe/config.json: no such file")
    world.step()
    assert said(world, PROGRESSING) == ("False", "ModelLoadFailed")
    assert computed(world) == "Failed"


def test_a_paused_rollout_is_neither_stuck_nor_complete():
    world = settled()
    world.change(engine={"maxBatchSize": 4}, rollout={"paused": True})
    world.step()
    assert (said(world, PROGRESSING), computed(world)) == (("Unknown", "Paused"), "InProgress")


def test_idle_by_design_is_healthy_and_not_active():
    world = settled(replicas=1)
    world.change(replicas=0)
    world.step()
    world.frontend_ready(0)
    world.step()
    assert (said(world, READY), said(world, ACTIVE)) == (("True", "ScaledToZero"), ("False", "ScaledToZero"))
    assert said(world, MODEL_LOADED) == ("Unknown", "ScaledToZero")
    assert (said(world, PROGRESSING), computed(world)) == (("True", "Complete"), "Current")


def test_a_deployment_that_scales_from_zero_is_ready_while_its_frontend_holds_requests():
    world = settled(replicas=1, scaling={"minReplicas": 0, "maxReplicas": 2})
    idle = world.status.model_copy(update={"scaling": ScalingStatus(desired_replicas=0)})
    world.deployment = replace(world.deployment, status=idle)
    todo = world.step()
    assert [deletion.key.name for deletion in todo.delete] == ["docs-0"]
    assert (said(world, READY), said(world, ACTIVE)) == (("True", "ScaledToZero"), ("False", "ScaledToZero"))


QUOTA_STATUS = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": QUOTA}


def test_the_remedy_at_the_deadline_fits_the_cause():
    def at_deadline(world: World) -> str:
        world.step()
        world.now += timedelta(seconds=61)
        world.step()
        assert said(world, PROGRESSING) == ("False", "ProgressDeadlineExceeded")
        return world.condition(PROGRESSING).message

    limits = {"rollout": {"progressDeadlineSeconds": 60}}
    world = World(deployment(**limits))
    world.step()
    assert at_deadline(world).endswith("; read the pods' logs, or raise spec.rollout.progressDeadlineSeconds")
    world = World(deployment(**limits))
    world.step()
    loaded(world, 0)
    world.children[FRONTEND]["status"] = {"conditions": [QUOTA_STATUS]}
    message = at_deadline(world)
    assert "raise the quota, and Kubernetes tries again" in message
    assert "edit the spec" not in message
    world = World(deployment(**limits))
    world.step()
    world.unplace(0)
    assert "; free resources, add a node, or request less; the scheduler says: " in at_deadline(world)


def test_a_rollout_names_what_keeps_the_new_pod_down_while_old_ones_serve():
    world = settled(replicas=2)
    world.change(worker={"image": "nope:1"})
    world.step()
    world.pods["docs-2-0"]["status"] = waiting("ErrImagePull", "no such image")
    world.step()
    found = world.condition(PROGRESSING)
    assert (said(world, READY)[0], found.status, found.reason) == ("True", "True", "RollingOut")
    assert found.message.startswith("docs-2-0: no such image; 0/2 replicas ready at revision ")


def test_the_cause_of_an_unplaced_pod_stands_before_the_schedulers_words():
    world = World(deployment())
    world.step()
    world.pods["docs-0-0"]["status"] = UNSCHEDULABLE
    world.step()
    assert world.condition(READY).message == (
        "0/1 replicas ready; docs-0-0: no node matches; correct the node selector or the tolerations, or add "
        "a node; the scheduler says: 0/3 nodes are available: 3 node(s) didn't match Pod's node "
        "affinity/selector"
    )


@pytest.mark.parametrize(
    ("said", "begin"),
    [
        (
            '0/1 nodes are available: persistentvolumeclaim "models" not found. not found',
            "the claim models does not exist; create it, or correct its name in the spec; ",
        ),
        (
            "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found",
            "a claim of the pod has no volume; see its events (kubectl describe pvc), or use another claim; ",
        ),
    ],
)
def test_a_claim_that_keeps_a_pod_from_a_node_is_named(said, begin):
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
    found = of_pod(pod_status.read({"status": {"conditions": [condition]}}))
    assert found is not None
    assert (found.reason, found.message) == ("Unschedulable", f"{begin}the scheduler says: {said}")


@pytest.mark.parametrize(
    ("said", "begin"),
    [
        (
            'admission webhook "gate.example.org" denied the request: you must specify a team',
            "an admission webhook denies the pod; change its policy, and ",
        ),
        (
            "pods \"d-0-0\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: it "
            "is over the limit of 4 GPUs",
            "an admission policy denies the pod; change the policy, and ",
        ),
        (
            'Internal error occurred: failed calling webhook "gate.example.org": context deadline exceeded',
            "an admission webhook does not respond; repair it, or set its failurePolicy to Ignore, and ",
        ),
        (
            "failed quota: q: must specify limits.memory for: worker",
            "a quota asks for resources that the pod does not set; set them in the spec, and ",
        ),
        *(
            (
                said,
                "a LimitRange forbids the pod's resources; change them in the spec, or change the LimitRange",
            )
            for said in (
                'pods "d-0-0" is forbidden: minimum memory usage per Container is 1Gi, but request is 200Mi',
                "cpu max limit to request ratio per Pod is 2, but no limit is specified or limit is 0",
                'Pod "d-0-0" is invalid: spec.containers[0].resources.requests: Invalid value: "200Mi": '
                "must be less than or equal to memory limit of 150Mi",
                'Pod "d-0-0" is invalid: spec.containers[0].resources.requests: Invalid value: "2": '
                "must be less than or equal to cpu limit of 1",
            )
        ),
    ],
)
def test_what_refuses_a_pod_is_named_with_the_remedy(said, begin):
    assert of_workload(said).message.startswith(begin)


@pytest.mark.parametrize(
    ("text", "is_missing"),
    [
        ("volume for /models/m: /mnt/m does not exist on the node", True),
        ('runc: error mounting "/mnt/m" to rootfs at "/model": stat /mnt/m: no such file or directory', True),
        ('exec: "/mnt/m/serve": stat /mnt/m/serve: no such file or directory', False),
        ("/mnt/m: permission denied", False),
    ],
)
def test_a_directory_that_the_node_lacks_is_named(text, is_missing):
    pod = {
        "spec": {"nodeName": "n1", "volumes": [{"name": "model", "hostPath": {"path": "/mnt/m"}}]},
        "status": waiting("CreateContainerError", text),
    }
    found = of_pod(pod_status.read(pod))
    assert found is not None
    assert found.reason == "ContainerCreateFailed"
    begin = "node n1 has no directory /mnt/m; correct spec.model.uri, or put the checkpoint there; "
    assert found.message == (f"{begin}the kubelet says: {text}" if is_missing else text)


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        ({"exitCode": 1}, "frontend ended with exit code 1"),
        ({"exitCode": 139}, "frontend ended with exit code 139 (SIGSEGV)"),
        ({"exitCode": 255}, "frontend ended with exit code 255"),
        (
            {"exitCode": 137, "reason": "OOMKilled"},
            "frontend ended with exit code 137 (SIGKILL), OOMKilled: it needed more memory than its limit, "
            "or than the node has",
        ),
    ],
)
def test_a_crash_names_the_signal_and_its_usual_causes(end, sentence):
    status = {"name": "frontend", "ready": False, "state": {"terminated": end}}
    found = of_pod(pod_status.read({"status": {"containerStatuses": [status]}}))
    assert found is not None
    assert (found.reason, found.message) == ("ContainerCrashed", sentence)


def test_updated_counts_ready_replicas_only():
    world = settled(replicas=2)
    world.change(engine={"maxBatchSize": 4})
    world.step()
    world.step()
    assert world.status.updated_replicas == 0
    assert world.condition(PROGRESSING).message.startswith("0/2 replicas ready at revision ")
    world.ready(2)
    world.step()
    assert world.status.updated_replicas == 1


def test_what_is_refused_or_invalid_is_stalled():
    world = settled()
    for found in (
        refused(world.status, world.planned().status, "forbidden: exceeded quota", world.now),
        invalid(world.status, world.deployment.identity, "spec.x: no", world.now),
    ):
        assert computed(world, found) == "Failed"
        stalled = found.condition(STALLED)
        assert stalled is not None
        assert stalled.observed_generation == world.deployment.identity.generation
    world.change(engine={"maxBatchSize": 4})
    world.step()
    found = refused(world.status, world.planned().status, "forbidden: exceeded quota", world.now)
    assert found.condition(RECONCILING) is None


@pytest.mark.parametrize("reason", ["InvalidSpec", "ReadForbidden"])
def test_conditions_of_an_earlier_generation_are_unknown_once_a_new_one_cannot_be_observed(reason):
    world = settled(quality={"maxLoss": "10m"}, rollout={"pause": False})
    before, identity = world.status, world.deployment.identity
    later = replace(identity, generation=identity.generation + 1)

    def blocked(who):
        if reason == "InvalidSpec":
            return invalid(before, who, "spec.x: no", world.now)
        known = before.model_copy(update={"observed_generation": who.generation})
        return refused(before, known, "no right", world.now, reason)

    after = blocked(later)
    assert {c.observed_generation for c in after.conditions} == {later.generation}
    unknown = {c.type for c in after.conditions if (c.status, c.reason) == ("Unknown", reason)}
    ready = set() if reason == "InvalidSpec" else {READY}
    assert unknown == {ACTIVE, MODEL_LOADED, QUALITY_GATE} | ready
    assert after.condition(DEPRECATED_FIELDS) is None, "it exists only while True"
    assert len({told.message for told in transitions(before, after)}) == 1
    assert len(transitions(before, after)) == 1

    same = blocked(identity)
    assert [same.condition(kind) for kind in (ACTIVE, DEPRECATED_FIELDS)] == [
        before.condition(kind) for kind in (ACTIVE, DEPRECATED_FIELDS)
    ], "nothing else is known"


def test_an_edit_that_leaves_a_spec_invalid_for_another_reason_is_an_event():
    world = settled()
    who = world.deployment.identity
    first = invalid(world.status, replace(who, generation=2), "spec.x: no", world.now)
    same = invalid(first, replace(who, generation=3), "spec.x: no", world.now)
    other = invalid(same, replace(who, generation=4), "spec.y: no", world.now)
    assert [told.message for told in transitions(first, same)] == []
    assert [told.message for told in transitions(same, other)] == ["spec.y: no"]


def test_the_order_of_conditions_says_nothing():
    status = settled(quality={"maxLoss": "10m"}).status
    turned = status.model_copy(update={"conditions": status.conditions[::-1]})
    assert turned != status
    assert turned.same_as(status)
    assert not turned.same_as(status.model_copy(update={"conditions": status.conditions[1:]}))


def test_a_deployment_that_is_deleted_is_terminating():
    gone = body(settled())
    gone["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert kstatus([gone]) == ["Terminating"]


def test_a_spec_that_was_not_seen_yet_is_in_progress():
    world = settled()
    world.change(replicas=3)
    assert computed(world) == "InProgress"


def test_what_a_container_wrote_acts_on_no_terminal_and_is_bounded():
    world = World(deployment())
    world.step()
    world.fail(0, 2, f"error: no \x1b]52;c;cm0gLXJm\x07\u202e {'x' * 100_000}")
    todo = world.step()
    texts = [one.message for one in world.status.conditions] + [one.message for one in todo.decisions]
    assert any("no \\x1b]52;c;cm0gLXJm\\x07\\u202e xxx" in text for text in texts)
    assert all(text.isprintable() and len(text) <= 4096 for text in texts)


def test_what_the_api_server_passes_on_acts_on_no_terminal_and_is_bounded():
    world = settled()
    hostile = f"denied by webhook: \x1b[2J\n{'x' * 100_000}"
    for found in (
        refused(world.status, world.planned().status, hostile, world.now),
        invalid(world.status, world.deployment.identity, hostile, world.now),
    ):
        assert all(one.message.isprintable() and len(one.message) <= 4096 for one in found.conditions)
        (told,) = transitions(world.status, found)
        made = event(world.deployment.identity, told, world.now)
        assert made["message"].startswith("denied by webhook: \\x1b[2J xxx")
        assert len(made["message"]) <= 1024


def test_a_deprecated_field_is_announced_once_with_what_replaces_it():
    before = settled(rollout={"pause": False}).status
    found = before.condition(DEPRECATED_FIELDS)
    assert (found.status, found.reason) == ("True", "DeprecatedFieldUsed")
    assert found.message == "spec.rollout.pause is deprecated; replace it with spec.rollout.paused: false"
    (told,) = [one for one in transitions(Status(), before) if one.reason == found.reason]
    assert told.warning
    assert transitions(before, before) == []
    assert kstatus([body(settled(rollout={"pause": False}))]) == ["Current"]
    assert settled(rollout={"paused": False}).status.condition(DEPRECATED_FIELDS) is None


@pytest.mark.parametrize(
    ("number", "text"),
    [(6.0, "6"), (1.5, "1500m"), (0.005, "5m"), (1e-7, "100n"), (2e6, "2000000"), (0.0, "0")],
)
def test_a_float_is_advised_as_an_equal_quantity(number, text):
    assert as_quantity(number) == text
    assert float(quantity.parse(text)) == number

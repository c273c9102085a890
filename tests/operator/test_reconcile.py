"""The operator on a real cluster, as a pod under its own account. Workers are stand-ins without a model."""

from __future__ import annotations

import json

import pytest

from localcluster.errors import CommandError
from tests.operator.live import ALL_KINDS, CHILD_KINDS, STANDIN_PATH, Live, eventually, manifest

NAME = "serving.moe-operator.dev/name"
ROLE = "serving.moe-operator.dev/role"
REVISION = "serving.moe-operator.dev/revision"


@pytest.fixture(scope="module")
def docs(live: Live) -> Live:
    """A deployment with two replicas that is Ready."""
    live.apply(manifest(replicas=2))
    live.settled()
    return live


def uids(live: Live) -> dict[str, str]:
    return {name: pod["metadata"]["uid"] for name, pod in live.leaders().items()}


def test_an_applied_deployment_becomes_its_children_and_ready(docs):
    owner = docs.get("moed", "docs")
    children = docs.list(CHILD_KINDS)
    assert {f"{child['kind']} {child['metadata']['name']}" for child in children} == {
        "StatefulSet docs-0",
        "StatefulSet docs-1",
        "Deployment docs-frontend",
        "Service docs-frontend",
        "Service docs-workers",
        "PodDisruptionBudget docs-workers",
        "ServiceAccount docs-frontend",
        "ServiceAccount docs-worker",
        "Role docs-frontend",
        "RoleBinding docs-frontend",
    }
    for child in children:
        (reference,) = child["metadata"]["ownerReferences"]
        assert (reference["uid"], reference["controller"]) == (owner["metadata"]["uid"], True)
    assert owner["metadata"].get("finalizers", []) == []
    assert list(owner["metadata"]["annotations"]) == ["kubectl.kubernetes.io/last-applied-configuration"]
    assert len(docs.events("Created")) == 1


def test_describe_tells_the_story_in_order(docs):
    story = ["Created", "ReplicasNotReady", "Starting", "AllReplicasReady"]

    def told():
        table = docs.kubectl("describe", "moed", "docs").partition("Events:")[2]
        reasons = [line.split()[1] for line in table.splitlines() if "moe-operator" in line]
        return [reason for reason in reasons if reason in story]

    # An event comes after the condition that it tells of.
    eventually(told, lambda found: found == story, "the story")


def test_the_status_says_what_a_worker_said_of_its_model(docs):
    status = docs.get("moed", "docs")["status"]
    assert (status["replicas"], status["readyReplicas"], status["updatedReplicas"]) == (2, 2, 2)
    assert status["model"]["architecture"] == "deepseek_v3"
    assert (status["model"]["parametersTotal"], status["model"]["parametersActive"]) == (
        11_200_000,
        4_100_000,
    )
    assert "11.2M parameters" in docs.condition("ModelLoaded")["message"]
    assert sorted(docs.leaders()) == ["docs-0-0", "docs-1-0"]


def test_a_settled_deployment_is_not_written_to(docs):
    def written():
        """What the operator wrote of each child, and when; others write their status."""
        body = docs.kubectl("get", CHILD_KINDS, "-l", NAME, "-o", "json", "--show-managed-fields")
        return {
            (o["kind"], o["metadata"]["name"]): [
                entry for entry in o["metadata"]["managedFields"] if entry["manager"] == "moe-operator"
            ]
            for o in json.loads(body)["items"]
        }

    before = written()
    assert all(before.values())
    # A change of a child that is no difference makes the operator look, and see that all is well.
    docs.kubectl("annotate", "statefulset", "docs-0", "someone.else/note=1")
    docs.kubectl("annotate", "statefulset", "docs-0", "someone.else/note-")
    docs.patch("statefulset", "docs-1", {"metadata": {"labels": {ROLE: "other"}}})
    eventually(
        lambda: docs.get("statefulset", "docs-1")["metadata"]["labels"][ROLE],
        lambda role: role == "worker",
        "drift corrected",
    )
    changed = {name for name, entries in written().items() if before[name] != entries}
    assert changed == {("StatefulSet", "docs-1")}


def test_drift_of_a_child_is_corrected(docs):
    docs.kubectl("set", "image", "deployment/docs-frontend", "frontend=busybox")
    docs.patch("service", "docs-frontend", {"spec": {"selector": {NAME: "other"}}})
    docs.patch("role", "docs-frontend", {"rules": []})

    def look():
        image = docs.get("deployment", "docs-frontend")["spec"]["template"]["spec"]["containers"][0]["image"]
        selector = docs.get("service", "docs-frontend")["spec"]["selector"].get(NAME)
        return image, selector, len(docs.get("role", "docs-frontend")["rules"] or [])

    wanted = ("ghcr.io/moe-operator/operator:dev", "docs", 2)
    eventually(look, lambda found: found == wanted, "drift of image, selector and rules corrected")
    said = " ".join(eventually(lambda: docs.events("DriftCorrected"), lambda e: len(e) >= 3, "events"))
    assert "Deployment docs-frontend: spec.template.spec.containers[frontend].image was changed" in said


def test_a_deleted_child_is_made_again(docs):
    docs.settled()
    names = [("service", "docs-workers"), ("rolebinding", "docs-frontend")]
    before = {name: docs.get(*name)["metadata"]["uid"] for name in names}
    for name in names:
        docs.kubectl("delete", *name, "--wait=false")

    def uid(name):
        try:
            return docs.get(*name)["metadata"]["uid"]
        except CommandError:
            return None

    for name in names:
        eventually(
            lambda n=name: uid(n), lambda found, n=name: found not in (None, before[n]), f"{name} again"
        )
    eventually(lambda: docs.events("Recreated"), bool, "an event")


def test_another_replica_takes_the_place_of_one_that_was_deleted(docs):
    docs.settled()
    before = uids(docs)
    gone = min(before)
    docs.kubectl("delete", "statefulset", gone.removesuffix("-0"))
    # Its name may be free again when the operator looks: only the identity tells that it is another one.
    eventually(
        lambda: uids(docs), lambda now: len(now) == 2 and before[gone] not in now.values(), "another one"
    )
    docs.settled()
    assert len(uids(docs).items() & before.items()) == 1


def test_kubectl_scale_adds_replicas_and_removes_idle_ones(docs):
    before = uids(docs)
    docs.kubectl("scale", "moed/docs", "--replicas=3")
    docs.settled()
    assert docs.get("moed", "docs")["status"]["readyReplicas"] == 3
    docs.kubectl("scale", "moed/docs", "--replicas=2")
    eventually(lambda: len(docs.leaders()), lambda count: count == 2, "one of three gone")
    docs.settled()
    assert len(uids(docs).items() & before.items()) >= 1


def test_a_change_of_the_spec_brings_new_replicas_before_old_ones_leave(docs):
    before = uids(docs)
    docs.patch("moed", "docs", {"spec": {"engine": {"maxBatchSize": 4}}})
    fewest = 2

    def ready(pod):
        conditions = {c["type"]: c["status"] for c in pod["status"].get("conditions", [])}
        return conditions.get("Ready") == "True" and "deletionTimestamp" not in pod["metadata"]

    def look():
        nonlocal fewest
        fewest = min(fewest, sum(ready(pod) for pod in docs.leaders().values()))
        return docs.condition("Progressing").get("reason")

    eventually(look, lambda reason: reason == "Complete", "rolled out", 120)
    assert fewest == 2
    assert not set(uids(docs).values()) & set(before.values())
    revisions = {pod["metadata"]["labels"][REVISION] for pod in docs.leaders().values()}
    assert revisions == {docs.get("moed", "docs")["status"]["revision"]}


def test_a_change_that_cannot_start_costs_no_replica_and_says_why(docs):
    sentence = "/mnt/models/x/model.safetensors: it ends at byte 10, 90 bytes early"
    env = [{"name": "PATH", "value": STANDIN_PATH}, {"name": "STANDIN_ERROR", "value": sentence}]
    kept = uids(docs)
    docs.patch("moed", "docs", {"spec": {"worker": {"env": env}}})
    condition = docs.wait("Progressing", "ModelLoadFailed")
    assert condition["status"] == "False"
    assert condition["message"].endswith(f"cannot start: {sentence}")
    assert docs.condition("Ready")["status"] == "True"
    docs.patch("moed", "docs", {"spec": {"worker": {"env": env[:1]}}})
    docs.settled()
    assert uids(docs) == kept


def test_an_image_that_does_not_exist_is_the_reason(live):
    live.apply(manifest("image", worker={"image": "nowhere.example/worker:1"}))
    condition = live.wait("Ready", "ImagePullFailed", "image")
    assert "nowhere.example/worker:1" in condition["message"]
    live.kubectl("delete", "moed", "image")


def test_a_pod_that_fits_no_node_is_the_reason(live):
    live.apply(
        manifest(
            "big", worker={"resources": {"requests": {"nvidia.com/gpu": 8}, "limits": {"nvidia.com/gpu": 8}}}
        )
    )
    condition = live.wait("Ready", "Unschedulable", "big")
    assert "Insufficient nvidia.com/gpu" in condition["message"]
    live.kubectl("delete", "moed", "big")


def test_what_the_api_server_refuses_is_the_reason(live):
    live.apply(manifest("odd", worker={"resources": {"limits": {"hugepages-2Mi": "4Mi"}}}))
    condition = live.wait("Ready", "ApplyRefused", "odd")
    assert "HugePages require cpu or memory" in condition["message"]
    live.kubectl("delete", "moed", "odd")


def test_what_a_quota_forbids_is_said_hurts_nobody_else_and_heals_without_an_edit(live, namespace):
    tight = Live(live.cluster, namespace)
    crowd = [f"crowd-{number}" for number in range(12)]
    tight.kubectl("create", "quota", "none", "--hard=count/roles.rbac.authorization.k8s.io=0")
    for name in crowd:
        tight.apply(manifest(name, replicas=0))
    for name in crowd:
        condition = tight.wait("Ready", "ApplyRefused", name)
        assert "exceeded quota: none, requested: count/roles" in condition["message"]
    live.apply(manifest("other", replicas=0))
    live.wait("Ready", "ScaledToZero", "other", seconds=30)
    live.kubectl("delete", "moed", "other")

    tight.kubectl("delete", "moed", *crowd[1:])
    tight.kubectl("delete", "quota", "none")
    tight.wait("Ready", "ScaledToZero", crowd[0], seconds=90)


def test_an_object_of_somebody_else_is_left_alone(live):
    live.kubectl("create", "service", "clusterip", "taken-workers", "--tcp=80")
    live.apply(manifest("taken", replicas=0))
    condition = live.wait("Ready", "NameConflict", "taken")
    assert "Service taken-workers exists and belongs to another owner" in condition["message"]
    assert live.get("service", "taken-workers")["spec"]["ports"][0]["port"] == 80
    live.kubectl("delete", "moed", "taken")


def test_the_operator_may_not_read_secrets_nor_write_a_spec(live):
    account = "--as=system:serviceaccount:moe-system:moe-operator"
    for command in (
        ("get", "secrets"),
        ("get", "secrets", "-A"),
        ("get", "configmaps"),
        ("delete", "pods", "--all"),
        ("patch", "moed", "docs", "--type=merge", "-p", '{"spec":{"replicas":1}}'),
        ("auth", "can-i", "create", "pods/exec"),
        ("auth", "can-i", "create", "clusterrolebindings"),
    ):
        with pytest.raises(CommandError, match=r"forbidden|can-i .* ended with code 1"):
            live.kubectl(*command, account)
    pod = live.cluster.kubectl(
        "-n", "moe-system", "get", "pods", "-o", "jsonpath={.items[*].spec.serviceAccountName}"
    )
    assert set(pod.split()) == {"moe-operator"}


def test_deletion_leaves_nothing(docs):
    docs.kubectl("delete", "moed", "docs")
    eventually(
        lambda: [f"{o['kind']} {o['metadata']['name']}" for o in docs.list(ALL_KINDS, f"{NAME}=docs")],
        lambda left: left == [],
        "everything of docs is gone",
    )

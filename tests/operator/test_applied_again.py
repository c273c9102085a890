"""Deployments that are deleted and applied again, before anything of the first one has ended."""

from __future__ import annotations

from tests.operator.live import CHILD_KINDS, STANDIN_PATH, Live, eventually, manifest

GRACE_S = 900
"""Longer than any test: who waits for it fails."""


def frontend_runs(live: Live, name: str) -> bool:
    """Whether the frontend's process has been started; it imports for some seconds."""
    pods = live.list("pods", f"serving.moe-operator.dev/name={name},serving.moe-operator.dev/role=frontend")
    statuses = [status for pod in pods for status in pod["status"].get("containerStatuses", ())]
    return any("running" in status["state"] for status in statuses)


def test_a_deployment_that_is_applied_again_at_once_waits_for_no_grace_period(live):
    worker = {"env": [{"name": "PATH", "value": STANDIN_PATH}], "terminationGracePeriodSeconds": GRACE_S}
    body = manifest("again", worker=worker, frontend={"terminationGracePeriodSeconds": GRACE_S})
    live.apply(body)
    eventually(lambda: frontend_runs(live, "again"), bool, "the frontend's process starts")
    live.kubectl("delete", "moed", "again", "--wait=false")
    live.apply(body)
    live.wait("Ready", "AllReplicasReady", "again", 150)
    assert live.events("NameConflict", "again") == [], "objects of its predecessor are nobody's claim"
    live.kubectl("delete", "moed", "again", "--wait=false")


def test_orphans_are_adopted_and_go_on_serving(live):
    """`--cascade=orphan` leaves what serves; the API server checks who may own it then."""
    live.apply(manifest("left"))
    live.settled("left")
    before = {pod["metadata"]["uid"] for pod in live.list("pods", "serving.moe-operator.dev/name=left")}
    live.kubectl("delete", "moed", "left", "--cascade=orphan")
    live.apply(manifest("left"))
    live.settled("left")
    owner = live.get("moed", "left")["metadata"]["uid"]
    children = live.list(CHILD_KINDS, "serving.moe-operator.dev/name=left")
    kinds = {child["kind"] for child in children}
    assert kinds >= {"StatefulSet", "Deployment", "Service", "ServiceAccount", "Role", "RoleBinding"}
    assert [[o["uid"] for o in child["metadata"]["ownerReferences"]] for child in children] == [
        [owner] for _ in children
    ]
    after = {pod["metadata"]["uid"] for pod in live.list("pods", "serving.moe-operator.dev/name=left")}
    assert after == before
    live.kubectl("delete", "moed", "left", "--wait=false")

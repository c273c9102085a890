"""What `kubectl wait`, kstatus and `moe rollout status` make of deployments in a real cluster."""

from __future__ import annotations

import pytest

from localcluster.errors import CommandError
from tests.operator.kstatus import kstatus
from tests.operator.live import STANDIN_PATH, Live, eventually, manifest
from tests.operator.test_rollout_live import moe

BROKEN = [
    {"name": "PATH", "value": STANDIN_PATH},
    {"name": "STANDIN_ERROR", "value": "the driver is too old"},
]
LIMIT = "--timeout=100s"
NOWHERE = "nowhere.example/image:1"
COMPLETE = '--for=jsonpath={.status.conditions[?(@.type=="Progressing")].reason}=Complete'


def computed(live: Live, name: str) -> str:
    return kstatus([live.get("moed", name)])[0]


def test_good_then_stuck(live):
    live.apply(manifest("good", rollout={"progressDeadlineSeconds": 5}))
    live.kubectl("wait", "moed/good", COMPLETE, LIMIT)
    live.kubectl("wait", "moed/good", "--for=condition=Ready", "--for=condition=Active", LIMIT)
    assert computed(live, "good") == "Current"
    live.patch("moed", "good", {"spec": {"worker": {"env": BROKEN}}})
    live.kubectl("wait", "moed/good", "--for=condition=Stalled", LIMIT)
    live.kubectl("wait", "moed/good", "--for=condition=Progressing=False", LIMIT)
    assert (computed(live, "good"), live.condition("Ready", "good")["status"]) == ("Failed", "True")
    assert moe(live, "status", "good").returncode == 1

    live.patch("moed", "good", {"metadata": {"finalizers": ["example.com/hold"]}})
    live.kubectl("delete", "moed", "good", "--wait=false")
    assert computed(live, "good") == "Terminating"
    live.patch("moed", "good", {"metadata": {"finalizers": None}})


def test_a_first_rollout_that_is_stuck(live):
    live.apply(manifest("first", worker={"image": NOWHERE}, rollout={"progressDeadlineSeconds": 5}))
    live.kubectl("wait", "moed/first", "--for=condition=Stalled", LIMIT)
    progressing = live.wait("Progressing", "ProgressDeadlineExceeded", "first", why=NOWHERE)
    assert progressing["status"] == "False"
    assert computed(live, "first") == "Failed"
    with pytest.raises(CommandError, match="timed out"):
        live.kubectl("wait", "moed/first", "--for=condition=Ready", "--timeout=1s")
    assert moe(live, "status", "first").returncode == 1
    live.kubectl("delete", "moed", "first")


def test_a_frontend_that_cannot_start_is_the_reason(live):
    live.apply(manifest("closed", frontend={"image": NOWHERE}))
    eventually(lambda: live.condition("ModelLoaded", "closed").get("status"), lambda s: s == "True", "loaded")
    ready = live.wait("Ready", "ImagePullFailed", "closed")
    assert ready["message"].startswith("0/1 replicas ready; 0/1 frontends ready; closed-frontend-")
    assert NOWHERE in ready["message"]
    assert computed(live, "closed") == "InProgress"
    live.kubectl("delete", "moed", "closed")


def test_a_quota_that_forbids_frontend_pods_is_the_reason(live, namespace):
    tight = Live(live.cluster, namespace)
    tight.kubectl("create", "quota", "one", "--hard=pods=1")
    tight.apply(manifest("tight", frontend={"replicas": 2}))
    refused = tight.wait("Ready", "PodRefused", "tight")
    assert "exceeded quota: one" in refused["message"]
    tight.kubectl("delete", "quota", "one")
    tight.wait("Ready", "AllReplicasReady", "tight", seconds=170)


def test_idle_by_design(live):
    live.apply(manifest("idle", replicas=0))
    live.kubectl("wait", "moed/idle", "--for=condition=Ready", LIMIT)
    live.kubectl("wait", "moed/idle", "--for=condition=Active=False", LIMIT)
    assert (computed(live, "idle"), live.condition("Ready", "idle")["reason"]) == ("Current", "ScaledToZero")
    live.kubectl("delete", "moed", "idle")

"""Deployments that are deleted and applied again, before anything of the first one has ended."""

from __future__ import annotations

import time

from tests.operator.live import STANDIN_PATH, Live, eventually, manifest

LIMIT_S = 40
"""A stand-in's first start takes 5 to 15 s on two busy cores; a grace period takes 60."""


def frontend_runs(live: Live, name: str) -> bool:
    """Whether the frontend's process has been started; it imports for some seconds."""
    pods = live.list("pods", f"serving.moe-operator.dev/name={name},serving.moe-operator.dev/role=frontend")
    statuses = [status for pod in pods for status in pod["status"].get("containerStatuses", ())]
    return any("running" in status["state"] for status in statuses)


def test_a_deployment_that_is_applied_again_at_once_waits_for_no_grace_period(live):
    # With the default grace periods of 60 s.
    body = manifest("again", worker={"env": [{"name": "PATH", "value": STANDIN_PATH}]}, frontend={})
    live.apply(body)
    eventually(lambda: frontend_runs(live, "again"), bool, "the frontend's process starts")
    live.kubectl("delete", "moed", "again", "--wait=false")
    live.apply(body)
    began = time.monotonic()
    live.wait("Ready", "AllReplicasReady", "again", 90)
    took = time.monotonic() - began
    print(f"Ready {took:.1f} s after it was applied again")
    assert took < LIMIT_S
    live.kubectl("delete", "moed", "again", "--wait=false")

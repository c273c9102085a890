"""Says in a sentence why a pod does not run, from what the kubelet and the scheduler wrote in its status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moe_api.visible import one_line
from moe_operator.resources import names

_ERROR_LINE = "error: "
_QUALITY_LINE = "quality gate: "
"""What a worker begins its sentence with where a checkpoint is worse than spec.quality allows."""

QUALITY = "QualityTooLow"
POD_REFUSED = "PodRefused"
"""The API server takes no such pod: a quota, Pod Security or an admission policy is against it."""
_EXIT_BAD_INPUT = 2
"""Exit code of a worker that refuses its checkpoint or its configuration: starting it again is of no use."""

_WAITING = {
    "ErrImagePull": "ImagePullFailed",
    "ImagePullBackOff": "ImagePullFailed",
    "InvalidImageName": "ImagePullFailed",
    "ErrImageNeverPull": "ImagePullFailed",
    "CreateContainerConfigError": "ContainerCreateFailed",
    "CreateContainerError": "ContainerCreateFailed",
    "RunContainerError": "ContainerCreateFailed",
}
_NEEDS_EDIT = ("InvalidImageName",)
_UNINFORMATIVE = ("ImagePullBackOff",)
"""Reasons whose message repeats that there was an error instead of saying which."""


@dataclass(frozen=True)
class Problem:
    """Why a pod does not run."""

    reason: str
    """One CamelCase word."""
    message: str
    """A sentence."""
    stuck: bool = False
    """Only an edit of the spec or of the checkpoint helps: no retry and no new node does."""


_MESSAGE_MOST = 1024
"""Characters of a sentence that a pod, the kubelet or an admission policy wrote."""


def of_pod(pod: Mapping[str, Any]) -> Problem | None:
    """What keeps a pod from becoming Ready; None when it runs or just needs time."""
    found = _of_pod(pod)
    return None if found is None else _bounded(found)


def _bounded(problem: Problem) -> Problem:
    """Whoever controls a container controls what is said here."""
    return replace(problem, message=one_line(problem.message, _MESSAGE_MOST))


def _of_pod(pod: Mapping[str, Any]) -> Problem | None:
    status = pod.get("status", {})
    for container in status.get("containerStatuses", ()):
        found = _waiting(container) or (None if container.get("ready") else _terminated(container))
        if found is not None:
            return found
    return _unschedulable(status) or _without_node(pod)


def _waiting(container: Mapping[str, Any]) -> Problem | None:
    waiting = container.get("state", {}).get("waiting") or {}
    reason = _WAITING.get(waiting.get("reason", ""))
    if reason is None:
        return None
    detail = waiting.get("message") or waiting["reason"]
    if waiting["reason"] in _UNINFORMATIVE:
        detail = f"image {container.get('image')}: {detail}"
    return Problem(reason, detail.strip(), stuck=waiting["reason"] in _NEEDS_EDIT)


def _terminated(container: Mapping[str, Any]) -> Problem | None:
    """The container's last end, when that was an error; it stays the news while the next try starts."""
    ends = (container.get("state", {}).get("terminated"), container.get("lastState", {}).get("terminated"))
    end = next((end for end in ends if end), None)
    if end is None or end.get("exitCode", 0) == 0:
        return None
    if end.get("reason") == "StartError":
        # What the runtime says while the kubelet waits for the next try; between the two nothing changed.
        return Problem("ContainerCreateFailed", end.get("message", "the runtime gave no reason").strip())
    said = error_sentence(end.get("message", ""))
    name = container["name"]
    if name == names.ROLE_WORKER and end["exitCode"] == _EXIT_BAD_INPUT and said is not None:
        refused = QUALITY if said.startswith(_QUALITY_LINE) else "ModelLoadFailed"
        return Problem(refused, said, stuck=True)
    runs = "running" in container.get("state", {})
    sentence = said or _crash_sentence(name, end)
    reason = f"{name.capitalize()}Failed" if said else "ContainerCrashed"
    return Problem(reason, f"{sentence}; it is started again" if runs else sentence)


def _crash_sentence(name: str, end: Mapping[str, Any]) -> str:
    why = f", {end['reason']}" if end.get("reason") not in (None, "Error") else ""
    return f"{name} ended with exit code {end['exitCode']}{why}"


def error_sentence(log: str) -> str | None:
    """The last line of a log that starts with "error: ", without these words; None when there is none."""
    lines = [line for line in log.splitlines() if line.startswith(_ERROR_LINE)]
    return lines[-1].removeprefix(_ERROR_LINE).strip() if lines else None


def _without_node(pod: Mapping[str, Any]) -> Problem | None:
    """Whether its node stopped reporting.

    The node controller then calls the pods there not Ready and gives no reason; a kubelet always gives one.
    """
    found = {condition["type"]: condition for condition in pod.get("status", {}).get("conditions", ())}
    ready, containers = found.get("Ready", {}), found.get("ContainersReady", {})
    if (ready.get("status"), containers.get("status")) != ("False", "True") or ready.get("reason"):
        return None
    node = pod.get("spec", {}).get("nodeName", "of the pod")
    sentence = (
        f"node {node} does not report to Kubernetes; after some minutes another replica takes its place"
    )
    return Problem("NodeNotReady", sentence)


def _unschedulable(status: Mapping[str, Any]) -> Problem | None:
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            message = condition.get("message", "no node takes it")
            return Problem(condition.get("reason", "Unschedulable"), message)
    return None


def of_workload(manifest: Mapping[str, Any]) -> Problem | None:
    """Why a Deployment's controller cannot create pods, as its condition ReplicaFailure says; else None."""
    for condition in manifest.get("status", {}).get("conditions", ()):
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            why = condition.get("message", "the API server gives no reason")
            return _bounded(Problem(POD_REFUSED, why))
    return None

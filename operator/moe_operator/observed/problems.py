"""Explains why a pod does not run, from the kubelet's and the scheduler's entries in its status."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from moe_api.visible import one_line
from moe_operator.observed.pod_status import Container, ContainerEnd, PodStatus
from moe_operator.observed.scheduling import is_excluded, lacks_resources
from moe_operator.resources import names

_ERROR_LINE = "error: "
_QUALITY_LINE = "quality gate: "
"""Start of a worker's message about a checkpoint that is worse than spec.quality allows."""

QUALITY = "QualityTooLow"
POD_REFUSED = "PodRefused"
"""The API server refuses the pod: a quota, Pod Security or an admission policy forbids it."""
_EXIT_BAD_INPUT = 2
"""Exit code of a worker that refuses its checkpoint or its configuration: a restart does not help."""

_WAITING = {
    "ErrImagePull": "ImagePullFailed",
    "ImagePullBackOff": "ImagePullFailed",
    "InvalidImageName": "ImagePullFailed",
    "ErrImageNeverPull": "ImagePullFailed",
    "CreateContainerConfigError": "ContainerCreateFailed",
    "CreateContainerError": "ContainerCreateFailed",
    "RunContainerError": "ContainerCreateFailed",
}
_REMEDIES: Final = {
    "ImagePullFailed": "correct the image's name, or let the node pull it",
    "ContainerCreateFailed": "correct what the runtime names, in the spec or on the node",
    "ContainerCrashed": "read the log of its last run (kubectl logs --previous)",
    "NodeNotReady": "repair or delete the node",
    "ReplicasNotReady": "read the pods' logs, or raise spec.rollout.progressDeadlineSeconds",
    "FrontendNotReady": "read the frontends' logs, or raise spec.rollout.progressDeadlineSeconds",
}
"""Remedies by reason, for messages that contain none."""

_REFUSALS: Final = (
    ("denied the request", "an admission webhook denies the pod; change its policy"),
    ("denied request", "an admission policy denies the pod; change the policy"),
    (
        "failed calling webhook",
        "an admission webhook does not respond; repair it, or set its failurePolicy to Ignore",
    ),
    ("exceeded quota", "a quota has no room for the pod; raise the quota"),
    ("must specify", "a quota asks for resources that the pod does not set; set them in the spec"),
    *(
        (part, "a LimitRange forbids the pod's resources; change them in the spec, or change the LimitRange")
        for part in (
            "usage per Container is",
            "usage per Pod is",
            "limit to request ratio",
            " limit of ",
        )
    ),
    ("violates PodSecurity", "the namespace's Pod Security level forbids the pod; relax it"),
)
"""Cause and remedy by a part of the API server's message. The texts of policies may contain anything."""
_REFUSED_SOMEHOW = "the API server refuses the pod; correct what it names"

_FAILED: Final = {names.ROLE_WORKER: "WorkerFailed", names.ROLE_FRONTEND: "FrontendFailed"}
"""Reasons by the container that ended with an error; others come from a podTemplate."""
_EXIT_RANK_LOST = 3
"""Exit code of a worker that ended because another rank of its replica did."""

_NO_DIRECTORY: Final = re.compile(r"does not exist|no such file or directory", re.IGNORECASE)
_SIGNALLED = 128
"""Exit codes above it encode the signal that ended the process, as in a shell."""

WAITING_TIME: Final = timedelta(seconds=30)
"""A pod that no scheduler tried to place for this long counts as having none; one whose containers are not
created for this long after it was placed, as lacking a volume or its network.
"""
FAILED_TIME: Final = timedelta(seconds=60)
"""A pod that its node evicted or rejected explains for this long why its successor is not ready."""

_NEEDS_EDIT = ("InvalidImageName",)
_UNINFORMATIVE = ("ImagePullBackOff",)
"""Reasons whose message only repeats that there was an error."""


@dataclass(frozen=True)
class Problem:
    """Why a pod does not run."""

    reason: str
    """One CamelCase word."""
    message: str
    """A sentence."""
    stuck: bool = False
    """Only an edit of the spec or of the checkpoint helps, not a retry or a new node."""
    said: str = ""
    """The scheduler's own words, if the message is about them."""
    remedied: bool = False
    """The message contains a remedy."""
    follows: bool = False
    """It follows from the end of another worker of the replica, which is the cause."""
    since: str = ""
    """When the container ended (RFC 3339), if that is the problem."""

    @property
    def remedy(self) -> str:
        """The remedy if the message contains none; otherwise empty."""
        return "" if self.remedied else _REMEDIES.get(self.reason, "")


_MESSAGE_MOST = 1024
"""Maximum characters of a quoted message of a pod, the kubelet or an admission policy."""


def of_pod(status: PodStatus) -> Problem | None:
    """Why a pod does not become Ready; None if it runs or only needs time."""
    found = _of_pod(status)
    return None if found is None else _bounded(found)


def of_delay(status: PodStatus, now: datetime) -> Problem | None:
    """What a pod has waited for too long: a scheduler, its volumes or its network; None as long as it only
    needs time.
    """
    return _without_scheduler(status, now) or _without_volumes(status, now)


def of_predecessor(status: PodStatus, before: PodStatus | None, now: datetime) -> Problem | None:
    """Why the pod of the same name before it failed, if that was a moment ago and it has not started yet."""
    if before is None or status.phase != "Pending" or not has_just_failed(before, now):
        return None
    return of_pod(before)


def has_just_failed(status: PodStatus, now: datetime) -> bool:
    """Whether a pod that ended did so a moment ago."""
    return status.ended_since is not None and now - status.ended_since < FAILED_TIME


def _without_scheduler(status: PodStatus, now: datetime) -> Problem | None:
    """The API server accepts the name of a scheduler that does not run."""
    since = status.queued_since
    if since is None or now < since + WAITING_TIME:
        return None
    scheduler = f"the scheduler {status.scheduler}" if status.scheduler else "its scheduler"
    sentence = (
        f"no scheduler has tried to place it; check that {scheduler} runs, or correct schedulerName in the "
        "podTemplate"
    )
    return _bounded(Problem("NotScheduled", sentence, remedied=True))


def _without_volumes(status: PodStatus, now: datetime) -> Problem | None:
    """Why a pod's containers are not even created: a volume is missing, or the network of the pod is not set
    up; None as long as it only needs time.

    The kubelet says which of them in events alone.
    """
    since = status.mounting_since
    if since is None or now < since + WAITING_TIME:
        return None
    sentence = f"node {status.node} has not mounted its volumes or not set up its network"
    if status.secrets:
        sentence += f"; check that these Secrets exist: {', '.join(status.secrets)}"
    message = f"{sentence}; its events say why (kubectl describe pod)"
    return _bounded(Problem("VolumesNotMounted", message, remedied=True))


def _bounded(problem: Problem) -> Problem:
    """Whoever controls a container controls this text."""
    message, said = (one_line(text, _MESSAGE_MOST) for text in (problem.message, problem.said))
    return replace(problem, message=message, said=said)


def _of_pod(status: PodStatus) -> Problem | None:
    if status.phase == "Failed" and status.reason:
        return _failed(status)
    for container in (*status.init_containers, *status.containers):
        found = _waiting(container) or (None if container.ready else _ended(container))
        if found is not None:
            return _without_directory(found, status) or found
    return _unschedulable(status) or _without_node(status)


def _failed(status: PodStatus) -> Problem:
    """Its node evicted the pod, or rejected it when the scheduler had placed it there."""
    cause = f"node {status.node or 'of the pod'} evicted or rejected the pod ({status.reason})"
    said = f"; the kubelet says: {status.message.strip()}" if status.message.strip() else ""
    remedy = "remove the cause; another pod takes its place by itself"
    return Problem("PodFailed", f"{cause}; {remedy}{said}", remedied=True)


def _waiting(container: Container) -> Problem | None:
    reason = _WAITING.get(container.waiting)
    if reason is None:
        return None
    detail = container.waiting_message or container.waiting
    if container.waiting in _UNINFORMATIVE:
        detail = f"image {container.image}: {detail}"
    return Problem(reason, detail.strip(), stuck=container.waiting in _NEEDS_EDIT)


def _ended(container: Container) -> Problem | None:
    """The last end of the container, if it was an error; it is reported while the next attempt starts."""
    end, name = container.end or container.last_end, container.name
    if end is None or end.code == 0:
        return None
    if end.reason == "StartError":
        # The runtime's message while the kubelet waits for the next attempt.
        return Problem("ContainerCreateFailed", end.message.strip() or "the runtime gave no reason")
    said = error_sentence(end.message)
    if name == names.FETCH_CONTAINER and said is not None:
        return Problem("ModelFetchFailed", said, stuck=end.code == _EXIT_BAD_INPUT)
    if name == names.ROLE_WORKER and end.code == _EXIT_BAD_INPUT and said is not None:
        refused = QUALITY if said.startswith(_QUALITY_LINE) else "ModelLoadFailed"
        return Problem(refused, said, stuck=True)
    sentence = said or _crash_sentence(name, end)
    reason = _FAILED.get(name, "SidecarFailed") if said else "ContainerCrashed"
    message = f"{sentence}; it is started again" if container.running else sentence
    follows = name == names.ROLE_WORKER and end.code == _EXIT_RANK_LOST
    return Problem(reason, message, follows=follows, since=end.at)


def _without_directory(problem: Problem, status: PodStatus) -> Problem | None:
    """The problem of a container whose directory the node lacks; None for any other.

    Runtimes report the path in their own words: "stat PATH: no such file or directory" (runc).
    """
    if problem.reason != "ContainerCreateFailed" or not _NO_DIRECTORY.search(problem.message):
        return None
    words = re.split(r"""[\s:"',]+""", problem.message)
    missing = next((path for path in status.host_paths if path in words), None)
    if missing is None:
        return None
    cause = f"node {status.node or 'of the pod'} has no directory {missing}"
    remedy = "correct spec.model.uri, or put the checkpoint there"
    message = f"{cause}; {remedy}; the kubelet says: {problem.message}"
    return replace(problem, message=message, remedied=True)


def _crash_sentence(name: str, end: ContainerEnd) -> str:
    sentence = f"{name} ended with exit code {end.code}{_signal(end.code)}"
    if end.reason == "OOMKilled":
        return f"{sentence}, OOMKilled: it needed more memory than its limit, or than the node has"
    if end.reason not in ("", "Error"):
        return f"{sentence}, {end.reason}"
    if end.code == _SIGNALLED + signal.SIGKILL:
        return f"{sentence}: usual causes are its memory limit, its liveness probe and its node"
    return sentence


def _signal(code: int) -> str:
    try:
        return f" ({signal.Signals(code - _SIGNALLED).name})"
    except ValueError:
        return ""


def error_sentence(log: str) -> str | None:
    """The last line of a log that starts with "error: ", without these words; None when there is none."""
    lines = [line for line in log.splitlines() if line.startswith(_ERROR_LINE)]
    return lines[-1].removeprefix(_ERROR_LINE).strip() if lines else None


def _without_node(status: PodStatus) -> Problem | None:
    """Whether its node stopped reporting.

    The node controller then sets the pods there to not Ready without a reason; a kubelet always gives one.
    """
    ready = status.conditions.get("Ready")
    if ready is None or ready.status != "False" or ready.reason or not status.holds("ContainersReady"):
        return None
    sentence = (
        f"node {status.node or 'of the pod'} does not report to Kubernetes; after some minutes another "
        "replica takes its place"
    )
    return Problem("NodeNotReady", sentence)


def _unschedulable(status: PodStatus) -> Problem | None:
    placed = status.conditions.get("PodScheduled")
    if placed is None or placed.status != "False":
        return None
    return _unplaced(placed.reason or "Unschedulable", placed.message)


def _unplaced(reason: str, said: str) -> Problem:
    cause, remedy = _without_claim(said) or (no_node(said), _PLACING[no_node(said)])
    message = f"{cause}; {remedy}{scheduler_says(said)}"
    return Problem(reason, message, said=said, remedied=True)


def _without_claim(said: str) -> tuple[str, str] | None:
    """The cause and the remedy, if a claim of the pod is missing or has no volume."""
    if missing := _NO_CLAIM.search(said):
        return f"the claim {missing[1]} does not exist", "create it, or correct its name in the spec"
    if "unbound immediate PersistentVolumeClaims" in said:
        return (
            "a claim of the pod has no volume",
            "see its events (kubectl describe pvc), or use another claim",
        )
    return None


_NO_CLAIM: Final = re.compile(r'persistentvolumeclaim "([^"]+)" not found')
_PLACING: Final = {
    "no node has room": "free resources, add a node, or request less",
    "no node matches": "correct the node selector or the tolerations, or add a node",
    "no node takes it": "remove what the scheduler names",
}
"""The remedy for a pod that no node accepts, by the cause."""


def no_node(said: str) -> str:
    """The cause in our words, from the scheduler's."""
    if lacks_resources(said):
        return "no node has room"
    return "no node matches" if is_excluded(said) else "no node takes it"


def scheduler_says(said: str) -> str:
    """The end of a message with the scheduler's own words; empty if there are none."""
    return f"; the scheduler says: {said.rstrip('.')}" if said else ""


def refused_pod(said: str) -> Problem:
    """Why the API server refuses the pod, from its message."""
    why = next((why for part, why in _REFUSALS if part in said), _REFUSED_SOMEHOW)
    message = f"{why}, and Kubernetes tries again by itself; the API server says: {said}"
    return Problem(POD_REFUSED, message, remedied=True)


def of_workload(said: str) -> Problem:
    """Why a Deployment's controller cannot create pods, from the message of its condition ReplicaFailure."""
    return _bounded(refused_pod(said or "the API server gives no reason"))

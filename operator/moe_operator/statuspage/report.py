"""The report of `moe status NAME` about one deployment, as JSON values. Pure.

The keys are an interface: scripts read them. They are added to, not renamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from moe_operator.observed import pod_status
from moe_operator.observed.pod_status import PodStatus
from moe_operator.observed.problems import of_delay, of_pod
from moe_operator.resources import cache_sums, names
from moe_operator.resources.deployment import parse_status
from moe_operator.resources.ports import serves_mutual_tls

Body = Mapping[str, Any]


def report(
    body: Body, pods: Iterable[Body], events: Iterable[Body], routes: Iterable[Body], now: datetime
) -> dict[str, Any]:
    """One deployment with its pods and decisions, oldest first.

    Args:
        body: a MoEDeployment as the API server gives it.
        pods: its pods, workers and frontends.
        events: Events about it.
        routes: FrontendRoutes of its frontends.
        now: when these were read.
    """
    status, metadata, spec = parse_status(body), body["metadata"], body.get("spec", {})
    loads = {load["pod"]: load for load in (body.get("status", {}).get("scaling") or {}).get("load", ())}
    return {
        "namespace": metadata["namespace"],
        "name": metadata["name"],
        "generation": metadata.get("generation"),
        "observedGeneration": status.observed_generation,
        "model": {
            "servedName": spec.get("model", {}).get("servedName") or metadata["name"],
            "uri": spec.get("model", {}).get("uri"),
            **(status.model.manifest() if status.model else {}),
        },
        "replicas": {
            "desired": desired(body),
            "ready": status.ready_replicas,
            "updated": status.updated_replicas,
            "there": status.replicas,
        },
        "revision": status.revision,
        "mesh": None if status.mesh is None else status.mesh.manifest(),
        "scaling": body.get("status", {}).get("scaling"),
        "caches": cache_sums.total(_caches(one) for one in routes),
        "conditions": [condition.manifest() for condition in status.conditions],
        "pods": sorted((_pod(pod, status.revision, loads, now) for pod in pods), key=_pod_order),
        "decisions": sorted((_decision(event) for event in events), key=lambda told: str(told["time"])),
    }


def _caches(routes: Body) -> object:
    return (routes["metadata"].get("annotations") or {}).get(names.ANNOTATION_CACHES)


def desired(body: Body) -> int:
    """The desired number of replicas: from the status, otherwise from the spec."""
    said = parse_status(body).desired_replicas
    return int(body.get("spec", {}).get("replicas", 1)) if said is None else said


def _pod(pod: Body, current_revision: str, loads: Mapping[str, Body], now: datetime) -> dict[str, Any]:
    metadata, status = pod["metadata"], pod_status.read(pod)
    labels = metadata.get("labels", {})
    revision = labels.get(names.LABEL_REVISION)
    ready = status.holds("Ready")
    problem = None if ready else of_pod(status) or of_delay(status, now)
    return {
        "name": metadata["name"],
        "role": labels.get(names.LABEL_ROLE),
        "rank": _rank(metadata, labels),
        "dataRank": int(rank) if (rank := labels.get(names.LABEL_DATA_RANK, "")).isdecimal() else None,
        "revision": revision,
        "current": None if revision is None else revision == current_revision,
        "ready": ready,
        "leaving": "deletionTimestamp" in metadata,
        "phase": status.phase or None,
        "node": status.node or None,
        "address": status.address or None,
        "mutualTls": serves_mutual_tls(pod, labels.get(names.LABEL_ROLE, "")),
        "restarts": status.restarts,
        "load": _load(loads.get(metadata["name"])),
        "problem": {"reason": problem.reason, "message": problem.message} if problem else None,
        "lastEnd": _last_end(status),
    }


def _rank(metadata: Body, labels: Body) -> int | None:
    """Its number in a replica of several workers."""
    ordinal = labels.get(names.LABEL_POD_INDEX) or metadata["name"].rpartition("-")[2]
    return int(ordinal) if names.ranks_of(labels) > 1 and ordinal.isdecimal() else None


def _load(said: Body | None) -> dict[str, Any] | None:
    """The load of a replica, at most a minute old; None if it is unknown."""
    if said is None:
        return None
    return {field: said.get(field) for field in ("queued", "running", "kvUsedPercent")}


def _last_end(status: PodStatus) -> dict[str, Any] | None:
    """The end of the previous run of the container; its own message is often the best explanation."""
    for container in status.containers:
        end = container.last_end
        if end is not None:
            told = {"exitCode": end.code, "reason": end.reason or None, "at": end.at or None}
            return {**told, "log": end.message.strip() or None}
    return None


def _pod_order(pod: Mapping[str, Any]) -> tuple[bool, int, int, str]:
    return pod["role"] != names.ROLE_WORKER, pod["dataRank"] or 0, pod["rank"] or 0, pod["name"]


def _decision(event: Body) -> dict[str, Any]:
    """An Event. Those of the operator have microseconds, which order decisions within one second."""
    return {
        "time": event.get("eventTime") or event.get("lastTimestamp"),
        "type": event.get("type"),
        "reason": event.get("reason"),
        "message": event.get("message"),
        "by": event.get("reportingComponent") or event.get("source", {}).get("component"),
    }

"""The observed objects of the cluster as typed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from moe_operator.observed import problems
from moe_operator.observed.problems import Problem
from moe_operator.render.objects import Key, Manifest, belongs, key
from moe_operator.resources import names
from moe_operator.resources.deployment import Identity
from moe_operator.resources.status import ModelInfo


@dataclass(frozen=True)
class Observed:
    """The cluster, as far as it concerns one deployment."""

    children: Mapping[Key, Manifest] = field(default_factory=dict)
    """Objects that carry the deployment's label, and objects of others under names that it wants."""
    pods: tuple[Manifest, ...] = ()
    """Pods that carry the deployment's label."""
    model: ModelInfo | None = None
    """The model as just reported by a Ready leader; None if none was asked or none responded."""
    work: Mapping[str, int] = field(default_factory=dict)
    """Active requests of leaders, by pod name; only if they were asked."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why pods cannot be made, by pod name; only of pods that are missing."""
    routed: Mapping[str, str] = field(default_factory=dict)
    """Addresses of the leaders to which every frontend routes, by pod name; if they were asked."""
    obstacles: Mapping[str, str] = field(default_factory=dict)
    """Why a new replica's pod would not fit in the place of a leader, by pod name; empty text if it would.
    Only if it was checked.
    """
    together: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """The other leaders that must be deleted too, by pod name; only if the pod would fit in all their places
    together, and in none alone.
    """
    verdicts: Mapping[Key, str] = field(default_factory=dict)
    """The recipe (worker.recipe) that an earlier reconcile found this version of a StatefulSet to match."""
    downloads: Mapping[str, Download] = field(default_factory=dict)
    """How far downloads of the model are, by pod name; if they were asked."""
    routes: tuple[Manifest, ...] = ()
    """FrontendRoutes that carry the deployment's label."""
    meshes: Mapping[str, Any] = field(default_factory=dict)
    """What leaders of gangs report (mesh.MeshReading), by pod name; only of those that responded."""


@dataclass(frozen=True)
class Download:
    """How far a pod is with downloading the model."""

    done: int
    """Bytes that are there."""
    total: int
    """Bytes of the model; above 0."""
    seconds_left: int
    """At the current speed; 0 where it is not known."""

    @property
    def text(self) -> str:
        """For people: 42 % of 18.2 GiB, 3 min left."""
        left = f", {_duration(self.seconds_left)} left" if self.seconds_left else ""
        return f"{100 * self.done // self.total} % of {_amount(self.total)}{left}"


def _amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _duration(seconds: int) -> str:
    if seconds < 60:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 3600 else f"{seconds // 3600} h {seconds % 3600 // 60} min"


@dataclass(frozen=True)
class Pod:
    """One pod of a deployment."""

    name: str
    address: str
    """Pod IP; empty until it has one."""
    ready: bool
    terminating: bool
    revision: str
    data_rank: int
    problem: Problem | None
    unplaced_since: datetime | None = None
    """Since when no node takes it."""
    uid: str = ""
    containers_ready: bool = False
    """Its containers are ready, whether the pod is or not."""
    gated: bool = False
    """It has the readiness gate for routing."""
    routed: bool = False
    """The gate is open, according to its status."""
    node: str = ""
    """Name of its node; empty until it has one."""
    served_until: datetime | None = None
    """Since when it is not ready, of one that was."""
    fetching: bool = False
    """It downloads the model before its worker starts."""
    ends_by: datetime | None = None
    """When it has to have ended; None if it is not being deleted."""
    rank: int = 0
    """Its number in its replica; 0 leads."""
    shape: str = ""
    """PIPELINExEXPERT of its replica; empty if it is the whole replica."""
    restarts: int = 0
    """Of its containers."""
    ready_since: datetime | None = None
    """Since when it is ready; None if it is not."""
    admin_port: int = names.GRPC_PORT
    """Where it answers the operator."""

    @property
    def admin_address(self) -> str:
        """Where it answers the operator: its IP address, with the port if that is not gRPC's."""
        if not self.address or self.admin_port == names.GRPC_PORT:
            return self.address
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.admin_port}"

    @property
    def title(self) -> str:
        """Its name, and in a replica of several workers its rank."""
        ranks = self.shape.partition("x")[2]
        if not ranks:
            return self.name
        return f"{self.name} (rank {self.rank}, stage {self.rank // int(ranks)})"


def workers(observed: Observed) -> dict[int, tuple[Pod, ...]]:
    """The workers of each replica in order of their ranks, by data rank. A successor takes precedence over a
    terminating pod.
    """
    found: dict[int, dict[int, Pod]] = {}
    for manifest in observed.pods:
        if _is_worker(manifest["metadata"]):
            pod = _pod(manifest)
            replica = found.setdefault(pod.data_rank, {})
            if pod.rank not in replica or replica[pod.rank].terminating:
                replica[pod.rank] = pod
    return {rank: tuple(pod for _, pod in sorted(own.items())) for rank, own in sorted(found.items())}


def leaders(observed: Observed) -> dict[int, Pod]:
    """The leader of each replica, by data rank."""
    return leading(workers(observed))


def leading(workers: Mapping[int, tuple[Pod, ...]]) -> dict[int, Pod]:
    """The leaders among the workers."""
    return {data_rank: own[0] for data_rank, own in workers.items() if own[0].rank == 0}


def frontends(observed: Observed) -> list[Pod]:
    """The frontend's pods."""
    manifests = (
        manifest
        for manifest in observed.pods
        if manifest["metadata"].get("labels", {}).get(names.LABEL_ROLE) == names.ROLE_FRONTEND
    )
    return [_pod(manifest) for manifest in manifests]


def _is_worker(metadata: Mapping[str, Any]) -> bool:
    """Whether it has a worker's labels, and the name that the StatefulSet controller gives."""
    labels = metadata.get("labels", {})
    name, data_rank = labels.get(names.LABEL_NAME, ""), labels.get(names.LABEL_DATA_RANK, "")
    if not data_rank.isdecimal() or not names.worker_labels(name).items() <= labels.items():
        return False
    prefix, ordinal = f"{names.replica(name, int(data_rank))}-", metadata["name"].rpartition("-")[2]
    return bool(metadata["name"] == f"{prefix}{ordinal}" and ordinal.isdecimal())


def _pod(manifest: Mapping[str, Any]) -> Pod:
    metadata, status = manifest["metadata"], manifest.get("status", {})
    labels = metadata.get("labels", {})
    terminating = "deletionTimestamp" in metadata
    conditions = {condition["type"]: condition["status"] for condition in status.get("conditions", ())}
    ready = not terminating and conditions.get("Ready") == "True"
    return Pod(
        name=metadata["name"],
        address=status.get("podIP", ""),
        ready=ready,
        terminating=terminating,
        revision=labels.get(names.LABEL_REVISION, ""),
        data_rank=int(labels.get(names.LABEL_DATA_RANK, 0)),
        problem=None if ready or terminating else problems.of_pod(manifest),
        unplaced_since=_since(status, "PodScheduled"),
        node=manifest.get("spec", {}).get("nodeName", ""),
        served_until=None if ready or names.ROUTED not in conditions else _since(status, "Ready"),
        uid=metadata.get("uid", ""),
        containers_ready=not terminating and conditions.get("ContainersReady") == "True",
        gated={"conditionType": names.ROUTED} in manifest.get("spec", {}).get("readinessGates", ()),
        routed=conditions.get(names.ROUTED) == "True",
        fetching=not terminating and _is_fetching(status),
        ends_by=datetime.fromisoformat(metadata["deletionTimestamp"]) if terminating else None,
        rank=_rank(metadata),
        shape=labels.get(names.LABEL_MESH, "") if names.ranks_of(labels) > 1 else "",
        restarts=sum(one.get("restartCount", 0) for one in status.get("containerStatuses", ())),
        ready_since=_since(status, "Ready", "True") if ready else None,
        admin_port=_admin_port(manifest),
    )


def _admin_port(manifest: Mapping[str, Any]) -> int:
    """The port of this name that its containers declare; that of gRPC if there is none."""
    declared = (
        port
        for container in manifest.get("spec", {}).get("containers", ())
        if container["name"] == names.ROLE_FRONTEND
        for port in container.get("ports", ())
    )
    found = (int(port["containerPort"]) for port in declared if port.get("name") == names.ADMIN_PORT_NAME)
    return next(found, names.GRPC_PORT)


def _is_fetching(status: Mapping[str, Any]) -> bool:
    return any(
        container["name"] == names.FETCH_CONTAINER and "running" in container.get("state", {})
        for container in status.get("initContainerStatuses", ())
    )


def _rank(metadata: Mapping[str, Any]) -> int:
    """The ordinal at the end of a StatefulSet's pod's name."""
    ordinal = metadata["name"].rpartition("-")[2]
    of_worker = metadata.get("labels", {}).get(names.LABEL_ROLE) == names.ROLE_WORKER
    return int(ordinal) if of_worker and ordinal.isdecimal() else 0


def _since(status: Mapping[str, Any], kind: str, value: str = "False") -> datetime | None:
    """Since when a condition has a value."""
    for condition in status.get("conditions", ()):
        if condition["type"] == kind and condition["status"] == value:
            since = condition.get("lastTransitionTime")
            return datetime.fromisoformat(since) if since else None
    return None


def owned(observed: Observed, kind: str, owner: Identity) -> dict[str, Manifest]:
    """Children of one kind that are this deployment's, by name."""
    return {
        child.name: manifest
        for child, manifest in observed.children.items()
        if child.kind == kind and belongs(manifest, owner)
    }


def podless(observed: Observed, owner: Identity) -> list[str]:
    """StatefulSets whose controller has created no pod after observing them: the pod was refused."""
    there = {pod["metadata"]["name"] for pod in observed.pods}
    return [
        name
        for name, manifest in owned(observed, "StatefulSet", owner).items()
        if "deletionTimestamp" not in manifest["metadata"]
        and manifest["spec"].get("replicas", 1)
        and manifest.get("status", {}).get("observedGeneration")
        and not manifest["status"].get("replicas")
        and f"{name}-0" not in there
    ]


@dataclass(frozen=True)
class FrontendState:
    """The frontend's pods, compared with the wanted ones."""

    wanted: int = 0
    ready: int = 0
    """Ready pods, at most the wanted number."""
    updated: bool = False
    """All are of the template asked for, and none is there beyond them."""
    problem: tuple[str, Problem] | None = None
    """The first pod that cannot start, or the Deployment that cannot create pods, and why."""


def frontend_state(observed: Observed, name: str, wanted: int) -> FrontendState:
    """The state of a deployment's frontend, from its Deployment and its pods."""
    manifest = observed.children.get(Key("Deployment", names.frontend(name)))
    if manifest is None:
        return FrontendState(wanted)
    return FrontendState(
        wanted,
        min(int(manifest.get("status", {}).get("readyReplicas", 0)), wanted),
        _is_updated(manifest, wanted),
        _frontend_problem(observed, manifest),
    )


def _is_updated(manifest: Manifest, wanted: int) -> bool:
    status = manifest.get("status", {})
    seen = status.get("observedGeneration", 0) >= manifest["metadata"].get("generation", 0)
    return bool(seen and status.get("replicas", 0) == status.get("updatedReplicas", 0) == wanted)


def _frontend_problem(observed: Observed, manifest: Manifest) -> tuple[str, Problem] | None:
    for pod in frontends(observed):
        if pod.problem is not None:
            return pod.name, pod.problem
    refused = problems.of_workload(manifest)
    return None if refused is None else (str(key(manifest)), refused)

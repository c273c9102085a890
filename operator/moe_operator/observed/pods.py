"""The pods of a deployment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from moe_api.address import join
from moe_operator.observed import pod_status, problems
from moe_operator.observed.pod_status import PodStatus
from moe_operator.observed.problems import Problem
from moe_operator.resources import names, peers, ports


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
    """Where it responds to the operator."""
    secure: bool = False
    """It serves mutual TLS to the operator and to frontends."""
    namespace: str = ""
    role: str = ""
    """Worker or frontend (names.ROLE_WORKER, names.ROLE_FRONTEND); empty if it is neither."""
    created: datetime | None = None
    status: PodStatus = field(default_factory=PodStatus, compare=False)
    """What the kubelet and the scheduler report of it."""
    before: PodStatus | None = field(default=None, compare=False)
    """The last status of the pod of this name before it, if its node evicted or rejected that."""

    def obstacle(self, now: datetime) -> Problem | None:
        """Its problem, or what it has waited for too long."""
        if self.problem is not None or self.ready or self.terminating:
            return self.problem
        return problems.of_delay(self.status, now) or problems.of_predecessor(self.status, self.before, now)

    @property
    def reachable(self) -> bool:
        """Whether it may answer: it has an IP address, and neither ended nor is being deleted."""
        return bool(self.address) and not self.terminating and not self.status.ended

    @property
    def addresses(self) -> frozenset[str]:
        """All its IP addresses: in a dual-stack cluster one of each family."""
        return frozenset((self.address, *self.status.addresses)) - {""}

    @property
    def grpc_address(self) -> str:
        """Where it responds as a worker (moe_operator.resources.peers); empty while it has no IP address."""
        if not self.address or not self.secure:
            return self.address
        return peers.secure(names.ROLE_WORKER, self.namespace, self.address, names.GRPC_PORT)

    @property
    def admin_address(self) -> str:
        """Where it responds as a frontend: its IP address, with the port if that is not gRPC's."""
        if self.address and self.secure:
            return peers.secure(names.ROLE_FRONTEND, self.namespace, self.address, self.admin_port)
        if not self.address or self.admin_port == names.GRPC_PORT:
            return self.address
        return join(self.address, self.admin_port)

    @property
    def title(self) -> str:
        """Its name, and in a replica of several workers its rank."""
        ranks = self.shape.partition("x")[2]
        if not ranks:
            return self.name
        return f"{self.name} (rank {self.rank}, stage {self.rank // int(ranks)})"


def read(manifest: Mapping[str, Any]) -> Pod:
    """A pod as the API server returns it."""
    metadata, status = manifest["metadata"], pod_status.read(manifest)
    labels, role = metadata.get("labels", {}), _role(metadata)
    ends = metadata.get("deletionTimestamp")
    ready = not ends and status.holds("Ready")
    return Pod(
        name=metadata["name"],
        address=status.address,
        ready=ready,
        terminating=bool(ends),
        revision=labels.get(names.LABEL_REVISION, ""),
        data_rank=_number(labels.get(names.LABEL_DATA_RANK, "")),
        problem=None if ready or ends else problems.of_pod(status),
        unplaced_since=status.since("PodScheduled"),
        node=status.node,
        served_until=None if ready or names.ROUTED not in status.conditions else status.since("Ready"),
        uid=metadata.get("uid", ""),
        containers_ready=not ends and status.holds("ContainersReady"),
        gated={"conditionType": names.ROUTED} in manifest.get("spec", {}).get("readinessGates", ()),
        routed=status.holds(names.ROUTED),
        fetching=not ends and status.fetches,
        ends_by=_time(ends),
        rank=_number(metadata["name"].rpartition("-")[2]) if role == names.ROLE_WORKER else 0,
        shape=labels.get(names.LABEL_MESH, "") if names.ranks_of(labels) > 1 else "",
        restarts=status.restarts,
        ready_since=status.since("Ready", "True") if ready else None,
        admin_port=ports.admin_port(manifest),
        secure=ports.serves_mutual_tls(manifest, role),
        namespace=metadata.get("namespace", ""),
        role=role,
        created=_time(metadata.get("creationTimestamp")),
        status=status,
    )


def _role(metadata: Mapping[str, Any]) -> str:
    """A worker has a worker's labels, and the name that the StatefulSet controller gives."""
    labels = metadata.get("labels", {})
    role = str(labels.get(names.LABEL_ROLE, ""))
    if role != names.ROLE_WORKER:
        return role if role == names.ROLE_FRONTEND else ""
    name, data_rank = labels.get(names.LABEL_NAME, ""), labels.get(names.LABEL_DATA_RANK, "")
    if not data_rank.isdecimal():
        return ""
    replica, _, ordinal = metadata["name"].rpartition("-")
    return role if replica == names.replica(name, int(data_rank)) and ordinal.isdecimal() else ""


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None

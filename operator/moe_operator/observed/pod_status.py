"""The status of a pod, as the kubelet and the scheduler report it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from moe_operator.resources import names

_NOT_CREATED: Final = ("ContainerCreating", "PodInitializing")
"""Why a container waits until its pod's volumes are mounted; the second one if there are init containers."""


@dataclass(frozen=True)
class PodCondition:
    """One condition of a pod."""

    status: str
    """True, False or Unknown."""
    reason: str = ""
    message: str = ""
    since: datetime | None = None
    """Time of the last change of its status."""


@dataclass(frozen=True)
class ContainerEnd:
    """The end of one run of a container."""

    code: int
    """Exit code."""
    reason: str = ""
    message: str = ""
    at: str = ""
    """RFC 3339."""


@dataclass(frozen=True)
class Container:
    """One container of a pod."""

    name: str
    image: str = ""
    ready: bool = False
    restarts: int = 0
    running: bool = False
    started: datetime | None = None
    """Start of the current run; None if it does not run."""
    waiting: str = ""
    """Reason why it does not run yet; empty if it does not wait."""
    waiting_message: str = ""
    end: ContainerEnd | None = None
    """End of the current run; None if it has not ended."""
    last_end: ContainerEnd | None = None
    """End of the run before."""


@dataclass(frozen=True)
class PodStatus:
    """What the kubelet and the scheduler report of one pod."""

    phase: str = ""
    reason: str = ""
    """Why its node evicted or rejected it, in one word; empty if it did not."""
    message: str = ""
    created: datetime | None = None
    started: datetime | None = None
    """When its node took it, or rejected it."""
    scheduler: str = ""
    """Name of the scheduler that has to place it."""
    address: str = ""
    """Pod IP; empty until it has one."""
    addresses: tuple[str, ...] = ()
    """Pod IPs, the same one first; two in a dual-stack cluster."""
    node: str = ""
    """Name of its node; empty until it has one."""
    conditions: Mapping[str, PodCondition] = field(default_factory=dict)
    """By type."""
    init_containers: tuple[Container, ...] = ()
    containers: tuple[Container, ...] = ()
    host_paths: tuple[str, ...] = ()
    """Directories of its node that it mounts."""
    secrets: tuple[str, ...] = ()
    """Names of Secrets that volumes need, without those of mutual TLS."""

    @property
    def ended(self) -> bool:
        """Whether none of its containers runs ever again: evicted, or rejected by its node, for example."""
        return self.phase in ("Failed", "Succeeded")

    @property
    def restarts(self) -> int:
        """Of its containers."""
        return sum(container.restarts for container in self.containers)

    @property
    def fetches(self) -> bool:
        """Whether it downloads the model now."""
        return any(one.name == names.FETCH_CONTAINER and one.running for one in self.init_containers)

    @property
    def mounting_since(self) -> datetime | None:
        """Since when its node mounts its volumes and sets up its network, before it creates any container;
        None if it has no node yet, or has done so.
        """
        if not self.node or self.phase != "Pending" or self.holds("PodReadyToStartContainers"):
            return None
        if any(one.waiting not in _NOT_CREATED for one in (*self.init_containers, *self.containers)):
            return None
        return self.since("PodReadyToStartContainers") or self.since("PodScheduled", "True")

    @property
    def queued_since(self) -> datetime | None:
        """Since when it waits for a scheduler that has not tried to place it; None if one has."""
        waits = self.phase == "Pending" and not self.node and "PodScheduled" not in self.conditions
        return self.created if waits else None

    @property
    def ended_since(self) -> datetime | None:
        """When it ended, as far as its status says; only of one that has."""
        ends = [container.end.at for container in self.containers if container.end is not None]
        times = [condition.since for condition in self.conditions.values()]
        return max(filter(None, (self.created, self.started, *times, *map(_time, ends))), default=None)

    @property
    def waits_because(self) -> str:
        """Why no node accepts it, in the scheduler's words."""
        placed = self.conditions.get("PodScheduled")
        return "" if placed is None else placed.message

    def holds(self, kind: str) -> bool:
        """Whether a condition is True."""
        found = self.conditions.get(kind)
        return found is not None and found.status == "True"

    def since(self, kind: str, status: str = "False") -> datetime | None:
        """Since when a condition has a status; None if it does not, or that is not known."""
        found = self.conditions.get(kind)
        return found.since if found is not None and found.status == status else None


def read(manifest: Mapping[str, Any]) -> PodStatus:
    """The status of a pod as the API server returns it."""
    status, spec = manifest.get("status", {}), manifest.get("spec", {})
    return PodStatus(
        phase=status.get("phase", ""),
        reason=status.get("reason") or "",
        message=status.get("message") or "",
        created=_time(manifest.get("metadata", {}).get("creationTimestamp")),
        started=_time(status.get("startTime")),
        scheduler=spec.get("schedulerName", ""),
        address=status.get("podIP", ""),
        addresses=tuple(one["ip"] for one in status.get("podIPs", ()) if "ip" in one),
        node=spec.get("nodeName", ""),
        conditions={one["type"]: _condition(one) for one in status.get("conditions", ())},
        init_containers=_containers(status.get("initContainerStatuses", ())),
        containers=_containers(status.get("containerStatuses", ())),
        host_paths=tuple(one["hostPath"]["path"] for one in spec.get("volumes", ()) if "hostPath" in one),
        secrets=tuple(filter(None, map(secret_of, spec.get("volumes", ())))),
    )


def secret_of(volume: Mapping[str, Any]) -> str:
    """Name of the Secret that a volume needs; empty if it needs none, or one of mutual TLS."""
    secret = volume.get("secret") or {}
    name = str(secret.get("secretName", ""))
    return "" if secret.get("optional") or name.startswith(names.INTERNAL_SECRETS) else name


def _condition(item: Mapping[str, Any]) -> PodCondition:
    since = _time(item.get("lastTransitionTime"))
    return PodCondition(item["status"], item.get("reason", ""), item.get("message", ""), since)


def _containers(items: Iterable[Mapping[str, Any]]) -> tuple[Container, ...]:
    return tuple(map(_container, items))


def _container(item: Mapping[str, Any]) -> Container:
    state = item.get("state", {})
    waiting = state.get("waiting") or {}
    return Container(
        name=item["name"],
        image=item.get("image", ""),
        ready=bool(item.get("ready")),
        restarts=item.get("restartCount", 0),
        running="running" in state,
        started=_time((state.get("running") or {}).get("startedAt")),
        waiting=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        end=_end(state.get("terminated")),
        last_end=_end(item.get("lastState", {}).get("terminated")),
    )


def _end(item: Mapping[str, Any] | None) -> ContainerEnd | None:
    if not item:
        return None
    texts = (str(item.get(name) or "") for name in ("reason", "message", "finishedAt"))
    return ContainerEnd(int(item.get("exitCode", 0)), *texts)


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None

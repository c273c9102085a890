"""Nodes, and what pods ask of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from moe_operator.resources import quantity

Amounts = Mapping[str, Decimal]
"""Of resources, by name."""

_UNMODELLED: Final[Mapping[str, Any]] = {
    "affinity": None,
    "topologySpreadConstraints": None,
    "resourceClaims": None,
    "runtimeClassName": None,
    "schedulerName": "default-scheduler",
    "schedulingGates": None,
    "hostNetwork": False,
}
"""Fields of a pod's spec that the scheduler reads and that are not modelled here, with their defaults."""


@dataclass(frozen=True)
class Taint:
    """A taint of a node."""

    key: str
    effect: str
    value: str = ""


_UNSCHEDULABLE: Final = Taint("node.kubernetes.io/unschedulable", "NoSchedule")


@dataclass(frozen=True)
class PodToleration:
    """A toleration of a pod; empty texts match everything, as Kubernetes has it."""

    key: str
    operator: str
    value: str
    effect: str


@dataclass(frozen=True)
class Node:
    """One node."""

    name: str
    labels: Mapping[str, str]
    taints: tuple[Taint, ...]
    """With the one that stands for a cordon."""
    allocatable: Amounts


@dataclass(frozen=True)
class PodNeeds:
    """What a pod asks of its node."""

    requests: Amounts
    node_selector: Mapping[str, str]
    tolerations: tuple[PodToleration, ...]
    claims: tuple[Any, ...]
    """Its volumes that have claims."""
    host_ports: frozenset[int]
    unmodelled: Mapping[str, Any]
    """Other fields that the scheduler reads, by name; they are only compared."""


@dataclass(frozen=True)
class NodePod:
    """A pod that has a node."""

    uid: str
    needs: PodNeeds


def read_node(manifest: Mapping[str, Any]) -> Node:
    """A node as the API server returns it."""
    metadata, spec = manifest["metadata"], manifest.get("spec", {})
    taints = tuple(Taint(one["key"], one["effect"], one.get("value", "")) for one in spec.get("taints", ()))
    return Node(
        metadata["name"],
        metadata.get("labels", {}),
        (_UNSCHEDULABLE, *taints) if spec.get("unschedulable") else taints,
        _amounts(manifest["status"]["allocatable"]),
    )


def read_pod(manifest: Mapping[str, Any]) -> NodePod:
    """A pod of a node as the API server returns it."""
    return NodePod(manifest["metadata"]["uid"], needs(manifest["spec"]))


def needs(spec: Mapping[str, Any]) -> PodNeeds:
    """What a pod with a spec asks of its node."""
    ports = (port for container in spec.get("containers", ()) for port in container.get("ports", ()))
    return PodNeeds(
        _requests(spec),
        spec.get("nodeSelector") or {},
        tuple(map(_toleration, spec.get("tolerations") or ())),
        _claims(spec),
        frozenset(port["hostPort"] for port in ports if port.get("hostPort")),
        {name: spec.get(name) or default for name, default in _UNMODELLED.items()},
    )


def _toleration(item: Mapping[str, Any]) -> PodToleration:
    return PodToleration(*(item.get(name) or "" for name in ("key", "operator", "value", "effect")))


def _claims(spec: Mapping[str, Any]) -> tuple[Any, ...]:
    kinds = ("persistentVolumeClaim", "ephemeral", "csi")
    return tuple(volume for volume in spec.get("volumes", ()) if any(kind in volume for kind in kinds))


def _requests(spec: Mapping[str, Any]) -> Amounts:
    """What a pod takes of a node's resources: by the rules of kubernetes/component-helpers/resource.

    Containers and sidecars run together; an init container runs with the sidecars before it.
    """
    running: dict[str, Decimal] = defaultdict(Decimal)
    for container in spec.get("containers", ()):
        _add(running, _requested(container))
    sidecars: dict[str, Decimal] = defaultdict(Decimal)
    peak: dict[str, Decimal] = defaultdict(Decimal)
    for container in spec.get("initContainers", ()):
        needed = defaultdict(Decimal, sidecars)
        _add(needed, _requested(container))
        if container.get("restartPolicy") == "Always":
            sidecars = needed
        for resource, amount in needed.items():
            peak[resource] = max(peak[resource], amount)
    _add(running, sidecars)
    total = defaultdict(
        Decimal, {resource: max(running[resource], peak[resource]) for resource in {*running, *peak}}
    )
    _add(total, _amounts(spec.get("overhead", {})))
    return {"pods": Decimal(1), **total}


def _requested(container: Mapping[str, Any]) -> Amounts:
    """Requests of one container; what it limits without a request counts as requested."""
    resources = container.get("resources", {})
    return _amounts({**resources.get("limits", {}), **resources.get("requests", {})})


def _amounts(texts: Mapping[str, Any]) -> Amounts:
    return {resource: quantity.parse(text) for resource, text in texts.items()}


def _add(total: dict[str, Decimal], more: Amounts) -> None:
    for resource, amount in more.items():
        total[resource] += amount

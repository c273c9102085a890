"""Decides whether a pod would fit on a node without another pod, as the scheduler's filters would.

An old replica is deleted for a new pod only if this is certain: otherwise a pod that fits nowhere (a typo in
a node selector, a device that no node has) would cost a serving replica for nothing. What is not checked here
(affinity between pods, claims of volumes and devices) must be the same for both pods, for then it did not
keep the old one from its node. And the scheduler must miss resources and name no obstacle that is not
checked.

Filters: kubernetes/pkg/scheduler/framework/plugins (nodeunschedulable, tainttoleration, nodeaffinity,
noderesources).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from moe_operator.planner.observed import Pod
from moe_operator.planner.scheduling import is_exclusion, is_shortage, lacks_resources, reasons
from moe_operator.render.objects import Manifest
from moe_operator.resources import quantity

_ALIKE: Final[Mapping[str, Any]] = {
    "affinity": None,
    "topologySpreadConstraints": None,
    "resourceClaims": None,
    "runtimeClassName": None,
    "schedulerName": "default-scheduler",
    "schedulingGates": None,
    "hostNetwork": False,
}
"""Fields of a pod's spec that the scheduler reads and nobody models here, each with its default."""
_UNSCHEDULABLE: Final = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}


@dataclass(frozen=True)
class Question:
    """The question whether the pod of a new replica would fit in the place of an old one."""

    waiting: str
    """Name of a new pod that no node accepts; empty if there is none so far."""
    template: Manifest
    """Its spec, where there is none."""
    old: tuple[Pod, ...]
    """Leaders whose places may serve, the first ones first."""


@dataclass(frozen=True)
class Seat:
    """An old replica's pod, and its surroundings."""

    pod: Manifest
    node: Manifest
    pods: tuple[Manifest, ...]
    """All on the node that have not ended, the old one included."""


def obstacle(spec: Manifest, said: str, seat: Seat) -> str:
    """Why a pod with a spec would not fit in the place of an old one; empty where it would.

    said: why no node takes the pod so far, in the scheduler's words; empty where the scheduler was not asked.
    """
    found = (
        *_constraints(spec, seat.node),
        *_shortages(spec, seat),
        *_differences(spec, seat.pod["spec"]),
        *_other_reasons(said),
    )
    return found[0] if found else ""


def waits_because(pod: Manifest) -> str:
    """Why no node accepts a pod, in the scheduler's words."""
    conditions = pod.get("status", {}).get("conditions", ())
    return next((str(c.get("message", "")) for c in conditions if c["type"] == "PodScheduled"), "")


def _other_reasons(said: str) -> Iterator[str]:
    """What the scheduler misses, unless it misses resources and names nothing that is not checked here."""
    if not said:
        return
    unknown = [reason for reason in reasons(said) if not (is_shortage(reason) or is_exclusion(reason))]
    if unknown or not lacks_resources(said):
        yield f"the scheduler says: {'; '.join(unknown)}" if unknown else "no resource is missing"


def _differences(new: Manifest, old: Manifest) -> Iterator[str]:
    for field, default in _ALIKE.items():
        if (new.get(field) or default) != (old.get(field) or default):
            yield f"the new pod has another {field}"
    for what, part in (("volume claims", _claims), ("host ports", _host_ports)):
        if part(new) != part(old):
            yield f"the new pod has other {what}"


def _claims(spec: Manifest) -> list[Any]:
    kinds = ("persistentVolumeClaim", "ephemeral", "csi")
    return [volume for volume in spec.get("volumes", ()) if any(kind in volume for kind in kinds)]


def _host_ports(spec: Manifest) -> set[int]:
    ports = (port for container in spec.get("containers", ()) for port in container.get("ports", ()))
    return {port["hostPort"] for port in ports if port.get("hostPort")}


def _constraints(spec: Manifest, node: Manifest) -> Iterator[str]:
    """What keeps a pod from a node whatever else runs there."""
    name, labels = node["metadata"]["name"], node["metadata"].get("labels", {})
    for key, value in (spec.get("nodeSelector") or {}).items():
        if labels.get(key) != value:
            yield f"node {name} lacks the label {key}={value}"
    taints = node.get("spec", {}).get("taints", ())
    cordoned = [_UNSCHEDULABLE] if node.get("spec", {}).get("unschedulable") else []
    for taint in (*cordoned, *taints):
        tolerated = any(_tolerates(one, taint) for one in spec.get("tolerations", ()))
        if taint["effect"] in ("NoSchedule", "NoExecute") and not tolerated:
            yield f"node {name} has the taint {taint['key']}:{taint['effect']}"


def _tolerates(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    same = toleration.get("key") == taint["key"] and toleration.get("value", "") == taint.get("value", "")
    return bool(same)


def _shortages(spec: Manifest, seat: Seat) -> Iterator[str]:
    """Resources that the node would still lack."""
    leaving = seat.pod["metadata"]["uid"]
    taken: dict[str, Decimal] = defaultdict(Decimal)
    for pod in seat.pods:
        if pod["metadata"]["uid"] != leaving:
            _add(taken, requests(pod["spec"]))
    name, offered = seat.node["metadata"]["name"], seat.node["status"]["allocatable"]
    for resource, needed in requests(spec).items():
        left = quantity.parse(offered.get(resource, 0)) - taken[resource]
        if needed > left:
            yield f"node {name} would have {_text(left)} {resource} left, and {_text(needed)} is requested"


def requests(spec: Manifest) -> dict[str, Decimal]:
    """What a pod takes of a node's resources: by the rules of kubernetes/component-helpers/resource.

    Containers and sidecars run together; an init container runs with the sidecars before it.
    """
    running: dict[str, Decimal] = defaultdict(Decimal)
    for container in spec.get("containers", ()):
        _add(running, _requested(container))
    sidecars: dict[str, Decimal] = defaultdict(Decimal)
    peak: dict[str, Decimal] = defaultdict(Decimal)
    for container in spec.get("initContainers", ()):
        is_sidecar = container.get("restartPolicy") == "Always"
        needed = defaultdict(Decimal, sidecars)
        _add(needed, _requested(container))
        if is_sidecar:
            sidecars = needed
        for resource, amount in needed.items():
            peak[resource] = max(peak[resource], amount)
    _add(running, sidecars)
    total = {resource: max(running[resource], peak[resource]) for resource in {*running, *peak}}
    total = defaultdict(Decimal, total)
    _add(total, {resource: quantity.parse(text) for resource, text in spec.get("overhead", {}).items()})
    return {"pods": Decimal(1), **total}


def _requested(container: Manifest) -> dict[str, Decimal]:
    """Requests of one container; what it limits without a request counts as requested."""
    resources = container.get("resources", {})
    texts = {**resources.get("limits", {}), **resources.get("requests", {})}
    return {resource: quantity.parse(text) for resource, text in texts.items()}


def _add(total: dict[str, Decimal], more: Mapping[str, Decimal]) -> None:
    for resource, amount in more.items():
        total[resource] = total.get(resource, Decimal(0)) + amount


def _text(amount: Decimal) -> str:
    return f"{max(amount, Decimal(0)).normalize():f}"


def seats(old: Iterable[Pod], nodes: Mapping[str, tuple[Manifest, tuple[Manifest, ...]]]) -> dict[str, Seat]:
    """The places of old replicas' leaders, by pod name; without those whose node is not known."""
    found = {}
    for pod in old:
        node, pods = nodes.get(pod.node, (None, ()))
        body = next((one for one in pods if one["metadata"]["uid"] == pod.uid), None)
        if node is not None and body is not None:
            found[pod.name] = Seat(body, node, pods)
    return found

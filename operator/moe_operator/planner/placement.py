"""Decides whether a pod would fit on a node without certain pods, as the scheduler's filters would.

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
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any, Final

from moe_operator.observed.observation import Pod
from moe_operator.observed.scheduling import is_exclusion, is_shortage, lacks_resources, reasons
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
    size: int = 1
    """Pods of the new replica."""
    others: Mapping[str, tuple[Pod, ...]] = field(default_factory=dict)
    """The other pods of old replicas, by the name of their leader."""

    @property
    def is_of_gangs(self) -> bool:
        """Whether the new replica or an old one has several pods."""
        return self.size > 1 or any(self.others.values())


@dataclass(frozen=True)
class Room:
    """Whether a new pod would fit in the places of old leaders; omits leaders on nodes that were not read."""

    obstacles: Mapping[str, str]
    """Why it would not fit in the place of each alone, by pod name; empty text if it would."""
    together: Mapping[str, frozenset[str]]
    """The other leaders that must be deleted too, by pod name, if it would fit only in all their places."""


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


def room(spec: Manifest, said: str, seats: Mapping[str, Seat]) -> Room:
    """Whether the pod would fit in the place of each old one, or of several of a node together.

    A group holds no pod that is not needed; earlier ones in `seats` are preferred.
    """
    obstacles = {name: obstacle(spec, said, seat) for name, seat in seats.items()}
    together: dict[str, frozenset[str]] = {}
    for node in {seat.node["metadata"]["name"]: None for seat in seats.values()}:
        there = {name: seat for name, seat in seats.items() if seat.node["metadata"]["name"] == node}
        if all(obstacles[name] for name in there):
            group = _group(
                spec, {name: seat for name, seat in there.items() if _only_short(spec, said, seat)}
            )
            together |= {name: frozenset(group - {name}) for name in group}
            obstacles |= {name: f"{obstacles[name]}; {_together(group)}" for name in group}
    return Room(obstacles, together)


def gang_room(question: Question, spec: Manifest, said: str, seats: Mapping[str, Seat]) -> Room:
    """Whether all pods of the new replica would fit in the places of an old one's, for each old one.

    Each new pod is taken to need the place of one old pod. seats: of all pods of old replicas, by pod name.
    """
    obstacles = {}
    for leader in question.old:
        own = [leader.name, *(pod.name for pod in question.others.get(leader.name, ()))]
        obstacles[leader.name] = _gang_obstacle(question.size, spec, said, own, seats)
    return Room(obstacles, {})


def _gang_obstacle(size: int, spec: Manifest, said: str, own: list[str], seats: Mapping[str, Seat]) -> str:
    unknown = [name for name in own if name not in seats]
    if unknown:
        return f"the node of {unknown[0]} is not known"
    if size > len(own):
        return f"the new replica has {size} workers, and this one has {len(own)}"
    places = [seats[name] for name in own]
    for seat in places:
        found = (*_constraints(spec, seat.node), *_differences(spec, seat.pod["spec"]), *_other_reasons(said))
        if found:
            return found[0]
    leaving = {seat.pod["metadata"]["uid"] for seat in places}
    new: dict[str, int] = {}
    for seat in places[:size]:
        node = seat.node["metadata"]["name"]
        new[node] = new.get(node, 0) + 1
    for seat in places[:size]:
        node = seat.node["metadata"]["name"]
        lacks = _lacking(spec, seat.node, seat.pods, leaving, new[node])
        for resource, lack in lacks.items():
            return f"node {node} would lack {_text(lack)} {resource} for {new[node]} of the new workers"
    return ""


def _together(group: Collection[str]) -> str:
    return f"it would in the places of {', '.join(sorted(group))} together"


def _only_short(spec: Manifest, said: str, seat: Seat) -> bool:
    """Whether only resources are missing."""
    others = (_constraints(spec, seat.node), _differences(spec, seat.pod["spec"]), _other_reasons(said))
    return not any(True for found in others for _ in found)


def _group(spec: Manifest, seats: Mapping[str, Seat]) -> set[str]:
    """Pods of one node in whose places together a pod fits, each of them needed; empty if there are none."""
    if not seats:
        return set()
    place = next(iter(seats.values()))

    def lacking(leaving: Iterable[str]) -> dict[str, Decimal]:
        uids = {seats[name].pod["metadata"]["uid"] for name in leaving}
        return _lacking(spec, place.node, place.pods, uids)

    leaving: list[str] = []
    while lack := lacking(leaving):
        rest = [name for name in seats if name not in leaving]
        if not rest:
            return set()
        leaving.append(max(rest, key=partial(_eases, lack, seats)))
    for name in reversed(leaving.copy()):
        if not lacking(one for one in leaving if one != name):
            leaving.remove(name)
    return set(leaving)


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
    for name, default in _ALIKE.items():
        if (new.get(name) or default) != (old.get(name) or default):
            yield f"the new pod has another {name}"
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
    name, needed = seat.node["metadata"]["name"], requests(spec)
    for resource, lack in _lacking(spec, seat.node, seat.pods, {seat.pod["metadata"]["uid"]}).items():
        left = _text(needed[resource] - lack)
        yield f"node {name} would have {left} {resource} left, and {_text(needed[resource])} is requested"


def _lacking(
    spec: Manifest, node: Manifest, pods: Iterable[Manifest], leaving: Collection[str], count: int = 1
) -> dict[str, Decimal]:
    """What a node without the pods with the UIDs `leaving` would lack for `count` new pods, by resource."""
    taken: dict[str, Decimal] = defaultdict(Decimal)
    for pod in pods:
        if pod["metadata"]["uid"] not in leaving:
            _add(taken, requests(pod["spec"]))
    offered = node["status"]["allocatable"]
    lacks = {
        resource: needed * count + taken[resource] - quantity.parse(offered.get(resource, 0))
        for resource, needed in requests(spec).items()
    }
    return {resource: lack for resource, lack in lacks.items() if lack > 0}


def _eases(lacking: Mapping[str, Decimal], seats: Mapping[str, Seat], name: str) -> Decimal:
    """The share of the missing resources that a pod uses: 1 for all of one resource."""
    given = requests(seats[name].pod["spec"])
    return sum((min(given.get(r, Decimal(0)), lack) / lack for r, lack in lacking.items()), Decimal(0))


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

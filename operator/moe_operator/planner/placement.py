"""Decides whether a pod would fit on a node without certain pods, as the scheduler's filters would.

An old replica is deleted for a new pod only if this is certain: otherwise a pod that fits nowhere (a typo in
a node selector, a device that no node has) would cost a serving replica for nothing. Rules that are not
checked here (affinity between pods, claims of volumes and devices) must be the same for both pods, because
then they did not keep the old pod off its node. The scheduler must report missing resources and no other
obstacle that is not checked here.

Filters: kubernetes/pkg/scheduler/framework/plugins (nodeunschedulable, tainttoleration, nodeaffinity,
noderesources).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Final

from moe_operator.observed.nodes import Node, NodePod, PodNeeds, PodToleration, Taint
from moe_operator.observed.pods import Pod
from moe_operator.observed.scheduling import is_exclusion, is_shortage, lacks_resources, reasons

_NONE: Final = Decimal(0)


@dataclass(frozen=True)
class Question:
    """The question whether the pod of a new replica would fit in the place of an old one."""

    waiting: str
    """Name of a new pod that no node accepts; empty if there is none so far."""
    needs: PodNeeds
    """What it requests of its node, if there is none."""
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

    pod: NodePod
    node: Node
    pods: tuple[NodePod, ...]
    """All on the node that have not ended, the old one included."""


def obstacle(new: PodNeeds, said: str, seat: Seat) -> str:
    """Why a new pod would not fit in the place of an old one; empty where it would.

    said: why no node takes the pod so far, in the scheduler's words; empty where the scheduler was not asked.
    """
    found = (
        *_constraints(new, seat.node),
        *_shortages(new, seat),
        *_differences(new, seat.pod.needs),
        *_other_reasons(said),
    )
    return found[0] if found else ""


def room(new: PodNeeds, said: str, seats: Mapping[str, Seat]) -> Room:
    """Whether the pod would fit in the place of each old one, or of several of a node together.

    A group holds no pod that is not needed; earlier ones in `seats` are preferred.
    """
    obstacles = {name: obstacle(new, said, seat) for name, seat in seats.items()}
    together: dict[str, frozenset[str]] = {}
    for node in {seat.node.name: None for seat in seats.values()}:
        there = {name: seat for name, seat in seats.items() if seat.node.name == node}
        if all(obstacles[name] for name in there):
            group = _group(new, {name: seat for name, seat in there.items() if _only_short(new, said, seat)})
            together |= {name: frozenset(group - {name}) for name in group}
            obstacles |= {name: f"{obstacles[name]}; {_together(group)}" for name in group}
    return Room(obstacles, together)


def gang_room(question: Question, new: PodNeeds, said: str, seats: Mapping[str, Seat]) -> Room:
    """Whether all pods of the new replica would fit in the places of an old one's, for each old one.

    Each new pod is taken to need the place of one old pod. seats: of all pods of old replicas, by pod name.
    """
    obstacles = {}
    for leader in question.old:
        own = [leader.name, *(pod.name for pod in question.others.get(leader.name, ()))]
        obstacles[leader.name] = _gang_obstacle(question.size, new, said, own, seats)
    return Room(obstacles, {})


def _gang_obstacle(size: int, new: PodNeeds, said: str, own: list[str], seats: Mapping[str, Seat]) -> str:
    unknown = [name for name in own if name not in seats]
    if unknown:
        return f"the node of {unknown[0]} is not known"
    if size > len(own):
        return f"the new replica has {size} workers, and this one has {len(own)}"
    places = [seats[name] for name in own]
    for seat in places:
        found = (*_constraints(new, seat.node), *_differences(new, seat.pod.needs), *_other_reasons(said))
        if found:
            return found[0]
    leaving = {seat.pod.uid for seat in places}
    count: dict[str, int] = {}
    for seat in places[:size]:
        node = seat.node.name
        count[node] = count.get(node, 0) + 1
    for seat in places[:size]:
        node = seat.node.name
        for resource, lack in _lacking(new, seat.node, seat.pods, leaving, count[node]).items():
            return f"node {node} would lack {_text(lack)} {resource} for {count[node]} of the new workers"
    return ""


def _together(group: Collection[str]) -> str:
    return f"it would in the places of {', '.join(sorted(group))} together"


def _only_short(new: PodNeeds, said: str, seat: Seat) -> bool:
    """Whether only resources are missing."""
    others = (_constraints(new, seat.node), _differences(new, seat.pod.needs), _other_reasons(said))
    return not any(True for found in others for _ in found)


def _group(new: PodNeeds, seats: Mapping[str, Seat]) -> set[str]:
    """Pods of one node in whose places together a pod fits, without any that is not needed; empty if none."""
    if not seats:
        return set()
    place = next(iter(seats.values()))

    def lacking(leaving: Iterable[str]) -> dict[str, Decimal]:
        return _lacking(new, place.node, place.pods, {seats[name].pod.uid for name in leaving})

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


def _other_reasons(said: str) -> Iterator[str]:
    """Why the place does not help: the scheduler names other obstacles, or misses no resource."""
    if not said:
        return
    unknown = [reason for reason in reasons(said) if not (is_shortage(reason) or is_exclusion(reason))]
    if unknown or not lacks_resources(said):
        yield f"the scheduler says: {'; '.join(unknown)}" if unknown else "no resource is missing"


def _differences(new: PodNeeds, old: PodNeeds) -> Iterator[str]:
    for name, value in new.unmodelled.items():
        if value != old.unmodelled[name]:
            yield f"the new pod has another {name}"
    if new.claims != old.claims:
        yield "the new pod has other volume claims"
    if new.host_ports != old.host_ports:
        yield "the new pod has other host ports"


def _constraints(new: PodNeeds, node: Node) -> Iterator[str]:
    """What keeps a pod from a node whatever else runs there."""
    for key, value in new.node_selector.items():
        if node.labels.get(key) != value:
            yield f"node {node.name} lacks the label {key}={value}"
    for taint in node.taints:
        tolerated = any(_tolerates(one, taint) for one in new.tolerations)
        if taint.effect in ("NoSchedule", "NoExecute") and not tolerated:
            yield f"node {node.name} has the taint {taint.key}:{taint.effect}"


def _tolerates(toleration: PodToleration, taint: Taint) -> bool:
    if toleration.effect not in ("", taint.effect):
        return False
    if toleration.operator == "Exists":
        return toleration.key in ("", taint.key)
    return (toleration.key, toleration.value) == (taint.key, taint.value)


def _shortages(new: PodNeeds, seat: Seat) -> Iterator[str]:
    """Resources that the node would still lack."""
    for resource, lack in _lacking(new, seat.node, seat.pods, {seat.pod.uid}).items():
        left, needed = _text(new.requests[resource] - lack), _text(new.requests[resource])
        yield f"node {seat.node.name} would have {left} {resource} left, and {needed} is requested"


def _lacking(
    new: PodNeeds, node: Node, pods: Iterable[NodePod], leaving: Collection[str], count: int = 1
) -> dict[str, Decimal]:
    """What a node without the pods with the UIDs `leaving` would lack for `count` new pods, by resource."""
    staying = [pod.needs.requests for pod in pods if pod.uid not in leaving]
    lacks = {
        resource: needed * count
        + sum((requests.get(resource, _NONE) for requests in staying), _NONE)
        - node.allocatable.get(resource, _NONE)
        for resource, needed in new.requests.items()
    }
    return {resource: lack for resource, lack in lacks.items() if lack > 0}


def _eases(lacking: Mapping[str, Decimal], seats: Mapping[str, Seat], name: str) -> Decimal:
    """The share of the missing resources that a pod uses: 1 for all of one resource."""
    given = seats[name].pod.needs.requests
    return sum((min(given.get(resource, _NONE), lack) / lack for resource, lack in lacking.items()), _NONE)


def _text(amount: Decimal) -> str:
    return f"{max(amount, _NONE).normalize():f}"


def seats(old: Iterable[Pod], nodes: Mapping[str, tuple[Node, tuple[NodePod, ...]]]) -> dict[str, Seat]:
    """The places of old replicas' leaders, by pod name; without those whose node is not known."""
    found = {}
    for pod in old:
        node, pods = nodes.get(pod.node, (None, ()))
        placed = next((one for one in pods if one.uid == pod.uid), None)
        if node is not None and placed is not None:
            found[pod.name] = Seat(placed, node, pods)
    return found

"""Finds out whether a new replica's pod would fit in the places of old ones, from nodes and their pods."""

from __future__ import annotations

from typing import Final

from moe_operator.errors import ApplyForbiddenError, ReadForbiddenError
from moe_operator.kube.client import Cluster
from moe_operator.planner import placement
from moe_operator.planner.placement import Question, Room
from moe_operator.render.objects import Manifest

_NODES_MOST: Final = 8
"""Nodes that one reconcile reads: each costs two requests."""
_NODES_OF_GANGS: Final = 64
"""The same for replicas of several workers; those on further nodes make no room."""


def room(cluster: Cluster, namespace: str, question: Question) -> Room:
    """Whether the new pod would fit in the places of old leaders.

    Leaders on nodes that are not read, or do not exist, are omitted.
    """
    try:
        return _room(cluster, namespace, question)
    except (ApplyForbiddenError, ReadForbiddenError) as error:
        # RBAC of an earlier chart: no replica is deleted for another, and the condition says why.
        return Room({one.name: str(error) for one in question.old}, {})


def _room(cluster: Cluster, namespace: str, question: Question) -> Room:
    pod = cluster.read("Pod", namespace, question.waiting) if question.waiting else None
    spec, said = (question.template, "") if pod is None else (pod["spec"], placement.waits_because(pod))
    others = (pod for own in question.others.values() for pod in own)
    pods, most = (*question.old, *others), _NODES_OF_GANGS if question.is_of_gangs else _NODES_MOST
    wanted = list(dict.fromkeys(one.node for one in pods if one.node))[:most]
    nodes = {name: found for name in wanted if (found := _node(cluster, name)) is not None}
    if question.is_of_gangs:
        return placement.gang_room(question, spec, said, placement.seats(pods, nodes))
    return placement.room(spec, said, placement.seats(question.old, nodes))


def _node(cluster: Cluster, name: str) -> tuple[Manifest, tuple[Manifest, ...]] | None:
    node = cluster.read("Node", None, name)
    return None if node is None else (node, tuple(cluster.pods_on(name)))

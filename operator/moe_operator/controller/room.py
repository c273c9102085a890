"""Finds out whether a new replica's pod would fit in the places of old ones, from nodes and their pods."""

from __future__ import annotations

from typing import Final

from moe_operator.errors import ApplyForbiddenError, ReadForbiddenError
from moe_operator.kube.client import Cluster
from moe_operator.observed import nodes, pod_status
from moe_operator.observed.nodes import Node, NodePod
from moe_operator.planner import placement
from moe_operator.planner.placement import Question, Room

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
    new, said = question.needs, ""
    if pod is not None:
        new, said = nodes.needs(pod["spec"]), pod_status.read(pod).waits_because
    others = (pod for own in question.others.values() for pod in own)
    pods, most = (*question.old, *others), _NODES_OF_GANGS if question.is_of_gangs else _NODES_MOST
    wanted = list(dict.fromkeys(one.node for one in pods if one.node))[:most]
    read = {name: found for name in wanted if (found := _node(cluster, name)) is not None}
    if question.is_of_gangs:
        return placement.gang_room(question, new, said, placement.seats(pods, read))
    return placement.room(new, said, placement.seats(question.old, read))


def _node(cluster: Cluster, name: str) -> tuple[Node, tuple[NodePod, ...]] | None:
    node = cluster.read("Node", None, name)
    if node is None:
        return None
    return nodes.read_node(node), tuple(map(nodes.read_pod, cluster.pods_on(name)))

"""Finds out whether a new replica's pod would fit in the place of an old one, from nodes and their pods."""

from __future__ import annotations

from typing import Final

from moe_operator.errors import ApplyForbiddenError
from moe_operator.kube.client import Cluster
from moe_operator.planner import placement
from moe_operator.planner.placement import Question
from moe_operator.render.objects import Manifest

_NODES_MOST: Final = 8
"""Nodes that one reconcile reads: each costs two requests."""


def obstacles(cluster: Cluster, namespace: str, question: Question) -> dict[str, str]:
    """Why the new pod would not fit in the place of each old leader, by pod name; empty where it would.

    Leaders on nodes that are not read, or do not exist, are omitted.
    """
    try:
        return _obstacles(cluster, namespace, question)
    except ApplyForbiddenError as error:
        # RBAC of an earlier chart: no replica is deleted for another, and the condition says why.
        return {one.name: str(error) for one in question.old}


def _obstacles(cluster: Cluster, namespace: str, question: Question) -> dict[str, str]:
    pod = cluster.read("Pod", namespace, question.waiting) if question.waiting else None
    spec, said = (question.template, "") if pod is None else (pod["spec"], placement.waits_because(pod))
    wanted = list(dict.fromkeys(one.node for one in question.old if one.node))[:_NODES_MOST]
    nodes = {name: found for name in wanted if (found := _node(cluster, name)) is not None}
    places = placement.seats(question.old, nodes)
    return {name: placement.obstacle(spec, said, seat) for name, seat in places.items()}


def _node(cluster: Cluster, name: str) -> tuple[Manifest, tuple[Manifest, ...]] | None:
    node = cluster.read("Node", None, name)
    return None if node is None else (node, tuple(cluster.pods_on(name)))

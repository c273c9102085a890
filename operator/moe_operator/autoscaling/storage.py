"""Reads and writes the ScalingHistory and the part of the status that scaling owns."""

from __future__ import annotations

from moe_operator.executor.execute import reference
from moe_operator.kube.client import Cluster
from moe_operator.render.objects import Manifest
from moe_operator.resources import names
from moe_operator.resources.deployment import Identity
from moe_operator.resources.scaling_status import ScalingStatus
from moe_operator.resources.status import Condition


def write_status(
    cluster: Cluster, identity: Identity, status: ScalingStatus | None, condition: Condition | None
) -> None:
    """Writes status.scaling and the condition, and removes those that are None.

    Scaling has its own field manager, so it and the reconcile write the status independently.
    """
    content: Manifest = {}
    if status is not None:
        content["scaling"] = status.manifest()
    if condition is not None:
        content["conditions"] = [condition.manifest()]
    manifest = {**reference(identity), "status": content}
    cluster.apply(manifest, subresource="/status", manager=names.SCALING_FIELD_MANAGER)


def load(cluster: Cluster, identity: Identity) -> tuple[Manifest | None, Manifest | None]:
    """The ScalingHistory of a deployment and the one of its latest minutes; None if it does not exist."""
    whole, recent = (
        cluster.get(names.HISTORY_KIND, identity.namespace, name)
        for name in (identity.name, names.recent_history(identity.name))
    )
    return whole, recent


def save(cluster: Cluster, history: Manifest) -> None:
    """Writes a ScalingHistory."""
    cluster.apply(history, manager=names.SCALING_FIELD_MANAGER)

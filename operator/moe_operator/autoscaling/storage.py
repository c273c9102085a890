"""What the scaler reads and writes. Its part of the status has a field manager of its own."""

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
    """Writes status.scaling and the condition; what is None is taken out.

    The reconcile writes the rest of the status under another name, so neither needs to know of the other.
    """
    content: Manifest = {}
    if status is not None:
        content["scaling"] = status.manifest()
    if condition is not None:
        content["conditions"] = [condition.manifest()]
    manifest = {**reference(identity), "status": content}
    cluster.apply(manifest, subresource="/status", manager=names.SCALING_FIELD_MANAGER)


def load(cluster: Cluster, identity: Identity) -> tuple[Manifest | None, Manifest | None]:
    """The deployment's ScalingHistory and the one of its latest minutes; None for one that does not exist."""
    whole, recent = (
        cluster.get(names.HISTORY_KIND, identity.namespace, name)
        for name in (identity.name, names.recent_history(identity.name))
    )
    return whole, recent


def save(cluster: Cluster, history: Manifest) -> None:
    """Writes a ScalingHistory."""
    cluster.apply(history, manager=names.SCALING_FIELD_MANAGER)

"""Replicas of several workers: which rank each pod has, where it meets its leader, and on which nodes it
runs.

All pods of a gang have one template, so their differences come from their labels: the ordinal is the
rank, and rank 0 leads. Stage and number in the stage follow from it: divmod(rank, expert).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from moe_operator.render.objects import Manifest, child
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment
from moe_operator.resources.parallelism_spec import Parallelism, Topology

SECRET_KEY: Final = "secret"  # noqa: S105 - the key's name
_PORT: Manifest = {"name": names.MESH_PORT_NAME, "containerPort": names.MESH_PORT, "protocol": "TCP"}


def labels(deployment: Deployment) -> dict[str, str]:
    """Labels of a worker's pods, whatever its replica."""
    if deployment.spec.parallelism.ranks == 1:
        return names.single_labels(deployment.name)
    return {**names.worker_labels(deployment.name), names.LABEL_MESH: shape(deployment.spec.parallelism)}


def shape(parallelism: Parallelism) -> str:
    """PIPELINExEXPERT, as the worker reads it."""
    return f"{parallelism.pipeline}x{parallelism.expert}"


def size(template: Mapping[str, Mapping[str, Mapping[str, str]]]) -> int:
    """Pods of a replica with a pod template."""
    return names.ranks_of(template["metadata"].get("labels", {}))


def ports(deployment: Deployment) -> list[Manifest]:
    """Ports of a worker in addition to those that every pod has."""
    return [_PORT] if deployment.spec.parallelism.ranks > 1 else []


def environment(deployment: Deployment) -> dict[str, Manifest]:
    """Variables of a worker of a gang: its rank, its leader's address and the gang's secret.

    $(NAME) is replaced by the kubelet; the secret holds the replica's number, so that a worker of another
    replica of the deployment is refused.
    """
    name, parallelism = deployment.name, deployment.spec.parallelism
    if parallelism.ranks == 1:
        return {}
    host = f"{names.leader(name, '$(MOE_DATA_RANK)')}.{names.workers(name)}.$(POD_NAMESPACE).svc"
    secret = {"name": names.gang_secret(name), "key": SECRET_KEY}
    return {
        "MOE_DATA_RANK": _label(names.LABEL_DATA_RANK),
        "MOE_GANG_SECRET": {"valueFrom": {"secretKeyRef": secret}},
        "MOE_WORKER_MESH": {"value": shape(parallelism)},
        "MOE_WORKER_MESH_RANK": _label(names.LABEL_POD_INDEX),
        "MOE_WORKER_MESH_LEADER": {"value": f"{host}:{names.MESH_PORT}"},
        "MOE_WORKER_MESH_SECRET": {"value": "$(MOE_GANG_SECRET)/$(MOE_DATA_RANK)"},
        **_experts(parallelism),
    }


def _experts(parallelism: Parallelism) -> dict[str, Manifest]:
    """Variables of the settings of experts that the spec contains."""
    values = {}
    if parallelism.redundant_experts:
        values["MOE_WORKER_REDUNDANT_EXPERTS"] = str(parallelism.redundant_experts)
    rebalance = parallelism.rebalance
    if rebalance is not None:
        values["MOE_WORKER_REBALANCE"] = rebalance.mode.lower()
        values["MOE_WORKER_REBALANCE_INTERVAL"] = str(rebalance.interval_seconds)
        values["MOE_WORKER_REBALANCE_THRESHOLD"] = str(rebalance.threshold_percentage / 100)
    return {name: {"value": value} for name, value in values.items()}


def _label(label: str) -> Manifest:
    return {"valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": f"metadata.labels['{label}']"}}}


def placement(deployment: Deployment) -> Manifest:
    """On which nodes the pods of one gang run, relative to each other and to other gangs."""
    topology = deployment.spec.parallelism.topology
    if topology is None or deployment.spec.parallelism.ranks == 1:
        return {}
    own = _term(deployment, topology, matchLabelKeys=[names.LABEL_DATA_RANK])
    if topology.policy == "Spread":
        return {"topologySpreadConstraints": [{**own, "maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway"}]}
    if topology.policy == "Preferred":
        preferred = [{"weight": 100, "podAffinityTerm": own}]
        return {"affinity": {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}}
    affinity: Manifest = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [own]}}
    if topology.exclusive:
        others = _term(deployment, topology, mismatchLabelKeys=[names.LABEL_DATA_RANK])
        affinity["podAntiAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": [others]}
    return {"affinity": affinity}


def _term(deployment: Deployment, topology: Topology, **keys: list[str]) -> Manifest:
    """Workers of the deployment in the same domain; `keys` compare their labels with the pod's own."""
    selector = {"matchLabels": names.worker_labels(deployment.name)}
    return {"topologyKey": topology.key, "labelSelector": selector, **keys}


def secret(deployment: Deployment, value: str) -> Manifest:
    """The Secret that all gangs of a deployment share; never changed, so the operator needs no right to read
    it.
    """
    name = names.gang_secret(deployment.name)
    manifest = child(deployment.identity, "v1", "Secret", name, names.ROLE_WORKER)
    return {**manifest, "type": "Opaque", "immutable": True, "stringData": {SECRET_KEY: value}}

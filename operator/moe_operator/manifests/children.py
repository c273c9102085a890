"""All objects of a deployment, in the order in which they are applied: accounts come before their pods."""

from __future__ import annotations

from moe_operator.manifests import frontend, worker
from moe_operator.manifests.objects import Key, Manifest, child, key, sealed
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment

KINDS = {
    "ServiceAccount": "v1",
    "Service": "v1",
    "Role": "rbac.authorization.k8s.io/v1",
    "RoleBinding": "rbac.authorization.k8s.io/v1",
    "StatefulSet": "apps/v1",
    "Deployment": "apps/v1",
}
"""Kinds of children, each with its apiVersion."""


def shared(deployment: Deployment) -> list[Manifest]:
    """The objects of which a deployment has one each."""
    worker_account = child(
        deployment.identity, "v1", "ServiceAccount", names.worker_account(deployment.name), names.ROLE_WORKER
    )
    objects = [
        worker_account,
        frontend.account(deployment),
        frontend.role(deployment),
        frontend.role_binding(deployment),
        worker.service(deployment),
        frontend.service(deployment),
        frontend.deployment(deployment),
    ]
    return [sealed(manifest) for manifest in objects]


def replicas(deployment: Deployment) -> list[Manifest]:
    """The StatefulSets, by data rank."""
    return [sealed(worker.stateful_set(deployment, rank)) for rank in range(deployment.wanted_replicas)]


def expected(deployment: Deployment) -> list[Key]:
    """Keys of all objects that the deployment wants."""
    return [key(manifest) for manifest in (*shared(deployment), *replicas(deployment))]

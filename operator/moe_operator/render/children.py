"""All objects of a deployment, in the order in which they are applied: accounts come before their pods."""

from __future__ import annotations

from datetime import datetime

from moe_operator.render import exposure, frontend, inference_pool, network, worker
from moe_operator.render.gang_record import GangRecord, with_record
from moe_operator.render.objects import Key, Manifest, child, key, sealed
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment

KINDS = {
    "ServiceAccount": "v1",
    "Service": "v1",
    "Role": "rbac.authorization.k8s.io/v1",
    "RoleBinding": "rbac.authorization.k8s.io/v1",
    "StatefulSet": "apps/v1",
    "Deployment": "apps/v1",
    "ControllerRevision": "apps/v1",
    "PodDisruptionBudget": "policy/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    names.INFERENCE_POOL_KIND: names.INFERENCE_POOL_API_VERSION,
    names.HTTP_ROUTE_KIND: names.HTTP_ROUTE_API_VERSION,
    names.GRPC_ROUTE_KIND: names.GRPC_ROUTE_API_VERSION,
    names.INGRESS_KIND: names.INGRESS_API_VERSION,
}
"""Kinds of children, each with its apiVersion."""
OPTIONAL_KINDS = frozenset(
    {names.INFERENCE_POOL_KIND, names.HTTP_ROUTE_KIND, names.GRPC_ROUTE_KIND, names.INGRESS_KIND}
)
"""Those that a cluster may lack, because their CRDs belong to another project, or that the operator may not
read, because its role is that of an earlier version."""


def shared(deployment: Deployment) -> list[Manifest]:
    """The objects that exist once for each deployment."""
    worker_account = child(
        deployment.identity, "v1", "ServiceAccount", names.worker_account(deployment.name), names.ROLE_WORKER
    )
    objects = [
        worker_account,
        frontend.account(deployment),
        frontend.role(deployment),
        frontend.role_binding(deployment),
        worker.service(deployment),
        worker.disruption_budget(deployment),
        frontend.service(deployment),
        *network.policies(deployment),
        *inference_pool.pools(deployment),
        *exposure.routes(deployment),
        frontend.deployment(deployment),
    ]
    return [sealed(manifest) for manifest in objects]


def replica(deployment: Deployment, rank: int, like: Manifest | None = None) -> Manifest:
    """The StatefulSet of one replica, at the spec's revision or at that of the StatefulSet `like`."""
    fresh = worker.stateful_set(deployment, rank)
    return sealed(fresh if like is None else worker.at_revision_of(like, fresh))


def gang(
    deployment: Deployment, rank: int, like: Manifest | None, record: GangRecord, now: datetime
) -> Manifest:
    """The StatefulSet of one replica of several workers, with its record."""
    fresh = worker.stateful_set(deployment, rank)
    manifest = fresh if like is None else worker.at_revision_of(like, fresh)
    return sealed(with_record(manifest, record, now))


def expected(deployment: Deployment) -> list[Key]:
    """Keys of the objects that exist once for each deployment."""
    return [key(manifest) for manifest in shared(deployment)]

"""Reads what there is of one deployment."""

from __future__ import annotations

from moe_operator.kube.client import Cluster
from moe_operator.manifests import children
from moe_operator.manifests.objects import Key, Manifest, key
from moe_operator.manifests.observed import Observed
from moe_operator.resources.deployment import Deployment


def gather(cluster: Cluster, deployment: Deployment) -> Observed:
    """The deployment's objects and pods.

    Objects are found by label; a wanted name that is not among them is looked up too, for somebody else may
    have an object of that name.
    """
    namespace = deployment.identity.namespace
    found: dict[Key, Manifest] = {}
    for kind in children.KINDS:
        found.update({key(manifest): manifest for manifest in cluster.list(kind, namespace, deployment.name)})
    for missing in children.expected(deployment):
        if missing not in found:
            manifest = cluster.get(missing.kind, namespace, missing.name)
            if manifest is not None:
                found[missing] = manifest
    return Observed(found, tuple(cluster.list("Pod", namespace, deployment.name)))

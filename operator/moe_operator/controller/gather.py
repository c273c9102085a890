"""Reads the objects of one deployment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from moe_operator.errors import ReadForbiddenError
from moe_operator.kube.client import Cluster
from moe_operator.observed.observation import Observed, podless
from moe_operator.planner import revisions
from moe_operator.render import children
from moe_operator.render.objects import Key, Manifest, key
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment


def gather(cluster: Cluster, deployment: Deployment) -> Observed:
    """The deployment's objects and pods, found by their label; from the cache, if it is complete."""
    namespace = deployment.identity.namespace
    found: dict[Key, Manifest] = {}
    for kind in children.KINDS:
        found.update({key(manifest): manifest for manifest in cluster.list(kind, namespace, deployment.name)})
    return Observed(
        found,
        tuple(cluster.list("Pod", namespace, deployment.name)),
        routes=tuple(cluster.list(names.ROUTES_KIND, namespace, deployment.name)),
        verdicts={name: cluster.verdict(found[name]) for name in found if name.kind == "StatefulSet"},
    )


def unlabelled(cluster: Cluster, namespace: str, manifests: Iterable[Manifest]) -> dict[Key, Manifest]:
    """Existing objects with names of objects to create that lack the deployment's label.

    They belong to others, or are ours and somebody removed the label. ControllerRevisions are skipped: their
    names contain a digest of their content.
    """
    made = (key(manifest) for manifest in manifests if "uid" not in manifest["metadata"])
    found = {
        name: cluster.get(name.kind, namespace, name.name) for name in made if name.kind != revisions.KIND
    }
    return {name: manifest for name, manifest in found.items() if manifest is not None}


def with_refusal(cluster: Cluster, deployment: Deployment, observed: Observed) -> Observed:
    """Adds why a pod is missing, from its controller's Event; only for the first, because all have the same
    reason.
    """
    for name in podless(observed, deployment.identity)[:1]:
        try:
            why = cluster.last_event("StatefulSet", deployment.identity.namespace, name, "FailedCreate")
        except ReadForbiddenError as error:
            why = f"only an Event says why it has no pod, and {error}"
        if why is not None:
            return replace(observed, refused={f"{name}-0": why})
    return observed

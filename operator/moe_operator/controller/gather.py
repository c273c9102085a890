"""Reads the objects of one deployment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

from moe_operator.errors import ReadForbiddenError
from moe_operator.kube.client import Cluster
from moe_operator.observed import children, pod_status
from moe_operator.observed.children import Child, StatefulSet
from moe_operator.observed.observation import Observed, observe
from moe_operator.observed.pods import Pod
from moe_operator.planner import revisions
from moe_operator.render.children import KINDS, OPTIONAL_KINDS, expected
from moe_operator.render.objects import Key, Manifest, key
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment


def gather(cluster: Cluster, deployment: Deployment) -> Observed:
    """The deployment's objects and pods, found by their label; from the cache, if it is complete."""
    namespace = deployment.identity.namespace

    def listed(kind: str) -> list[Manifest]:
        optional = kind in OPTIONAL_KINDS
        if optional and cluster.unreadable(kind, namespace) and not uses(kind):
            return []
        try:
            return cluster.list(kind, namespace, deployment.name)
        except ReadForbiddenError:
            if not optional or uses(kind):
                raise
            return []

    def uses(kind: str) -> bool:
        return any(name.kind == kind for name in expected(deployment))

    found = observe(chain.from_iterable(map(listed, KINDS)), listed("Pod"), listed(names.ROUTES_KIND))
    sets = [child for child in found.children.values() if isinstance(child, StatefulSet)]
    pods = tuple(_with_predecessor(cluster, pod) for pod in found.pods)
    return replace(found, pods=pods, verdicts={child.key: cluster.verdict(child.content) for child in sets})


def _with_predecessor(cluster: Cluster, pod: Pod) -> Pod:
    """A worker that does not run yet, and why the one before it failed."""
    if pod.role != names.ROLE_WORKER or pod.status.phase != "Pending":
        return pod
    before = cluster.failed_pod(pod.namespace, pod.name)
    return pod if before is None else replace(pod, before=pod_status.read(before))


def unlabelled(cluster: Cluster, namespace: str, manifests: Iterable[Manifest]) -> dict[Key, Child]:
    """Existing objects with names of objects to create that lack the deployment's label.

    They belong to others, or are ours and somebody removed the label. ControllerRevisions are skipped: their
    names contain a digest of their content.
    """
    made = (key(manifest) for manifest in manifests if "uid" not in manifest["metadata"])
    found = {
        name: cluster.get(name.kind, namespace, name.name) for name in made if name.kind != revisions.KIND
    }
    return {name: children.read(manifest) for name, manifest in found.items() if manifest is not None}


def with_refusal(cluster: Cluster, deployment: Deployment, observed: Observed) -> Observed:
    """Adds why a pod is missing, from its controller's Event; only for the first, because all have the same
    reason.
    """
    for name in observed.podless(deployment.identity)[:1]:
        try:
            why = cluster.last_event("StatefulSet", deployment.identity.namespace, name, "FailedCreate")
        except ReadForbiddenError as error:
            why = f"only an Event says why it has no pod, and {error}"
        if why is not None:
            return replace(observed, refused={f"{name}-0": why})
    return observed

"""Reads what there is of one deployment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moe_operator.kube.client import Cluster
from moe_operator.manifests import children
from moe_operator.manifests.objects import Key, Manifest, key
from moe_operator.manifests.observed import Observed, podless
from moe_operator.resources import names
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
            _look_up(cluster, namespace, missing, found)
    for missing in _new_replicas(deployment, found):
        _look_up(cluster, namespace, missing, found)
    observed = Observed(found, tuple(cluster.list("Pod", namespace, deployment.name)))
    return replace(observed, refused=_refused(cluster, deployment, observed))


def _refused(cluster: Cluster, deployment: Deployment, observed: Observed) -> dict[str, str]:
    """Why a pod is missing, as its controller says in an Event; of the first one, for all have one reason."""
    for name in podless(observed, deployment.identity)[:1]:
        why = cluster.last_event("StatefulSet", deployment.identity.namespace, name, "FailedCreate")
        if why is not None:
            return {f"{name}-0": why}
    return {}


def _new_replicas(deployment: Deployment, found: dict[Key, Manifest]) -> Iterator[Key]:
    """Names that the next replicas may get, up to as many free ones as there may be replicas to make."""
    there = {name for name in found if name.kind == "StatefulSet"}
    revisions = {found[name]["metadata"]["labels"].get(names.LABEL_REVISION) for name in there}
    edited = deployment.status.observed_generation != deployment.identity.generation
    rolls = edited or len(revisions) > 1
    surge = deployment.spec.rollout.max_surge if rolls else 0
    free, rank = deployment.wanted_replicas + surge - len(there), 0
    while free > 0:
        name = Key("StatefulSet", names.replica(deployment.name, rank))
        if name not in there:
            yield name
            free -= name not in found
        rank += 1


def _look_up(cluster: Cluster, namespace: str, name: Key, found: dict[Key, Manifest]) -> None:
    manifest = cluster.get(name.kind, namespace, name.name)
    if manifest is not None:
        found[name] = manifest

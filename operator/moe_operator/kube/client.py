"""A small client of the API server for the kinds that the operator handles. Blocking: call it in a thread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from kubernetes import client

from moe_api.listwatch import Collection
from moe_operator.apiserver import requests
from moe_operator.apiserver.requests import Requests
from moe_operator.kube.cache import ObjectCache
from moe_operator.render.objects import Manifest
from moe_operator.resources import names

_PATHS: Final = {
    names.KIND: (names.API_VERSION, names.PLURAL),
    "ServiceAccount": ("v1", "serviceaccounts"),
    "Service": ("v1", "services"),
    "Secret": ("v1", "secrets"),
    "Pod": ("v1", "pods"),
    "Event": ("v1", "events"),
    "Node": ("v1", "nodes"),
    "Role": ("rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": ("rbac.authorization.k8s.io/v1", "rolebindings"),
    "StatefulSet": ("apps/v1", "statefulsets"),
    "Deployment": ("apps/v1", "deployments"),
    names.HISTORY_KIND: (names.API_VERSION, "scalinghistories"),
    names.ROUTES_KIND: (names.API_VERSION, names.ROUTES_PLURAL),
    "ControllerRevision": ("apps/v1", "controllerrevisions"),
    "PodDisruptionBudget": ("policy/v1", "poddisruptionbudgets"),
    "NetworkPolicy": ("networking.k8s.io/v1", "networkpolicies"),
    names.INFERENCE_POOL_KIND: (names.INFERENCE_POOL_API_VERSION, "inferencepools"),
    names.HTTP_ROUTE_KIND: (names.HTTP_ROUTE_API_VERSION, "httproutes"),
    names.GRPC_ROUTE_KIND: (names.GRPC_ROUTE_API_VERSION, "grpcroutes"),
    names.INGRESS_KIND: (names.INGRESS_API_VERSION, "ingresses"),
    "KopfPeering": ("kopf.dev/v1", "kopfpeerings"),
    "ClusterKopfPeering": ("kopf.dev/v1", "clusterkopfpeerings"),
}
_CONNECTIONS = 32
"""Kept open: one for each watch and each thread."""


class Cluster:
    """The API server, with a cache of its objects.

    Every method raises a RetryableError if a retry can help (its type says why), and ApplyRefusedError if
    only a change of the object helps.
    """

    def __init__(
        self, api: client.ApiClient, timeout_seconds: float, cache: ObjectCache | None = None
    ) -> None:
        """timeout_seconds: limit of one request. cache: read instead of the API server where it
        is complete.
        """
        self._requests = Requests(api, timeout_seconds)
        self._cache = cache or ObjectCache(frozenset())

    def get(self, kind: str, namespace: str | None, name: str) -> Manifest | None:
        """One object, or None when there is none."""
        known = self._cache.get(kind, namespace, name) if namespace else None
        return known or self.read(kind, namespace, name)

    def read(self, kind: str, namespace: str | None, name: str) -> Manifest | None:
        """One object as it is now, bypassing the cache; None if there is none."""
        return self._requests.send("get", _path(kind, namespace, name))

    def refresh(self, kind: str, namespace: str, name: str) -> Manifest | None:
        """One object as it is now, which also updates the cache; None if there is none."""
        found = self.read(kind, namespace, name)
        known = self._cache.get(kind, namespace, name)
        if known is not None and (found is None or found["metadata"]["uid"] != known["metadata"]["uid"]):
            self._cache.drop(kind, namespace, name, known["metadata"]["uid"])
        if found is not None:
            self._cache.put(kind, found)
        return found

    def last_event(self, kind: str, namespace: str, name: str, reason: str) -> str | None:
        """The message of the latest Event about an object with a reason; None when there is none."""
        about = f"involvedObject.kind={kind},involvedObject.name={name},reason={reason}"
        found = self._requests.send("get", _path("Event", namespace), field_selector=about) or {"items": []}
        events = sorted(found["items"], key=lambda event: event.get("lastTimestamp") or "")
        return str(events[-1].get("message", "")) if events else None

    def events_about(self, kind: str, namespace: str = "") -> list[Manifest]:
        """The Events about all objects of a kind in a namespace; empty for all namespaces."""
        selector = f"involvedObject.kind={kind}"
        found = self._requests.send("get", _path("Event", namespace or None), field_selector=selector)
        items: list[Manifest] = (found or {"items": []})["items"]
        return items

    def pods_on(self, node: str) -> list[Manifest]:
        """All pods on a node that have not ended."""
        alive = f"spec.nodeName={node},status.phase!=Succeeded,status.phase!=Failed"
        found = self._requests.send("get", _path("Pod", None), field_selector=alive) or {"items": []}
        items: list[Manifest] = found["items"]
        return items

    def serves(self, api_version: str) -> bool:
        """Whether the API server knows a group and version such as "apps/v1"."""
        return self._requests.send("get", f"/apis/{api_version}") is not None

    def list(self, kind: str, namespace: str, deployment: str) -> list[Manifest]:
        """The objects that carry a deployment's label."""
        if self._cache.complete(kind, namespace):
            return self._cache.of_deployment(kind, namespace, deployment)
        selector = names.selector_text({names.LABEL_NAME: deployment})
        found = self._requests.send("get", _path(kind, namespace), label_selector=selector) or {"items": []}
        return [{**item, "apiVersion": _PATHS[kind][0], "kind": kind} for item in found["items"]]

    def failed_pod(self, namespace: str, name: str) -> Manifest | None:
        """The last worker of this name that its node evicted or rejected, if that was recently."""
        return self._cache.failed_pod(namespace, name)

    def unreadable(self, kind: str, namespace: str) -> bool:
        """Whether the watch of a kind was forbidden at its last attempt."""
        return self._cache.doubted(kind, namespace)

    def note(self, manifests: Iterable[Manifest], verdict: str) -> None:
        """Stores verdicts about listed objects until they change or this process ends."""
        self._cache.note(manifests, verdict)

    def verdict(self, manifest: Manifest) -> str:
        """The verdict about this version of a listed object; empty if there is none."""
        return self._cache.verdict(manifest)

    def collection(self, kind: str, label: str, namespace: str = "") -> Collection:
        """The objects of a namespace, or of all, that carry a label, to be listed and watched."""
        return self._requests.collection(_path(kind, namespace or None), label)

    def apply(self, manifest: Manifest, subresource: str = "", manager: str = names.FIELD_MANAGER) -> None:
        """Server-side apply. Takes over fields that others set differently, and leaves other fields
        unchanged.
        """
        metadata = manifest["metadata"]
        applied = self._requests.send(
            "patch",
            _path(manifest["kind"], metadata.get("namespace"), metadata["name"]) + subresource,
            body=manifest,
            content_type="application/apply-patch+yaml",
            field_manager=manager,
            force_conflicts=True,
        )
        if applied is not None:
            self._cache.put(manifest["kind"], applied)

    def merge(self, manifest: Manifest) -> None:
        """Merges an object of a built-in kind into the existing one; null removes a field, whoever set it."""
        metadata = manifest["metadata"]
        self._requests.send(
            "patch",
            _path(manifest["kind"], metadata.get("namespace"), metadata["name"]),
            body=manifest,
            content_type="application/strategic-merge-patch+json",
            field_manager=names.FIELD_MANAGER,
        )

    def set_pod_condition(self, namespace: str, name: str, uid: str, condition: Mapping[str, str]) -> None:
        """Sets one condition of a pod, if it is still the one with this UID; the others stay."""
        changed = self._requests.send(
            "patch",
            _path("Pod", namespace, name) + "/status",
            body={"metadata": {"uid": uid}, "status": {"conditions": [condition]}},
            content_type="application/strategic-merge-patch+json",
            field_manager=names.FIELD_MANAGER,
        )
        if changed is not None:
            self._cache.put("Pod", changed)

    def scale(self, namespace: str, name: str, replicas: int, version: str) -> None:
        """Sets spec.replicas of a deployment that is still at this resourceVersion."""
        self._requests.send(
            "patch",
            _path(names.KIND, namespace, name) + "/scale",
            body={"metadata": {"resourceVersion": version}, "spec": {"replicas": replicas}},
            content_type="application/merge-patch+json",
            field_manager=names.SCALING_FIELD_MANAGER,
        )

    def create(self, manifest: Manifest) -> None:
        """Creates an object that must not exist yet."""
        path = _path(manifest["kind"], manifest["metadata"]["namespace"])
        self._requests.send("post", path, body=manifest, field_manager=names.FIELD_MANAGER)

    def replace(self, manifest: Manifest) -> None:
        """Replaces an object that is still at the resourceVersion of the manifest."""
        metadata = manifest["metadata"]
        path = _path(manifest["kind"], metadata["namespace"], metadata["name"])
        self._requests.send("put", path, body=manifest, field_manager=names.FIELD_MANAGER)

    def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """Deletes an object if it is still the one with this UID, and what it owns after it."""
        options = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        self._requests.send("delete", _path(kind, namespace, name), body=options)
        self._cache.drop(kind, namespace, name, uid)


def _path(kind: str, namespace: str | None, name: str | None = None) -> str:
    api_version, plural = _PATHS[kind]
    prefix = "/apis/" if "/" in api_version else "/api/"
    parts = [prefix + api_version, *(("namespaces", namespace) if namespace else ()), plural]
    return "/".join([*parts, name] if name else parts)


def connect(timeout_seconds: float, cache: ObjectCache | None = None) -> Cluster:
    """Connects as the pod's ServiceAccount, or outside a pod as the kubeconfig says.

    Raises InstallationError when there is neither.
    """
    return Cluster(requests.connect(_CONNECTIONS), timeout_seconds, cache)

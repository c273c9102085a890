"""A small client of the API server for the kinds that the operator handles. Blocking: call it in a thread."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import urllib3.exceptions
from kubernetes import client, config
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import DynamicApiError

from moe_operator.errors import (
    ApplyForbiddenError,
    ApplyRefusedError,
    ChangedMeanwhileError,
    ClusterUnavailableError,
    InstallationError,
    MoEOperatorError,
)
from moe_operator.manifests.objects import Manifest
from moe_operator.resources import names

_PATHS: Final = {
    names.KIND: (names.API_VERSION, names.PLURAL),
    "ServiceAccount": ("v1", "serviceaccounts"),
    "Service": ("v1", "services"),
    "Pod": ("v1", "pods"),
    "Event": ("v1", "events"),
    "Role": ("rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": ("rbac.authorization.k8s.io/v1", "rolebindings"),
    "StatefulSet": ("apps/v1", "statefulsets"),
    "Deployment": ("apps/v1", "deployments"),
    names.HISTORY_KIND: (names.API_VERSION, "scalinghistories"),
    "ClusterKopfPeering": ("kopf.dev/v1", "clusterkopfpeerings"),
}
_FORBIDDEN, _CONFLICT, _GONE, _TOO_MANY, _SERVER = 403, 409, 404, 429, 500


class Cluster:
    """The API server.

    Every method raises a RetryableError when trying again can help (its type says why), ApplyRefusedError
    when it cannot.
    """

    def __init__(self, api: client.ApiClient, timeout_seconds: float) -> None:
        """timeout_seconds: limit of one request."""
        # No discovery: the paths of the few kinds are known, and the discoverer would keep a cache in /tmp.
        self._dynamic = DynamicClient(api, discoverer=lambda _client, _cache: None)
        self._timeout = timeout_seconds

    def get(self, kind: str, namespace: str | None, name: str) -> Manifest | None:
        """One object, or None when there is none."""
        return self._request("get", _path(kind, namespace, name))

    def serves(self, api_version: str) -> bool:
        """Whether the API server knows a group and version such as "apps/v1"."""
        return self._request("get", f"/apis/{api_version}") is not None

    def list(self, kind: str, namespace: str, labels: Mapping[str, str]) -> list[Manifest]:
        """The objects of a namespace that carry all labels."""
        selector = names.selector_text(labels)
        found = self._request("get", _path(kind, namespace), label_selector=selector) or {"items": []}
        return [{**item, "apiVersion": _PATHS[kind][0], "kind": kind} for item in found["items"]]

    def apply(self, manifest: Manifest, subresource: str = "", manager: str = names.FIELD_MANAGER) -> None:
        """Server-side apply. Fields that others set differently are taken over, others are left alone."""
        metadata = manifest["metadata"]
        self._request(
            "patch",
            _path(manifest["kind"], metadata.get("namespace"), metadata["name"]) + subresource,
            body=manifest,
            content_type="application/apply-patch+yaml",
            field_manager=manager,
            force_conflicts=True,
        )

    def create(self, manifest: Manifest) -> None:
        """Makes an object that must be new."""
        path = _path(manifest["kind"], manifest["metadata"]["namespace"])
        self._request("post", path, body=manifest, field_manager=names.FIELD_MANAGER)

    def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """Deletes an object if it is still the one with this UID, and what it owns after it."""
        options = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        self._request("delete", _path(kind, namespace, name), body=options)

    def _request(self, method: str, path: str, **parameters: Any) -> Manifest | None:
        try:
            response = self._dynamic.request(
                method, path, serialize=False, _request_timeout=self._timeout, **parameters
            )
        except DynamicApiError as error:
            if error.status == _GONE and method in ("get", "delete"):
                return None
            raise _translated(error, path) from error
        except urllib3.exceptions.HTTPError as error:
            raise ClusterUnavailableError(
                f"the API server does not answer {method} {path}: {error}"
            ) from error
        result: Manifest = json.loads(response.data)
        return result


def _path(kind: str, namespace: str | None, name: str | None = None) -> str:
    api_version, plural = _PATHS[kind]
    prefix = "/apis/" if "/" in api_version else "/api/"
    parts = [prefix + api_version, *(("namespaces", namespace) if namespace else ()), plural]
    return "/".join([*parts, name] if name else parts)


def _translated(error: DynamicApiError, path: str) -> MoEOperatorError:
    said = message(error.body)
    if error.status in (_CONFLICT, _GONE):
        return ChangedMeanwhileError(f"somebody else was faster at {path}: {said}")
    if error.status == _TOO_MANY or error.status >= _SERVER:
        return ClusterUnavailableError(f"the API server could not serve {path}: {said}")
    if error.status == _FORBIDDEN:
        return ApplyForbiddenError(f"the API server forbids {path}: {said}")
    return ApplyRefusedError(f"the API server refused {path}: {said}")


def message(body: str | bytes | None) -> str:
    """The sentence in a Status object, or the body itself when it is none."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body or ""
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text


def connect(timeout_seconds: float) -> Cluster:
    """Connects as the pod's ServiceAccount, or outside a pod as the kubeconfig says.

    Raises InstallationError when there is neither.
    """
    configuration = client.Configuration()
    try:
        try:
            config.load_incluster_config(configuration)
        except config.ConfigException:
            config.load_kube_config(client_configuration=configuration)
    except config.ConfigException as error:
        raise InstallationError(
            f"no way to reach a cluster: {error}; run in a pod with a ServiceAccount or set KUBECONFIG"
        ) from error
    return Cluster(client.ApiClient(configuration), timeout_seconds)

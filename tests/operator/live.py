"""A namespace of a running cluster, and MoEDeployments in it whose workers are stand-ins."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import kubernetes
import yaml
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import DynamicApiError

from localcluster import Cluster
from localcluster.errors import CommandError

ROOT = Path(__file__).parents[2]
# The checkout is visible in pods at its own path; the stand-in's `moe-worker` comes first.
STANDIN_PATH = f"{ROOT}/tests/operator/standin:{ROOT}/.venv/bin:/usr/bin:/bin"
CHILD_KINDS = "statefulsets,deployments,services,serviceaccounts,roles,rolebindings,poddisruptionbudgets"
ALL_KINDS = f"{CHILD_KINDS},replicasets,controllerrevisions,endpointslices,pods"
T = TypeVar("T")

# What tests poll for, read without a process of kubectl each time: that takes 0.2 s of a core.
COLLECTIONS = {
    "moed": "/apis/serving.moe-operator.dev/v1alpha1/namespaces/{}/moedeployments",
    **dict.fromkeys(("pod", "pods"), "/api/v1/namespaces/{}/pods"),
    **dict.fromkeys(("statefulset", "statefulsets"), "/apis/apps/v1/namespaces/{}/statefulsets"),
    **dict.fromkeys(("deployment", "deployments"), "/apis/apps/v1/namespaces/{}/deployments"),
    **dict.fromkeys(("service", "services"), "/api/v1/namespaces/{}/services"),
}


@functools.cache
def _client(kubeconfig: Path, _changed: int) -> DynamicClient:
    api = kubernetes.config.new_client_from_config(str(kubeconfig))
    return DynamicClient(api, discoverer=lambda _client, _cache: None)


def read(cluster: Cluster, path: str, **query: str) -> dict[str, Any]:
    """What the API server says to GET, as administrator.

    Raises:
        CommandError: as kubectl does, with the API server's sentence.
    """
    client = _client(cluster.kubeconfig, cluster.kubeconfig.stat().st_mtime_ns)
    try:
        return json.loads(client.request("get", path, serialize=False, **query).data)
    except DynamicApiError as error:
        raise CommandError(f"GET {path}: {error.status} {error.reason}: {error.body}") from error


def manifest(name: str = "docs", **spec: Any) -> dict[str, Any]:
    """A MoEDeployment as users write it; spec fields replace the defaults here."""
    return {
        "apiVersion": "serving.moe-operator.dev/v1alpha1",
        "kind": "MoEDeployment",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "file:///mnt/models/docs-moe"},
            "worker": {
                "env": [{"name": "PATH", "value": STANDIN_PATH}],
                "terminationGracePeriodSeconds": 5,
            },
            "frontend": {"terminationGracePeriodSeconds": 5},
            **spec,
        },
    }


def eventually(look: Callable[[], T], wanted: Callable[[T], bool], what: str, seconds: float = 90.0) -> T:
    """What `look` returns as soon as it is wanted; fails with the last one after the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if wanted(found):
            return found
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}; last seen: {found}"
        time.sleep(0.1)


@dataclass(frozen=True)
class Live:
    cluster: Cluster
    namespace: str

    def kubectl(self, *arguments: str, input: str | None = None) -> str:  # noqa: A002
        return self.cluster.kubectl("-n", self.namespace, *arguments, input=input)

    def apply(self, body: dict[str, Any]) -> str:
        return self.kubectl("apply", "-f", "-", input=yaml.safe_dump(body))

    def patch(self, kind: str, name: str, body: dict[str, Any]) -> None:
        self.kubectl("patch", kind, name, "--type=merge", "-p", json.dumps(body))

    def get(self, kind: str, name: str) -> dict[str, Any]:
        collection = COLLECTIONS.get(kind.lower())
        if collection is None:
            return json.loads(self.kubectl("get", kind, name, "-o", "json"))
        return self._read(f"{collection.format(self.namespace)}/{name}")

    def list(self, kinds: str, selector: str = "serving.moe-operator.dev/name") -> list[dict[str, Any]]:
        collection = COLLECTIONS.get(kinds.lower())
        if collection is None:
            return json.loads(self.kubectl("get", kinds, "-l", selector, "-o", "json"))["items"]
        return self._read(collection.format(self.namespace), label_selector=selector)["items"]

    def _read(self, path: str, **query: str) -> dict[str, Any]:
        return read(self.cluster, path, **query)

    def condition(self, kind: str, name: str = "docs") -> dict[str, Any]:
        """A condition of a deployment that speaks of its latest spec, or {}."""
        body = self.get("moed", name)
        found = body.get("status", {}).get("conditions", [])
        current = [c for c in found if c.get("observedGeneration") == body["metadata"]["generation"]]
        return next((c for c in current if c["type"] == kind), {})

    def wait(
        self, kind: str, reason: str, name: str = "docs", seconds: float = 120.0, why: str = ""
    ) -> dict[str, Any]:
        """Waits until a condition has a reason, and a message that contains `why`."""

        def look() -> dict[str, Any]:
            return self.condition(kind, name)

        def wanted(found: dict[str, Any]) -> bool:
            return found.get("reason") == reason and why in found["message"]

        return eventually(look, wanted, f"{kind} {reason} {why}", seconds)

    def settled(self, name: str = "docs") -> None:
        self.wait("Progressing", "Complete", name)
        self.wait("Ready", "AllReplicasReady", name)

    def leaders(self, name: str = "docs") -> dict[str, dict[str, Any]]:
        selector = self.get("moed", name)["status"]["selector"]
        return {pod["metadata"]["name"]: pod for pod in self.list("pods", selector)}

    def events(self, reason: str, name: str = "docs") -> list[str]:
        """Messages of the operator's events with a reason."""
        fields = f"involvedObject.kind=MoEDeployment,involvedObject.name={name},reason={reason}"
        found = self._read(f"/api/v1/namespaces/{self.namespace}/events", field_selector=fields)
        return [event["message"] for event in found["items"]]

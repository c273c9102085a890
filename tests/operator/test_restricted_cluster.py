"""A namespace that enforces the Pod Security Standard "restricted", with models of a hub and of a claim."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
import urllib3
import yaml

from localcluster.forward import Forward
from tests.operator.live import ROOT, Live, eventually, manifest

HUB: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "hub", "labels": {"app": "hub"}},
    "spec": {
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": "hub",
                "image": "ghcr.io/moe-operator/operator:dev",
                "command": ["python"],
                "args": [f"{ROOT}/tests/operator/hub.py", f"{ROOT}/examples/docs-moe", "6"],
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
    },
}
SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "hub"},
    "spec": {"selector": {"app": "hub"}, "ports": [{"port": 8080}]},
}


@pytest.fixture
def restricted(operator) -> Iterator[Live]:
    name = f"restricted-{secrets.token_hex(4)}"
    operator.kubectl("create", "namespace", name)
    operator.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    yield Live(operator, name)
    operator.kubectl("delete", "namespace", name, "--wait=false")


def is_ready(status: dict[str, Any]) -> bool:
    return any((one["type"], one["status"]) == ("Ready", "True") for one in status.get("conditions", ()))


def served(live: Live, name: str) -> str:
    """What the frontend's HTTP port says of a deployment, once it is Ready."""
    live.settled(name)
    with Forward(live.cluster.directory, live.namespace, f"{name}-frontend", "http", 0) as opened:
        url = f"http://{opened.address}/v1/completions"
        fields = {"model": name, "prompt": "The kernel", "max_tokens": 4, "temperature": 0}
        answer = urllib3.request("POST", url, json=fields, timeout=60)
    assert answer.status == 200, answer.data
    return str(answer.json()["choices"][0]["text"])


@pytest.mark.slow
def test_models_of_a_hub_and_of_a_claim_are_served_where_only_restricted_pods_are_admitted(restricted):
    for body in (HUB, SERVICE):
        restricted.kubectl("create", "-f", "-", input=json.dumps(body))
    eventually(lambda: restricted.get("pod", "hub")["status"], is_ready, "the hub runs", 120)
    hub = {"uri": "hf://moe/docs", "endpoint": f"http://hub.{restricted.namespace}.svc.cluster.local:8080"}
    restricted.apply(real("fetched", model=hub))
    said: set[str] = set()

    def loaded() -> bool:
        condition = restricted.condition("ModelLoaded", "fetched")
        said.add(f"{condition.get('reason')} {condition.get('message')}")
        return condition.get("status") == "True"

    eventually(loaded, bool, "the model is loaded", 120)
    downloading = [text for text in said if text.startswith("Downloading")]
    assert any(" % of 23.2 MiB" in text for text in downloading), said

    claim(restricted)
    restricted.apply(real("claimed", model={"uri": "pvc://models/docs-moe"}))
    assert served(restricted, "fetched") == served(restricted, "claimed") != ""


def real(name: str, **spec: Any) -> dict[str, Any]:
    """A deployment with a real worker."""
    worker = {"resources": {"requests": {"cpu": "100m"}}, "terminationGracePeriodSeconds": 5}
    return manifest(name, worker=worker, engine={"kvMemory": "64Mi"}, **spec)


def claim(live: Live) -> None:
    """A claim whose volume is the directory of models on the node."""
    name = f"models-{live.namespace}"
    more = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
    volume = {"capacity": {"storage": "1Gi"}, "hostPath": {"path": "/mnt/models"}, **more,
              "claimRef": {"namespace": live.namespace, "name": "models"}}  # fmt: skip
    wanted = {"resources": {"requests": {"storage": "1Gi"}}, "volumeName": name, **more}
    bodies = [
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": volume},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models"}, "spec": wanted},
    ]
    live.kubectl("create", "-f", "-", input=yaml.safe_dump_all(bodies))

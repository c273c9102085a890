"""The parts that worker pods and frontend pods share."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from moe_operator.render.merge import merged
from moe_operator.render.objects import Manifest
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment
from moe_operator.resources.frontend_spec import Frontend
from moe_operator.resources.pods import PodSettings
from moe_operator.resources.worker_spec import Worker

# As the Pod Security Standard "restricted" requires; workers with a model on the node do not satisfy it.
CONTAINER_SECURITY: Manifest = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}
TMP_VOLUME: Manifest = {"name": "tmp", "emptyDir": {}}
TMP_MOUNT: Manifest = {"name": "tmp", "mountPath": "/tmp"}  # noqa: S108 - the pod's own
POD_SECURITY: Manifest = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}

PORTS: list[Manifest] = [
    {"name": names.GRPC_PORT_NAME, "containerPort": names.GRPC_PORT, "protocol": "TCP"},
]
SERVICE_PORTS: list[Manifest] = [
    {
        "name": names.GRPC_PORT_NAME,
        "port": names.GRPC_PORT,
        "targetPort": names.GRPC_PORT_NAME,
        "protocol": "TCP",
        "appProtocol": "kubernetes.io/h2c",
    }
]


def probe(
    service: str, *, period: int, failures: int, timeout: int = 5, port: int = names.GRPC_PORT
) -> Manifest:
    """A gRPC health probe every `period` seconds that gives up after `failures` failures in a row.

    The timeout is five seconds, because a worker that decodes on every core responds slowly.
    """
    return {
        "grpc": {"port": port, "service": service},
        "periodSeconds": period,
        "timeoutSeconds": timeout,
        "failureThreshold": failures,
    }


def environment(
    deployment: Deployment,
    role: str,
    settings: PodSettings,
    own: Mapping[str, str] = MappingProxyType({}),
    more: Mapping[str, Manifest] = MappingProxyType({}),
) -> list[Manifest]:
    """Environment of a container: identity, telemetry, then the user's variables, which take precedence.

    own: variables of this role. more: variables that may refer to all others.
    """
    pairs: dict[str, Manifest] = {
        **{name: {"value": value} for name, value in own.items()},
        "POD_NAME": {"valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"}}},
        "POD_NAMESPACE": {"valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}},
        "OTEL_SERVICE_NAME": {"value": f"moe-{role}"},
        "OTEL_RESOURCE_ATTRIBUTES": {
            "value": "k8s.pod.name=$(POD_NAME),k8s.namespace.name=$(POD_NAMESPACE),"
            f"{names.GROUP}.name={deployment.name},{names.GROUP}.role={role}"
        },
    }
    endpoint = deployment.spec.telemetry.otlp_endpoint
    if endpoint is not None:
        pairs["OTEL_EXPORTER_OTLP_ENDPOINT"] = {"value": endpoint}
    pairs |= more
    for variable in settings.env:
        manifest = variable.manifest()
        pairs[manifest.pop("name")] = manifest
    return [{"name": name, **value} for name, value in pairs.items()]


def template(
    deployment: Deployment, settings: Worker | Frontend, labels: Mapping[str, str], spec: Manifest
) -> Manifest:
    """A pod template with the user's merged in; each requested restart changes it."""
    restart = {names.ANNOTATION_RESTARTED: deployment.restarted_at} if deployment.restarted_at else {}
    annotations = {"annotations": restart} if restart else {}
    recommended = names.recommended_labels(deployment.name, labels[names.LABEL_ROLE])
    rendered = {"metadata": {"labels": {**recommended, **labels}, **annotations}, "spec": spec}
    return merged(rendered, settings.pod_template or {})


def placement(settings: PodSettings) -> Manifest:
    """Where pods may run."""
    fields: dict[str, Any] = {
        "nodeSelector": dict(settings.node_selector),
        "tolerations": [toleration.manifest() for toleration in settings.tolerations],
    }
    return {name: value for name, value in fields.items() if value}

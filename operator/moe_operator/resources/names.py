"""Names that the operator, the frontend and the users' tools share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

GROUP: Final = "serving.moe-operator.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "MoEDeployment"
PLURAL: Final = "moedeployments"
SINGULAR: Final = "moedeployment"
SHORT_NAME: Final = "moed"
CATEGORY: Final = "moe"
HISTORY_KIND: Final = "ScalingHistory"
"""What scaling has learned of the MoEDeployment of the same name."""
ROUTES_KIND: Final = "FrontendRoutes"
"""To which workers the frontend pod of the same name sends requests."""
ROUTES_PLURAL: Final = "frontendroutes"

FIELD_MANAGER: Final = "moe-operator"
"""Field manager of everything the operator applies (server-side apply)."""

SCALING_FIELD_MANAGER: Final = "moe-operator-scaling"
"""Field manager of what the scaler reports: its part of the status, and the history."""

LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
LABEL_NAME: Final = f"{GROUP}/name"
LABEL_ROLE: Final = f"{GROUP}/role"
LABEL_DATA_RANK: Final = f"{GROUP}/data-rank"
LABEL_PIPELINE_RANK: Final = f"{GROUP}/pipeline-rank"
LABEL_EXPERT_RANK: Final = f"{GROUP}/expert-rank"
LABEL_REVISION: Final = f"{GROUP}/revision"
LABEL_MESH: Final = f"{GROUP}/mesh"
"""PIPELINExEXPERT, on the pods of replicas of several workers."""
LABEL_POD_INDEX: Final = "apps.kubernetes.io/pod-index"
"""Ordinal of a pod, set by the StatefulSet controller (Kubernetes 1.28 or newer): its rank in the gang."""
ANNOTATION_DIGEST: Final = f"{GROUP}/digest"
"""Digest of what the operator last applied: distinguishes its own changes from those of other clients."""
ANNOTATION_FORMER: Final = f"{GROUP}/former-revisions"
"""On a ControllerRevision: its numbers before an undo made it the newest again, separated by commas."""
ANNOTATION_PINNED: Final = f"{GROUP}/pinned"
"""A pod template as it was rendered, and the part of the spec that it was rendered from."""

ANNOTATION_GANG: Final = f"{GROUP}/gang"
"""On the StatefulSet of a replica of several workers: why and until when it has no pods."""

ANNOTATION_CACHES: Final = f"{GROUP}/caches"
"""On FrontendRoutes: what the caches of that frontend and its workers saved (`cache_sums`)."""

ANNOTATION_RESTARTED: Final = "kubectl.kubernetes.io/restartedAt"
"""Time of the last restart: on pods, where `kubectl rollout restart` writes it, and on a MoEDeployment."""

ROUTED: Final = f"{GROUP}/routed"
"""Readiness gate of leaders: every frontend sends them requests."""

INFERENCE_POOL_KIND: Final = "InferencePool"
INFERENCE_POOL_GROUP: Final = "inference.networking.k8s.io"
INFERENCE_POOL_API_VERSION: Final = f"{INFERENCE_POOL_GROUP}/v1"
"""Of the Gateway API Inference Extension."""
HTTP_ROUTE_KIND: Final = "HTTPRoute"
HTTP_ROUTE_API_VERSION: Final = "gateway.networking.k8s.io/v1"
GRPC_ROUTE_KIND: Final = "GRPCRoute"
GRPC_ROUTE_API_VERSION: Final = HTTP_ROUTE_API_VERSION
"""Of the Gateway API."""
INGRESS_KIND: Final = "Ingress"
INGRESS_API_VERSION: Final = "networking.k8s.io/v1"
ENGINE_LABELS: Final = ("inference.networking.k8s.io/engine-type", "llm-d.ai/engine-type")
"""Labels of pods by which endpoint pickers (the extension's, llm-d's) select the names of metrics to read."""

ROLE_WORKER: Final = "worker"
ROLE_FRONTEND: Final = "frontend"
ROLE_HISTORY: Final = "history"

FETCH_CONTAINER: Final = "fetch"
"""Init container of workers that downloads the model."""

REVISED_FIELDS: Final = ("model", "parallelism", "engine", "quality", "worker", "telemetry", "transport")
"""Fields of the spec that determine the workers' pods: revisions record them, and undo restores them."""

GRPC_PORT: Final = 8000
GRPC_PORT_NAME: Final = "grpc"
SECURE_GRPC_PORT_NAME: Final = "grpc-tls"
"""The same port of workers that serve mutual TLS; callers go by the name."""
SECURE_GRPC_SERVICE_PORT: Final = 8443
"""Of the workers' Service, whose ports have different numbers. It is headless, so nobody connects to it."""
MESH_PORT: Final = 29500
MESH_PORT_NAME: Final = "mesh"
"""Where the leader of a gang meets the other ranks."""
HTTP_PORT: Final = 8080
HTTP_PORT_NAME: Final = "http"
"""OpenAI's API, of frontends."""
GUARDED_HTTP_PORT_NAME: Final = "api"
"""The same port of frontends with TLS or authentication: there is no /metrics, so none is scraped."""
ADMIN_PORT: Final = 8001
ADMIN_PORT_NAME: Final = "admin"
"""For the operator and probes, of frontends with TLS or authentication."""
SECURE_ADMIN_PORT_NAME: Final = "admin-tls"
"""The same port of frontends that serve mutual TLS there, to the operator alone."""
HEALTH_PORT: Final = 8002
HEALTH_PORT_NAME: Final = "health"
"""For probes alone, of pods with mutual TLS: the kubelet's probes know no TLS."""
METRICS_PORT: Final = 9464
METRICS_PORT_NAME: Final = "metrics"
"""Prometheus' text format, of workers, and of frontends with TLS or authentication."""
LIVENESS_SERVICE: Final = "liveness"
"""grpc.health.v1 service that says that the process is alive; the service "" says that it is ready."""

INTERNAL_SECRETS: Final = "moe-internal-"
"""Begin of the names of the Secrets that the operator makes for mutual TLS."""
AUTHORITY_SECRET: Final = "moe-internal-ca"  # noqa: S105 - the object's name
WORKER_CERTIFICATE_SECRET: Final = "moe-internal-worker"  # noqa: S105
FRONTEND_CERTIFICATE_SECRET: Final = "moe-internal-frontend"  # noqa: S105
"""Secrets of a namespace for mutual TLS. The chart gives the operator rights on these names."""

DEFAULT_WORKER_IMAGE: Final = "ghcr.io/moe-operator/worker:dev"
DEFAULT_OPERATOR_IMAGE: Final = "ghcr.io/moe-operator/operator:dev"

NAME_LENGTH_MOST: Final = 40
"""A StatefulSet's name plus an 11-character hash must fit a label (63), and ours adds a rank of up to 4
digits; 40 leaves room for future names."""


def replica(name: str, data_rank: int) -> str:
    """StatefulSet of one replica."""
    return f"{name}-{data_rank}"


def leader(name: str, data_rank: int | str) -> str:
    """Leader pod of one replica: the first of its StatefulSet."""
    return f"{name}-{data_rank}-0"


def gang_secret(name: str) -> str:
    """Secret that the workers of a gang prove to know when they join."""
    return f"{name}-gang"


def revision(name: str, digest: str) -> str:
    """ControllerRevision that records the spec of a revision."""
    return f"{name}-{digest}"


def workers(name: str) -> str:
    """Headless Service of the leaders."""
    return f"{name}-workers"


def worker_account(name: str) -> str:
    """ServiceAccount of the workers."""
    return f"{name}-worker"


def frontend(name: str) -> str:
    """All objects of the frontend that exist once: Deployment, Service, Role, InferencePool, HTTPRoute ..."""
    return f"{name}-frontend"


def recent_history(name: str) -> str:
    """ScalingHistory of the latest minutes: no deployment's own name contains a dot."""
    return f"{name}.recent"


def worker_labels(name: str) -> dict[str, str]:
    """Labels that all workers of a deployment carry."""
    return {LABEL_NAME: name, LABEL_ROLE: ROLE_WORKER}


def frontend_labels(name: str) -> dict[str, str]:
    """Labels that all frontends of a deployment carry."""
    return {LABEL_NAME: name, LABEL_ROLE: ROLE_FRONTEND}


def single_labels(name: str) -> dict[str, str]:
    """Labels of a worker that is a whole replica."""
    return {**worker_labels(name), LABEL_PIPELINE_RANK: "0", LABEL_EXPERT_RANK: "0"}


def leader_labels(name: str) -> dict[str, str]:
    """Labels that exactly the leaders of a deployment carry: one pod for each replica."""
    return {**worker_labels(name), LABEL_POD_INDEX: "0"}


def ranks_of(labels: Mapping[str, str]) -> int:
    """Pods of the replica that a pod with these labels belongs to."""
    stages, _, ranks = labels.get(LABEL_MESH, "").partition("x")
    return int(stages) * int(ranks) if stages.isdecimal() and ranks.isdecimal() else 1


def recommended_labels(name: str, role: str) -> dict[str, str]:
    """The labels that Kubernetes recommends (docs/concepts/overview/working-with-objects/common-labels)."""
    return {
        "app.kubernetes.io/name": f"moe-{role}",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/component": role,
        "app.kubernetes.io/part-of": FIELD_MANAGER,
        LABEL_MANAGED_BY: FIELD_MANAGER,
    }


def selector_text(labels: Mapping[str, str]) -> str:
    """Labels in the text form of a selector: "a=b,c=d"."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))

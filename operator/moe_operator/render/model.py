"""How a model gets into the worker's container: volumes, mounts, and the init container that downloads it."""

from __future__ import annotations

from moe_operator.render import pods
from moe_operator.render.objects import Manifest
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment
from moe_operator.resources.model_spec import CACHE_FOLDER, MODEL_FOLDER, ModelCache, ModelSource

_DEVICE = "/"
"""Only resource names of devices contain it."""


def volumes(model: ModelSource) -> list[Manifest]:
    """The volumes of the model."""
    if model.is_fetched:
        cache = model.cache or ModelCache()
        return [{"name": "model", "emptyDir": {}}, {"name": "model-cache", **_cache(cache)}]
    if model.scheme == "pvc":
        claim, _, _ = model.rest.partition("/")
        return [{"name": "model", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}]
    if model.scheme == "oci":
        return [{"name": "model", "image": {"reference": model.rest, "pullPolicy": "IfNotPresent"}}]
    # hostPath without a type: a missing directory is then reported by the worker, in a sentence.
    return [{"name": "model", "hostPath": {"path": model.folder}}]


def _cache(cache: ModelCache) -> Manifest:
    if cache.claim_name is not None:
        return {"persistentVolumeClaim": {"claimName": cache.claim_name}}
    if cache.host_path is not None:
        return {"hostPath": {"path": cache.host_path.rstrip("/")}}
    return {"emptyDir": {} if cache.max_size is None else {"sizeLimit": cache.max_size}}


def mounts(model: ModelSource) -> list[Manifest]:
    """The mounts of the worker's container, all read-only."""
    found = [{"name": "model", "mountPath": model.folder if model.scheme == "file" else MODEL_FOLDER}]
    if model.is_fetched:
        found.append({"name": "model-cache", "mountPath": CACHE_FOLDER})
    return [{**mount, "readOnly": True} for mount in found]


def init_containers(deployment: Deployment) -> list[Manifest]:
    """The container that downloads the model; none if the model is mounted as it is."""
    model, settings = deployment.spec.model, deployment.spec.worker
    if not model.is_fetched:
        return []
    secret = model.credentials_secret
    container = {
        "name": names.FETCH_CONTAINER,
        "image": settings.image,
        "command": _command(model),
        "env": pods.environment(deployment, names.ROLE_WORKER, settings, _allowed_http(model)),
        "ports": pods.PORTS,
        "resources": _without_devices(settings.resources.manifest()),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": pods.CONTAINER_SECURITY,
        "volumeMounts": [
            {"name": "model", "mountPath": MODEL_FOLDER},
            {"name": "model-cache", "mountPath": CACHE_FOLDER},
            pods.TMP_MOUNT,
        ],
    }
    return [container if secret is None else {**container, "envFrom": [{"secretRef": {"name": secret}}]}]


def _command(model: ModelSource) -> list[str]:
    words = ["moe-worker", "fetch", model.uri, "--cache", CACHE_FOLDER, "--link", model.folder]
    words += ["--progress", f"0.0.0.0:{names.GRPC_PORT}"]
    if model.cache is not None and model.cache.most_bytes:
        words += ["--max-size", str(model.cache.most_bytes)]
    return [*words, "--endpoint", model.endpoint] if model.endpoint is not None else words


def _allowed_http(model: ModelSource) -> dict[str, str]:
    return {"MOE_FETCH_ALLOW_HTTP": "1"} if (model.endpoint or "").startswith("http://") else {}


def _without_devices(resources: Manifest) -> Manifest:
    """The worker's resources: both containers need no more, because they run one after the other."""
    return {
        kind: {name: amount for name, amount in amounts.items() if _DEVICE not in name}
        for kind, amounts in resources.items()
    }

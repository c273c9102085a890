"""The workers: one StatefulSet for each replica, and the headless Service that lists their leaders."""

from __future__ import annotations

from dataclasses import replace

from moe_operator.render import gang, internal_tls, model, pods
from moe_operator.render.objects import Manifest, child
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment, Pin
from moe_operator.resources.digest import digest
from moe_operator.resources.worker_spec import Worker

# A checkpoint of hundreds of GB takes tens of minutes to read; a worker that has not loaded after an hour is
# restarted. The period is two seconds, so that a replica of a small model is Ready as soon as it is loaded.
_STARTUP_PROBE = pods.probe("", period=2, failures=1800)
_READINESS_PROBE = pods.probe("", period=2, failures=2)
_LIVENESS_PROBE = pods.probe(names.LIVENESS_SERVICE, period=10, failures=3)

# From the label, so that the revision may be a hash of the specification that holds this.
_REVISION: Manifest = {
    "name": "MOE_WORKER_REVISION",
    "valueFrom": {
        "fieldRef": {"apiVersion": "v1", "fieldPath": f"metadata.labels['{names.LABEL_REVISION}']"}
    },
}

# A variable, because images of earlier versions do not have the flag; 0 turns the server off.
_METRICS = {"MOE_WORKER_METRICS_PORT": str(names.METRICS_PORT)}
_METRICS_PORT: Manifest = {
    "name": names.METRICS_PORT_NAME,
    "containerPort": names.METRICS_PORT,
    "protocol": "TCP",
}

_SECURE_SERVICE_PORT: Manifest = {
    "name": names.SECURE_GRPC_PORT_NAME,
    "port": names.SECURE_GRPC_SERVICE_PORT,
    "targetPort": names.SECURE_GRPC_PORT_NAME,
    "protocol": "TCP",
    "appProtocol": "https",
}

_EXIT_SECONDS = 5
"""Part of the grace period that remains after the last stream, for the process to exit; at most half."""
_DEFAULT_GRACE_SECONDS = 55
"""The worker's own default; omitted, so that existing deployments do not change."""


_VERIFICATION: dict[str, list[str]] = {
    "None": ["--no-check-weights"],
    "Weights": [],
    "Digests": ["--check-digests"],
}


def command(deployment: Deployment) -> list[str]:
    """The worker's command line. Options that the spec does not set are omitted."""
    spec, engine, memory = deployment.spec, deployment.spec.engine, deployment.spec.kv_memory_bytes
    words = ["moe-worker", "serve", "--model", spec.model.folder]
    words += ["--served-name", deployment.served_name]
    if engine.context_length is not None:
        words += ["--context-length", str(engine.context_length)]
    words += ["--max-batch-size", str(spec.max_batch_size)]
    words += ["--kv-memory", str(memory)] if memory is not None else []
    words += ["--kv-offload", str(engine.kv_offload_bytes)] if engine.kv_offload is not None else []
    words += ["--prefill-tokens", str(engine.prefill_tokens)] if engine.prefill_tokens is not None else []
    if engine.target_step_milliseconds is not None:
        words += ["--target-step-ms", str(engine.target_step_milliseconds)]
    # A cache that fills a GPU would fill the memory of the pod where the worker finds no GPU.
    words += ["--device", "cuda" if memory is None else engine.device, "--dtype", engine.dtype]
    # Omitted if they equal the worker's default, so that existing deployments do not change.
    words += ["--format", engine.format] if engine.format != "auto" else []
    words += ["--kv-dtype", engine.kv_dtype] if engine.kv_dtype != "auto" else []
    words += ["--generation-config", "auto"] if engine.generation_config == "Auto" else []
    words += _VERIFICATION[engine.verification]
    words += ["--routing-mass", f"{engine.routing_mass:g}"] if engine.routing_mass is not None else []
    words += ["--routing-margin", f"{engine.routing_margin:g}"] if engine.routing_margin else []
    words += ["--learn-routing"] if engine.routing.learning == "Online" else []
    words += ["--config-override", engine.config_override] if engine.config_override is not None else []
    quality = spec.quality
    if quality is not None:
        words += ["--max-bits-per-byte-increase", str(quality.loss_most)]
        words += ["--quality-text", quality.text] if quality.text is not None else []
    return [*words, "--listen", f"0.0.0.0:{names.GRPC_PORT}"]


def pod_spec(deployment: Deployment) -> Manifest:
    """Pod spec of every worker of the deployment, whatever its replica."""
    settings, source = deployment.spec.worker, deployment.spec.model
    container = {
        "name": names.ROLE_WORKER,
        "image": settings.image,
        "command": command(deployment),
        "env": [_REVISION, *_grace(settings), *_environment(deployment)],
        "ports": [
            *internal_tls.worker_ports(deployment, pods.PORTS),
            _METRICS_PORT,
            *gang.ports(deployment),
        ],
        "resources": _resources(settings),
        **_probes(names.HEALTH_PORT if deployment.spec.transport.mutual else names.GRPC_PORT),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": pods.CONTAINER_SECURITY,
        "volumeMounts": [*model.mounts(source), pods.TMP_MOUNT, *internal_tls.mounts(deployment)],
    }
    fetching = model.init_containers(deployment)
    return {
        "serviceAccountName": names.worker_account(deployment.name),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.termination_grace_period_seconds,
        "securityContext": pods.POD_SECURITY,
        "readinessGates": [{"conditionType": names.ROUTED}],
        "containers": [container],
        **({"initContainers": fetching} if fetching else {}),
        "volumes": [
            *model.volumes(source),
            pods.TMP_VOLUME,
            *internal_tls.volumes(deployment, names.ROLE_WORKER),
        ],
        **pods.placement(settings),
        **gang.placement(deployment),
    }


def _probes(port: int) -> Manifest:
    probes = {
        "startupProbe": _STARTUP_PROBE,
        "readinessProbe": _READINESS_PROBE,
        "livenessProbe": _LIVENESS_PROBE,
    }
    return {name: {**probe, "grpc": {**probe["grpc"], "port": port}} for name, probe in probes.items()}


def _environment(deployment: Deployment) -> list[Manifest]:
    settings, more = deployment.spec.worker, gang.environment(deployment)
    own = {**_METRICS, **internal_tls.worker_variables(deployment)}
    return pods.environment(deployment, names.ROLE_WORKER, settings, own, more=more)


def _grace(settings: Worker) -> list[Manifest]:
    """How long requests may continue after SIGTERM, so that streams are handed off before SIGKILL."""
    whole = settings.termination_grace_period_seconds
    seconds = whole - min(_EXIT_SECONDS, whole // 2)
    return [] if seconds == _DEFAULT_GRACE_SECONDS else [{"name": "MOE_WORKER_GRACE", "value": str(seconds)}]


def _resources(settings: Worker) -> Manifest:
    """The container's resources: those of the spec, and the share of a GPU for acceleratorPercentage."""
    resources = settings.resources.manifest()
    if settings.accelerators:
        resources["limits"] = {**resources.get("limits", {}), **settings.accelerators}
    return resources


def rendered(deployment: Deployment) -> Manifest:
    """The pod template of all workers, without rank and revision, as this version of the operator renders it.

    It depends only on fields that undo restores.
    """
    revised = replace(deployment, spec=deployment.spec.revised)
    labels = gang.labels(deployment)
    return pods.template(deployment, revised.spec.worker, labels, pod_spec(revised))


def pin(deployment: Deployment) -> Pin:
    """The pod template that workers have: as it was first rendered for this spec."""
    return deployment.pinned.get(names.ROLE_WORKER) or Pin(deployment.spec.manifest(), rendered(deployment))


def revision(deployment: Deployment) -> str:
    """Hash of the resolved pod template: pods with another one are out of date."""
    return pin(deployment).revision


def recipe(deployment: Deployment) -> str:
    """Hash of all inputs of the StatefulSets of the deployment's replicas, without their ranks."""
    owner = deployment.identity
    return digest([owner.namespace, owner.name, owner.uid, pin(deployment).text], length=16)


def stateful_set(deployment: Deployment, data_rank: int) -> Manifest:
    """One replica: a gang of workers that start and stop together."""
    name = deployment.name
    pinned = pin(deployment)
    current, common = pinned.revision, pinned.template
    rank_labels = {names.LABEL_DATA_RANK: str(data_rank)}
    labels = {**common["metadata"]["labels"], **rank_labels, names.LABEL_REVISION: current}
    manifest = child(
        deployment.identity,
        "apps/v1",
        "StatefulSet",
        names.replica(name, data_rank),
        names.ROLE_WORKER,
        # Kueue and others read the labels of the workload.
        {
            **(pinned.foreign_labels if gang.size(common) > 1 else {}),
            **rank_labels,
            names.LABEL_REVISION: current,
        },
    )
    manifest["metadata"]["annotations"] = {names.ANNOTATION_PINNED: pinned.text}
    manifest["spec"] = {
        "replicas": gang.size(common),
        "serviceName": names.workers(name),
        "podManagementPolicy": "Parallel",
        "updateStrategy": {"type": "RollingUpdate"},
        "revisionHistoryLimit": 2,
        "selector": {"matchLabels": {**rank_labels, names.LABEL_NAME: name, names.LABEL_ROLE: "worker"}},
        "template": {**common, "metadata": {**common["metadata"], "labels": labels}},
    }
    return manifest


def at_revision_of(other: Manifest, fresh: Manifest) -> Manifest:
    """The StatefulSet `fresh` with the pods of another replica of the deployment."""
    template, labels = other["spec"]["template"], other["metadata"]["labels"]
    rank = {names.LABEL_DATA_RANK: fresh["metadata"]["labels"][names.LABEL_DATA_RANK]}
    # The pinned spec belongs to the pods (pinning).
    pinned = {
        name: text
        for name, text in other["metadata"].get("annotations", {}).items()
        if name == names.ANNOTATION_PINNED
    }
    metadata = {**fresh["metadata"], "labels": {**labels, **rank}, "annotations": pinned}
    of_pods = {**template["metadata"], "labels": {**template["metadata"]["labels"], **rank}}
    new_template = {**template, "metadata": of_pods}
    spec = {**fresh["spec"], "replicas": gang.size(template), "template": new_template}
    return {**fresh, "metadata": metadata, "spec": spec}


def disruption_budget(deployment: Deployment) -> Manifest:
    """Lets a drained node take one replica at a time; pods that do not serve may always be evicted.

    It protects every worker of a gang. The eviction of one ends the containers of the others; these are then
    not ready and may be evicted as well, while other gangs stay protected.
    """
    manifest = child(
        deployment.identity,
        "policy/v1",
        "PodDisruptionBudget",
        names.workers(deployment.name),
        names.ROLE_WORKER,
    )
    manifest["spec"] = {
        "maxUnavailable": 1,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": names.worker_labels(deployment.name)},
    }
    return manifest


def service(deployment: Deployment) -> Manifest:
    """Headless Service of the leaders, Ready or not; the frontend reads its EndpointSlices.

    Readiness comes after routing: the frontend asks the workers themselves whether they accept requests. A
    worker has one of the two ports, and the EndpointSlices say which: that is how frontends learn what a
    worker speaks, also while a rollout changes it.
    """
    name = deployment.name
    manifest = child(deployment.identity, "v1", "Service", names.workers(name), names.ROLE_WORKER)
    manifest["spec"] = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": names.leader_labels(name),
        "ports": [*pods.SERVICE_PORTS, _SECURE_SERVICE_PORT],
    }
    return manifest

"""The frontend: Deployment, Service, and the right to read the addresses of leaders."""

from __future__ import annotations

import json

from moe_operator.render import access, inference_pool, internal_tls, pods
from moe_operator.render.objects import Manifest, child
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment, Pin
from moe_operator.resources.frontend_spec import Frontend
from moe_operator.resources.tenants_spec import TenantLimits

# The pod owns the objects that the frontend publishes (moe_frontend.discovery.publishing).
_POD_UID: Manifest = {
    "name": "POD_UID",
    "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.uid"}},
}

# A variable, because images of earlier versions do not have the flag; an empty one turns HTTP off.
_HTTP = {"MOE_HTTP": f"0.0.0.0:{names.HTTP_PORT}"}

_EXIT_SECONDS = 5
"""Part of the grace period that remains after the last stream, for the process to exit."""


def command(deployment: Deployment) -> list[str]:
    """The frontend's command line."""
    words = [
        "moe-frontend",
        "--listen",
        f"0.0.0.0:{names.GRPC_PORT}",
        "--namespace",
        deployment.identity.namespace,
        "--deployment",
        deployment.name,
        "--grace",
        str(max(deployment.spec.frontend.termination_grace_period_seconds - _EXIT_SECONDS, 0)),
    ]
    if deployment.spec.scaling is not None and deployment.scales_to_zero:
        words += ["--hold", str(deployment.spec.scaling.hold_seconds)]
    return words


_ROUTING = {
    "PrefixAffinity": "prefix-affinity",
    "PrefixAffinityExact": "prefix-affinity-exact",
    "RandomOfTwo": "random-of-two",
    "Session": "session",
    "Weighted": "weighted",
}


def _options(deployment: Deployment) -> dict[str, str]:
    """Variables, for the same reason as _HTTP; defaults are omitted."""
    routing = _ROUTING.get(deployment.spec.frontend.routing)
    return {
        **({"MOE_ROUTING": routing} if routing else {}),
        **_output_cache(deployment),
        **access.variables(deployment.spec.frontend),
        **internal_tls.frontend_variables(deployment),
        **_tenants(deployment.spec.frontend),
    }


def _tenants(settings: Frontend) -> dict[str, str]:
    """What tenants may use; fields that have their defaults are omitted."""
    tenants = [{"name": tenant.name, **_limits(tenant)} for tenant in settings.tenants]
    default = _limits(settings.default_tenant)
    if not tenants and not default:
        return {}
    given = {"tenants": tenants, "defaultTenant": default}
    return {"MOE_TENANTS": json.dumps(given, separators=(",", ":"))}


def _limits(limits: TenantLimits) -> Manifest:
    return limits.model_dump(by_alias=True, exclude_defaults=True, exclude={"name"})


def _output_cache(deployment: Deployment) -> dict[str, str]:
    outputs = deployment.spec.cache.outputs
    if outputs.mode == "Off":
        return {}
    return {"MOE_OUTPUT_CACHE": str(outputs.memory_bytes), "MOE_OUTPUT_CACHE_TTL": str(outputs.ttl_seconds)}


def _probes(port: int) -> Manifest:
    """The frontend is Ready only while a worker is, so only "liveness" may restart it."""
    return {
        "startupProbe": pods.probe(names.LIVENESS_SERVICE, period=2, failures=30, port=port),
        "readinessProbe": pods.probe("", period=2, failures=2, port=port),
        "livenessProbe": pods.probe(names.LIVENESS_SERVICE, period=10, failures=3, port=port),
    }


def _http_port_name(settings: Frontend) -> str:
    return names.GUARDED_HTTP_PORT_NAME if settings.guarded else names.HTTP_PORT_NAME


def _http_port(settings: Frontend) -> Manifest:
    return {"name": _http_port_name(settings), "containerPort": names.HTTP_PORT, "protocol": "TCP"}


def _service_ports(settings: Frontend) -> list[Manifest]:
    """The Service's ports. Gateways go by appProtocol, which says h2c of gRPC without TLS."""
    http = {
        "name": names.HTTP_PORT_NAME,
        "port": names.HTTP_PORT,
        "targetPort": _http_port_name(settings),
        "protocol": "TCP",
        "appProtocol": "http" if settings.tls is None else "https",
    }
    if settings.tls is None:
        return [*pods.SERVICE_PORTS, http]
    return [*({**port, "appProtocol": "https"} for port in pods.SERVICE_PORTS), http]


def pod_spec(deployment: Deployment) -> Manifest:
    """Pod spec of the frontend."""
    settings, mutual = deployment.spec.frontend, deployment.spec.transport.mutual
    container = {
        "name": names.ROLE_FRONTEND,
        "image": settings.image,
        "command": command(deployment),
        "env": [
            *pods.environment(deployment, names.ROLE_FRONTEND, settings, {**_HTTP, **_options(deployment)}),
            _POD_UID,
        ],
        "ports": [*pods.PORTS, _http_port(settings), *access.ports(settings, mutual=mutual)],
        "resources": settings.resources.manifest(),
        **_probes(access.probed_port(settings, mutual=mutual)),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": pods.CONTAINER_SECURITY,
        "volumeMounts": [pods.TMP_MOUNT, *access.mounts(settings), *internal_tls.mounts(deployment)],
    }
    return {
        "serviceAccountName": names.frontend(deployment.name),
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.termination_grace_period_seconds,
        "securityContext": pods.POD_SECURITY,
        "containers": [container],
        "volumes": [
            pods.TMP_VOLUME,
            *access.volumes(settings),
            *internal_tls.volumes(deployment, names.ROLE_FRONTEND),
        ],
        **pods.placement(settings),
    }


def rendered(of: Deployment) -> Manifest:
    """The frontend's pod template, as this version of the operator renders it."""
    settings = of.spec.frontend
    own = {**names.frontend_labels(of.name), **inference_pool.pod_labels(settings)}
    return pods.template(of, settings, own, pod_spec(of))


def _child(deployment: Deployment, api_version: str, kind: str) -> Manifest:
    name = names.frontend(deployment.name)
    return child(deployment.identity, api_version, kind, name, names.ROLE_FRONTEND)


def deployment(of: Deployment) -> Manifest:
    """The frontend's Deployment: a new pod is Ready before an old one is deleted."""
    manifest = _child(of, "apps/v1", "Deployment")
    selector = names.frontend_labels(of.name)
    pin = of.pinned.get(names.ROLE_FRONTEND) or Pin(of.spec.manifest(), rendered(of))
    manifest["metadata"]["annotations"] = {names.ANNOTATION_PINNED: pin.text}
    manifest["spec"] = {
        "replicas": of.spec.frontend.replicas,
        "revisionHistoryLimit": 2,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "selector": {"matchLabels": selector},
        "template": dict(pin.template),
    }
    return manifest


def service(of: Deployment) -> Manifest:
    """The Service that clients call."""
    settings, manifest = of.spec.frontend.service, _child(of, "v1", "Service")
    if settings.annotations:
        manifest["metadata"]["annotations"] = dict(settings.annotations)
    manifest["spec"] = {
        "type": settings.type,
        "selector": names.frontend_labels(of.name),
        "ports": _service_ports(of.spec.frontend),
    }
    if settings.ip_family_policy is not None:
        manifest["spec"]["ipFamilyPolicy"] = settings.ip_family_policy
    if settings.ip_families:
        manifest["spec"]["ipFamilies"] = list(settings.ip_families)
    if settings.load_balancer_class is not None:
        manifest["spec"]["loadBalancerClass"] = settings.load_balancer_class
    return manifest


def role(of: Deployment) -> Manifest:
    """What the frontend may do: read the EndpointSlices of its namespace, and write its routes."""
    manifest = _child(of, "rbac.authorization.k8s.io/v1", "Role")
    manifest["rules"] = [
        {
            "apiGroups": ["discovery.k8s.io"],
            "resources": ["endpointslices"],
            "verbs": ["get", "list", "watch"],
        },
        # The object has the pod's name, which is not known in advance. Server-side apply needs both verbs.
        {"apiGroups": [names.GROUP], "resources": [names.ROUTES_PLURAL], "verbs": ["create", "patch"]},
    ]
    return manifest


def role_binding(of: Deployment) -> Manifest:
    """Grants the Role to the frontend's ServiceAccount."""
    name = names.frontend(of.name)
    manifest = _child(of, "rbac.authorization.k8s.io/v1", "RoleBinding")
    manifest["roleRef"] = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    manifest["subjects"] = [{"kind": "ServiceAccount", "name": name, "namespace": of.identity.namespace}]
    return manifest


def account(of: Deployment) -> Manifest:
    """The frontend's ServiceAccount."""
    return _child(of, "v1", "ServiceAccount")

"""Routes from outside to the frontends: HTTPRoute and Ingress to the OpenAI API, GRPCRoute to the gRPC API.

HTTPRoute and Ingress lead to /v1/ only, because /metrics of the same port is for Prometheus. The GRPCRoute
leads to the methods of clients only, because the operator's service may have the same port.
"""

from __future__ import annotations

from moe_operator.render.objects import Manifest, child
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment
from moe_operator.resources.exposure_spec import GrpcRoute, HttpRoute, Ingress

_PREFIX = "/v1/"
_METHODS = (
    ("moe_api.inference.v1.InferenceService", ("Generate", "Tokenize", "GetModel")),
    ("moe_api.inference.v1.ChatService", ("Chat",)),
)
"""With services and methods, as all gateways can match them."""
_NO_LIMIT = "0s"
"""Gateways have time limits of their own otherwise (Envoy's is 15 s), and a stream may take longer."""


def routes(of: Deployment) -> list[Manifest]:
    """The routes of a deployment, as far as it asks for them."""
    frontend = of.spec.frontend
    asked = [
        None if frontend.http_route is None else _http_route(of, frontend.http_route),
        None if frontend.grpc_route is None else _grpc_route(of, frontend.grpc_route),
        None if frontend.ingress is None else _ingress(of, frontend.ingress),
    ]
    return [manifest for manifest in asked if manifest is not None]


def _child(of: Deployment, api_version: str, kind: str, asked: HttpRoute | GrpcRoute | Ingress) -> Manifest:
    name = names.frontend(of.name)
    manifest = child(of.identity, api_version, kind, name, names.ROLE_FRONTEND, asked.labels)
    if asked.annotations:
        manifest["metadata"]["annotations"] = dict(asked.annotations)
    return manifest


def _http_route(of: Deployment, asked: HttpRoute) -> Manifest:
    manifest = _child(of, names.HTTP_ROUTE_API_VERSION, names.HTTP_ROUTE_KIND, asked)
    rule = {
        "matches": [{"path": {"type": "PathPrefix", "value": _PREFIX}}],
        "timeouts": {"request": _NO_LIMIT},
        "backendRefs": [_backend(of)],
    }
    manifest["spec"] = _route(asked, rule)
    return manifest


def _grpc_route(of: Deployment, asked: GrpcRoute) -> Manifest:
    """It has no time limit to set: the gateway's own applies, and an InferencePool leads to HTTP only."""
    manifest = _child(of, names.GRPC_ROUTE_API_VERSION, names.GRPC_ROUTE_KIND, asked)
    matches = [
        {"method": {"type": "Exact", "service": service, "method": method}}
        for service, methods in _METHODS
        for method in methods
    ]
    backend = {"name": names.frontend(of.name), "port": names.GRPC_PORT}
    manifest["spec"] = _route(asked, {"matches": matches, "backendRefs": [backend]})
    return manifest


def _route(asked: HttpRoute | GrpcRoute, rule: Manifest) -> Manifest:
    spec = {"parentRefs": [parent.manifest() for parent in asked.parent_refs], "rules": [rule]}
    return {**spec, **({"hostnames": list(asked.hostnames)} if asked.hostnames else {})}


def _backend(of: Deployment) -> Manifest:
    """The Service, or the pool if there is one: a route to the Service would bypass its endpoint picker."""
    name = names.frontend(of.name)
    if of.spec.frontend.inference_pool is None:
        return {"name": name, "port": names.HTTP_PORT}
    return {"group": names.INFERENCE_POOL_GROUP, "kind": names.INFERENCE_POOL_KIND, "name": name}


def _ingress(of: Deployment, asked: Ingress) -> Manifest:
    manifest = _child(of, names.INGRESS_API_VERSION, names.INGRESS_KIND, asked)
    service = {"name": names.frontend(of.name), "port": {"name": names.HTTP_PORT_NAME}}
    http = {"paths": [{"path": _PREFIX, "pathType": "Prefix", "backend": {"service": service}}]}
    hosts = list(asked.hosts)
    manifest["spec"] = {"rules": [{"host": host, "http": http} for host in hosts] or [{"http": http}]}
    if asked.class_name is not None:
        manifest["spec"]["ingressClassName"] = asked.class_name
    if asked.tls_secret_name is not None:
        manifest["spec"]["tls"] = [
            {"secretName": asked.tls_secret_name, **({"hosts": hosts} if hosts else {})}
        ]
    return manifest

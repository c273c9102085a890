"""NetworkPolicies: who may connect to workers and frontends. What they connect to is not restricted."""

from __future__ import annotations

from collections.abc import Mapping

from moe_operator.render.objects import Manifest, child
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment

_OPERATOR = {"matchLabels": {"app.kubernetes.io/name": names.FIELD_MANAGER}}


def policies(of: Deployment) -> list[Manifest]:
    """The policies of a deployment; none unless it asks for them."""
    if of.spec.network_policy.mode == "Off":
        return []
    return [_workers(of), _frontends(of)]


def _workers(of: Deployment) -> Manifest:
    """gRPC for frontends and the operator; all ports for the workers of a gang, which meet at several."""
    labels = names.worker_labels(of.name)
    asking = [_pods(names.frontend_labels(of.name)), _operator(of)]
    ingress = [_rule(asking, names.GRPC_PORT), _rule([], names.METRICS_PORT)]
    if of.spec.parallelism.ranks > 1:
        ingress.append({"from": [_pods(labels)]})
    return _policy(of, names.workers(of.name), names.ROLE_WORKER, labels, ingress)


def _frontends(of: Deployment) -> Manifest:
    """The API for everybody; the operator's port, where there is one, for the operator."""
    ingress = [_rule([], names.GRPC_PORT, names.HTTP_PORT)]
    if of.spec.frontend.guarded or of.for_frontends.spec.transport.mutual:
        ingress.append(_rule([_operator(of)], names.ADMIN_PORT))
    if of.spec.frontend.guarded:
        ingress.append(_rule([], names.METRICS_PORT))
    labels = names.frontend_labels(of.name)
    return _policy(of, names.frontend(of.name), names.ROLE_FRONTEND, labels, ingress)


def _policy(
    of: Deployment, name: str, role: str, labels: Mapping[str, str], ingress: list[Manifest]
) -> Manifest:
    manifest = child(of.identity, "networking.k8s.io/v1", "NetworkPolicy", name, role)
    selector = {"matchLabels": dict(labels)}
    return {**manifest, "spec": {"podSelector": selector, "policyTypes": ["Ingress"], "ingress": ingress}}


def _rule(sources: list[Manifest], *ports: int) -> Manifest:
    """sources: none: everybody. Kubelets reach the pods of their node in any case."""
    allowed = [{"port": port, "protocol": "TCP"} for port in ports]
    return {**({"from": sources} if sources else {}), "ports": allowed}


def _pods(labels: Mapping[str, str]) -> Manifest:
    return {"podSelector": {"matchLabels": dict(labels)}}


def _operator(of: Deployment) -> Manifest:
    """The operator's pods; in all namespaces if it does not know its own."""
    own = {"matchLabels": {"kubernetes.io/metadata.name": of.operator_namespace}}
    return {"namespaceSelector": own if of.operator_namespace else {}, "podSelector": _OPERATOR}

"""User input: routes from outside to the frontends (httpRoute, grpcRoute and ingress of spec.frontend)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moe_operator.resources.base import LIST_TYPE, Model, number_between, object_name, rules
from moe_operator.resources.metadata_spec import annotation_field, label_field
from moe_operator.resources.pods import LabelValue

_HOST = "^([*][.])?[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
_HOSTS_RULE = (
    f"self.all(h, h.matches('{_HOST}') && !h.matches('^[0-9.]+$'))",
    "a host is a DNS name in lower-case letters, which may begin with *., and no IP address",
)
_SAME = (
    "p.name == q.name && has(p.__namespace__) == has(q.__namespace__)"
    " && (!has(p.__namespace__) || p.__namespace__ == q.__namespace__)"
)
_LISTENERS_RULE = (
    f"self.all(p, self.exists_one(q, {_SAME}) || has(p.sectionName) && self.exists_one(q, {_SAME}"
    " && has(q.sectionName) && q.sectionName == p.sectionName))",
    "parentRefs to the same Gateway each need a sectionName of their own",
)
Host = Annotated[str, Field(min_length=1, max_length=253)]


class ParentRef(Model):
    """A Gateway to which the route attaches, or one of its listeners."""

    name: str = Field(
        description="Name of the Gateway. Required.",
        min_length=1,
        max_length=253,
        json_schema_extra=rules(object_name("name is that of a Gateway")),
    )
    namespace: str | None = Field(
        default=None,
        description="Namespace of the Gateway, whose listener has to allow routes from this namespace. "
        "Default: the same namespace.",
        min_length=1,
        max_length=63,
        json_schema_extra=rules(
            (
                "self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
                "namespace is the name of a namespace: lower-case letters, digits and -",
            )
        ),
    )
    section_name: str | None = Field(
        default=None,
        description="Name of the Gateway's listener. Default: all listeners that allow the route.",
        min_length=1,
        max_length=253,
        json_schema_extra=rules(object_name("sectionName is the name of a listener")),
    )
    port: int | None = Field(
        default=None,
        description="Port of the Gateway's listener. Default: any.",
        json_schema_extra=rules(number_between("port is a number", 1, 65535)),
    )


class _Route(Model):
    """What routes of the Gateway API have in common."""

    parent_refs: list[ParentRef] = Field(
        description="Gateways to which the route attaches. Required.",
        min_length=1,
        max_length=16,
        json_schema_extra={**rules(_LISTENERS_RULE), LIST_TYPE: "atomic"},
    )
    hostnames: list[Host] = Field(
        default=[],
        description="Hosts of the requests that the route takes. Default: all hosts of the listeners.",
        max_length=16,
        json_schema_extra={**rules(_HOSTS_RULE), LIST_TYPE: "set"},
    )


class HttpRoute(_Route):
    """An HTTPRoute (gateway.networking.k8s.io/v1) for the OpenAI API."""

    annotations: dict[str, str] = annotation_field("Annotations of the HTTPRoute. Default: none.")
    labels: dict[str, LabelValue] = label_field(
        "Labels of the HTTPRoute, in addition to the operator's. Default: none."
    )


class GrpcRoute(_Route):
    """A GRPCRoute (gateway.networking.k8s.io/v1) for the gRPC API."""

    annotations: dict[str, str] = annotation_field("Annotations of the GRPCRoute. Default: none.")
    labels: dict[str, LabelValue] = label_field(
        "Labels of the GRPCRoute, in addition to the operator's. Default: none."
    )


_MAY_SHARE_A_LISTENER = (
    f"{_SAME} && !(has(p.sectionName) && has(q.sectionName) && p.sectionName != q.sectionName)"
    " && !(has(p.port) && has(q.port) && p.port != q.port)"
)
_COMMON_HOST = (
    "g == h || h.startsWith('*') && g.endsWith(h.substring(1))"
    " || g.startsWith('*') && h.endsWith(g.substring(1))"
)
HOSTS_APART_RULE = (
    "!has(self.httpRoute) || !has(self.grpcRoute)"
    f" || self.httpRoute.parentRefs.all(p, !self.grpcRoute.parentRefs.exists(q, {_MAY_SHARE_A_LISTENER}))"
    " || has(self.httpRoute.hostnames) && size(self.httpRoute.hostnames) > 0"
    " && has(self.grpcRoute.hostnames) && size(self.grpcRoute.hostnames) > 0"
    f" && self.httpRoute.hostnames.all(h, !self.grpcRoute.hostnames.exists(g, {_COMMON_HOST}))",
    "httpRoute and grpcRoute need different hostnames or listeners (sectionName or port in both), because a "
    "listener accepts one of the two for a host, and *.a.example includes b.a.example",
)


class Ingress(Model):
    """An Ingress (networking.k8s.io/v1) for the OpenAI API."""

    class_name: str | None = Field(
        default=None,
        description="The IngressClass. Default: the cluster's default class.",
        min_length=1,
        max_length=253,
        json_schema_extra=rules(object_name("className is the name of an IngressClass")),
    )
    hosts: list[Host] = Field(
        default=[],
        description="Hosts of the requests that the Ingress takes. Default: all.",
        max_length=16,
        json_schema_extra={**rules(_HOSTS_RULE), LIST_TYPE: "set"},
    )
    tls_secret_name: str | None = Field(
        default=None,
        description="Secret of type kubernetes.io/tls with the certificate of the hosts. Default: none, so "
        "plaintext or the certificate of the Ingress controller.",
        min_length=1,
        max_length=253,
        json_schema_extra=rules(object_name("tlsSecretName is the name of a Secret")),
    )
    annotations: dict[str, str] = annotation_field(
        "Annotations of the Ingress, e.g. timeouts of its controller (docs/pods.md). Default: none."
    )
    labels: dict[str, LabelValue] = label_field(
        "Labels of the Ingress, in addition to the operator's. Default: none."
    )

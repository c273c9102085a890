"""User input: the pods that clients connect to, and their Service (spec.frontend)."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from moe_operator.resources import names
from moe_operator.resources.access_spec import Auth, Tls
from moe_operator.resources.base import LIST_KEYS, LIST_TYPE, Model, number_between, rules
from moe_operator.resources.exposure_spec import HOSTS_APART_RULE, GrpcRoute, HttpRoute, Ingress
from moe_operator.resources.inference_pool_spec import InferencePool
from moe_operator.resources.metadata_spec import annotation_field
from moe_operator.resources.pod_template import FrontendTemplate
from moe_operator.resources.pods import LABEL_KEY, PodSettings
from moe_operator.resources.role_fields import GRACE_RULE, IMAGE_RULE, template_text
from moe_operator.resources.tenants_spec import TENANTS_MOST, Tenant, TenantLimits


class Service(Model):
    """The Service that clients call."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.loadBalancerClass) || self.type == 'LoadBalancer'",
                "loadBalancerClass has no effect without a load balancer: set type to LoadBalancer",
            ),
            (
                "!has(self.ipFamilies) || self.ipFamilies.size() < 2 || has(self.ipFamilyPolicy)"
                " && self.ipFamilyPolicy != 'SingleStack'",
                "two ipFamilies need ipFamilyPolicy PreferDualStack or RequireDualStack",
            ),
        )
    )

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field(
        default="ClusterIP",
        description="How the Service is reached. Without frontend.tls and frontend.auth the ports speak "
        "plaintext and accept everybody: NodePort and LoadBalancer need a firewall. Default: ClusterIP.",
    )
    annotations: dict[str, str] = annotation_field(
        "Annotations of the Service, e.g. for the load balancer. Default: none."
    )
    load_balancer_class: str | None = Field(
        default=None,
        description="Implementation of the load balancer, e.g. service.k8s.aws/nlb. Cannot be changed as "
        "long as type is LoadBalancer. Default: the cluster's.",
        min_length=1,
        max_length=316,
        pattern=LABEL_KEY,
    )
    ip_family_policy: Literal["SingleStack", "PreferDualStack", "RequireDualStack"] | None = Field(
        default=None,
        description="Whether the Service has addresses of one IP family or of both, as in Kubernetes. "
        "Default: SingleStack.",
    )
    ip_families: list[Literal["IPv4", "IPv6"]] = Field(
        default=[],
        description="IP families of the Service, the primary one first; that one cannot be changed as long "
        "as the Service exists. Default: the cluster's.",
        max_length=2,
        json_schema_extra=rules(
            (
                "self.size() < 2 || self[0] != self[1]",
                "ipFamilies has duplicates: name each family once",
            )
        ),
    )


Routing = Literal[
    "LeastLoaded", "PrefixAffinity", "PrefixAffinityExact", "RandomOfTwo", "Session", "Weighted"
]


class Frontend(PodSettings):
    """The pods that clients connect to; they forward requests to the workers and need no GPU."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.inferencePool) || !has(self.tls)",
                "an InferencePool knows no TLS to its pods: remove frontend.tls, or frontend.inferencePool",
            ),
            HOSTS_APART_RULE,
        )
    )

    replicas: int = Field(
        default=1,
        description="Frontend pods. Default: 1.",
        json_schema_extra=rules(number_between("frontend.replicas is a number", 1, 100)),
    )
    image: str = Field(
        default=names.DEFAULT_OPERATOR_IMAGE,
        description=f"Image of the frontend. Default: {names.DEFAULT_OPERATOR_IMAGE}.",
        min_length=1,
        max_length=512,
        json_schema_extra=rules(IMAGE_RULE),
    )
    routing: Routing = Field(
        default="LeastLoaded",
        description="Which replica takes a request. LeastLoaded: the one with the fewest requests in flight. "
        "PrefixAffinity: the one with the least to compute, because it has computed the beginning of the "
        "prompt before. PrefixAffinityExact: the same, but replicas report what they have cached; use it "
        "with several frontends. Session: the same one for all requests of a session (metadata "
        "x-session-id). RandomOfTwo: the less loaded of two. Weighted: the fewest requests for its measured "
        "speed, for replicas on unequal hardware. Default: LeastLoaded.",
    )
    tenants: list[Tenant] = Field(
        default=[],
        description="Tenants with limits and shares of their own (docs/tenants.md); defaultTenant applies to "
        "all others. Default: none.",
        max_length=TENANTS_MOST,
        json_schema_extra={LIST_TYPE: "map", LIST_KEYS: ["name"]},
    )
    default_tenant: TenantLimits = Field(
        default=TenantLimits(),
        description="Limits and share of each tenant that tenants does not name. Callers that are not "
        "authenticated are one tenant. Default: no limits.",
    )
    termination_grace_period_seconds: int = Field(
        default=60,
        description="Seconds that a terminating frontend has to finish its streams. Default: 60.",
        json_schema_extra=rules(GRACE_RULE),
    )
    service: Service = Field(default=Service(), description="The Service that clients call.")
    inference_pool: InferencePool | None = Field(
        default=None,
        description="An InferencePool named NAME-frontend, through which a gateway sends HTTP requests to "
        "the frontends (docs/pods.md); the cluster needs the Gateway API Inference Extension. Default: none.",
    )
    http_route: HttpRoute | None = Field(
        default=None,
        description="An HTTPRoute named NAME-frontend, through which Gateways send HTTP requests to the "
        "Service NAME-frontend, or to the InferencePool if there is one (docs/pods.md); the cluster needs "
        "the Gateway API. Default: none.",
    )
    grpc_route: GrpcRoute | None = Field(
        default=None,
        description="A GRPCRoute named NAME-frontend, through which Gateways send gRPC requests to the "
        "Service NAME-frontend (docs/pods.md); the cluster needs the Gateway API. Default: none.",
    )
    ingress: Ingress | None = Field(
        default=None,
        description="An Ingress named NAME-frontend for HTTP requests to the Service NAME-frontend "
        "(docs/pods.md). Default: none.",
    )
    tls: Tls | None = Field(
        default=None, description="The certificate of the ports for clients. Default: none, so plaintext."
    )
    auth: Auth | None = Field(
        default=None,
        description="Which requests are accepted; with apiKeysSecret and jwt, either of them suffices. "
        "Default: none, so all.",
    )
    pod_template: FrontendTemplate | None = Field(default=None, description=template_text("frontend"))

    audit_log: Literal["Off", "Requests"] = Field(
        default="Off",
        description="Requests: frontends print a line of JSON for each request: time, tenant, caller, "
        "method, status, tokens and duration, never a prompt or an answer. Off: nothing. Default: Off.",
    )

    @property
    def guarded(self) -> bool:
        """Whether clients cannot simply connect, so that the operator and probes need a port of their own."""
        return self.tls is not None or self.auth is not None

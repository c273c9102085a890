"""User input: the spec of a MoEDeployment."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from moe_operator.resources import names, quantity
from moe_operator.resources.accelerator import AcceleratedPodSettings, halves, share_set
from moe_operator.resources.access_spec import Auth, Tls
from moe_operator.resources.base import Model, rules
from moe_operator.resources.model_spec import IMAGE, ModelSource
from moe_operator.resources.parallelism_spec import Parallelism
from moe_operator.resources.pod_template import FrontendTemplate, WorkerTemplate
from moe_operator.resources.pods import LABEL_KEY, Amount, PodSettings, Quantity
from moe_operator.resources.rollout_spec import Rollout
from moe_operator.resources.scaling_spec import REPLICAS_MOST, Scaling


class EngineRouting(Model):
    """How many experts a token uses."""

    mass: Quantity | None = Field(
        default=None,
        description="Share of the scores of a token's experts at which the rest are left out: a quantity "
        "above 0, at most 1, such as 750m; 1 leaves none out. A worker refuses less than the checkpoint's "
        "routing.json allows. Default: the checkpoint's.",
        json_schema_extra=rules(
            (
                "isQuantity(string(self)) && quantity(string(self)).compareTo(quantity('0')) > 0 && "
                "quantity(string(self)).compareTo(quantity('1')) <= 0",
                "mass is a quantity above 0, at most 1, e.g. 750m",
            )
        ),
    )


class Engine(Model):
    """How a worker runs the model."""

    context_length: int | None = Field(
        default=None,
        description="Maximum number of tokens of prompt and continuation together. Default: the "
        "checkpoint's own limit (max_position_embeddings in its config.json).",
        json_schema_extra=rules(
            ("self >= 1 && self <= 4194304", "contextLength is a number of tokens from 1 to 4194304")
        ),
    )
    max_batch_size: int = Field(
        default=16,
        description="Maximum number of requests that a worker decodes together; more wait in its queue. "
        "Default: 16.",
        json_schema_extra=rules(
            ("self >= 1 && self <= 4096", "maxBatchSize is a number of requests from 1 to 4096")
        ),
    )
    kv_memory: Quantity = Field(
        default="512Mi",
        description="Memory of one worker for the KV cache, on its device: a quantity such as 512Mi or "
        "40Gi, or a number of bytes; 1Mi to 1Pi. Default: 512Mi.",
        json_schema_extra=rules(
            (
                "isQuantity(string(self)) && quantity(string(self)).compareTo(quantity('1Mi')) >= 0 && "
                "quantity(string(self)).compareTo(quantity('1Pi')) <= 0",
                "kvMemory is an amount of memory of 1Mi or more, e.g. 512Mi or 40Gi, and at most 1Pi",
            )
        ),
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="Number format of weights and activations; auto takes bfloat16 on GPUs and float32 on "
        "CPUs. Default: auto.",
    )
    format: Literal["auto", "dense", "fp8", "w4a16", "w4a8"] = Field(
        default="auto",
        description="How weights are multiplied. dense: numbers of dtype. fp8: eight bits in blocks of "
        "128 x 128, rounded at load unless the checkpoint is already fp8. w4a16: four bits in"
        " groups of 128, likewise. w4a8: as w4a16, with activations in eight bits, one scale "
        "for 128 or 64 values, the same on CPUs and GPUs. auto: w4a16 for a checkpoint in "
        "four bits, otherwise dense. Default: auto.",
    )
    kv_dtype: Literal["auto", "float32", "bfloat16", "fp8"] = Field(
        default="auto",
        description="Number format of the KV cache; auto takes that of dtype; fp8 takes half the memory of "
        "bfloat16. Default: auto.",
    )
    generation_config: Literal["Auto", "None"] = Field(
        default="None",
        description="Sampling of requests that do not set it. Auto: temperature, top_p, top_k, min_p, "
        "repetition_penalty and max_tokens are those of the checkpoint's generation_config.json. None: "
        "greedy, 128 tokens. Default: None.",
    )
    verification: Literal["None", "Weights", "Digests"] = Field(
        default="Weights",
        description="What a worker checks before it serves a checkpoint. None: nothing. Weights: all "
        "weights are finite numbers. Digests: that, and the files have the SHA-256 digests stored with them "
        "(*.sha256, SHA256SUMS, the index, a Hugging Face cache). Default: Weights.",
    )
    config_override: str | None = Field(
        default=None,
        max_length=4096,
        description="A JSON object of fields that replace those of the checkpoint's config.json, such as "
        "rope_scaling for YaRN. Default: none.",
        json_schema_extra=rules(
            (
                "self.startsWith('{')",
                """configOverride is a JSON object as a string, e.g. '{"rope_scaling": {...}}'""",
            )
        ),
    )
    routing: EngineRouting = Field(
        default=EngineRouting(), description="How many experts a token uses. Default: as the checkpoint says."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Where the model runs; auto takes a GPU when the pod has one. Default: auto.",
    )

    @property
    def kv_memory_bytes(self) -> int:
        """`kv_memory` in bytes."""
        return int(quantity.parse(self.kv_memory))

    @property
    def routing_mass(self) -> float | None:
        """`routing.mass` as a number."""
        return None if self.routing.mass is None else float(quantity.parse(self.routing.mass))


_PORT = "[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
_IMAGE_RULE = (
    f"self.matches('^{IMAGE}$')",
    "image is a name with an optional registry, tag and digest, e.g. ghcr.io/moe-operator/worker:dev",
)
_GRACE_RULE = (
    "self >= 0 && self <= 3600",
    "terminationGracePeriodSeconds is a number of seconds from 0 to 3600",
)


def _template_text(role: str) -> str:
    return (
        "A pod template (metadata.labels, metadata.annotations, spec) that is merged into the rendered one: "
        f"the container {role} is the operator's, others are added. Fields that the operator owns are "
        "refused. A change starts a rollout. Default: none."
    )


class Worker(AcceleratedPodSettings):
    """The pods that run the model."""

    image: str = Field(
        default=names.DEFAULT_WORKER_IMAGE,
        description=f"Image of the workers. Default: {names.DEFAULT_WORKER_IMAGE}.",
        min_length=1,
        max_length=512,
        json_schema_extra=rules(_IMAGE_RULE),
    )
    termination_grace_period_seconds: int = Field(
        default=60,
        description="Seconds that a terminating worker has to finish its requests. Default: 60.",
        json_schema_extra=rules(_GRACE_RULE),
    )
    pod_template: WorkerTemplate | None = Field(default=None, description=_template_text("worker"))


class Service(Model):
    """The Service that clients call."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.loadBalancerClass) || self.type == 'LoadBalancer'",
                "loadBalancerClass says nothing without a load balancer: set type to LoadBalancer",
            )
        )
    )

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field(
        default="ClusterIP",
        description="How the Service is reached. Without frontend.tls and frontend.auth the ports speak "
        "plaintext and let everybody in: NodePort and LoadBalancer need a firewall. Default: ClusterIP.",
    )
    annotations: dict[str, str] = Field(
        default={},
        description="Annotations of the Service, e.g. for the load balancer. Default: none.",
        max_length=64,
        json_schema_extra=rules(
            (
                f"self.all(k, !k.startsWith('{names.GROUP}/'))",
                f"annotations {names.GROUP}/... are the operator's: remove them",
            ),
            (
                f"self.all(k, k.size() <= 316 && k.matches('{LABEL_KEY}'))",
                "the keys of annotations are names with an optional domain, e.g. example.org/name",
            ),
        ),
    )
    load_balancer_class: str | None = Field(
        default=None,
        description="Implementation of the load balancer, e.g. service.k8s.aws/nlb. Cannot be changed as "
        "long as type is LoadBalancer. Default: the cluster's.",
        min_length=1,
        max_length=316,
        pattern=LABEL_KEY,
    )


class Frontend(PodSettings):
    """The pods that clients connect to; they forward requests to the workers and need no GPU."""

    replicas: int = Field(
        default=1,
        description="Frontend pods. Default: 1.",
        json_schema_extra=rules(("self >= 1 && self <= 100", "frontend.replicas is a number from 1 to 100")),
    )
    image: str = Field(
        default=names.DEFAULT_OPERATOR_IMAGE,
        description=f"Image of the frontend. Default: {names.DEFAULT_OPERATOR_IMAGE}.",
        min_length=1,
        max_length=512,
        json_schema_extra=rules(_IMAGE_RULE),
    )
    routing: Literal["LeastLoaded", "PrefixAffinity", "RandomOfTwo", "Session"] = Field(
        default="LeastLoaded",
        description="Which replica takes a request. LeastLoaded: the one with the fewest requests in flight. "
        "PrefixAffinity: the one with the least left to compute, because it was sent the same beginning of a "
        "prompt. Session: the same one for all requests of a session (metadata x-session-id). RandomOfTwo: "
        "the less loaded of two. Default: LeastLoaded.",
    )
    termination_grace_period_seconds: int = Field(
        default=60,
        description="Seconds that a terminating frontend has to finish its streams. Default: 60.",
        json_schema_extra=rules(_GRACE_RULE),
    )
    service: Service = Field(default=Service(), description="The Service that clients call.")
    tls: Tls | None = Field(
        default=None, description="The certificate of the ports for clients. Default: none, so plaintext."
    )
    auth: Auth | None = Field(
        default=None,
        description="Which requests are let in; with apiKeysSecret and jwt, either of them suffices. "
        "Default: none, so all.",
    )
    pod_template: FrontendTemplate | None = Field(default=None, description=_template_text("frontend"))

    audit_log: Literal["Off", "Requests"] = Field(
        default="Off",
        description="Requests: frontends print a line of JSON for each request: time, tenant, caller, "
        "method, status, tokens and duration, never a prompt or an answer. Off: nothing. Default: Off.",
    )

    @property
    def guarded(self) -> bool:
        """Whether clients cannot simply connect, so that the operator and probes need a port of their own."""
        return self.tls is not None or self.auth is not None


class OutputCache(Model):
    """Answers that frontends keep, so that an equal request costs no worker."""

    mode: Literal["Off", "Deterministic"] = Field(
        default="Off",
        description="Deterministic: whole answers of requests with temperature 0 or a seed are stored, and "
        "equal requests of the same client get them. Off: nothing is stored. Default: Off.",
    )
    memory: Amount = Field(
        default="256Mi",
        description="Memory of each frontend pod for answers, e.g. 256Mi. Default: 256Mi.",
    )
    ttl: str = Field(
        default="1h",
        description="How long an answer is valid: a number and s, m or h, e.g. 30m. Default: 1h.",
        max_length=7,
        json_schema_extra=rules(
            ("self.matches('^[1-9][0-9]{0,5}[smh]$')", "ttl is a number and s, m or h, e.g. 30m")
        ),
    )

    @property
    def memory_bytes(self) -> int:
        """`memory` in bytes."""
        return int(quantity.parse(self.memory))

    @property
    def ttl_seconds(self) -> int:
        """`ttl` in seconds."""
        return int(self.ttl[:-1]) * {"s": 1, "m": 60, "h": 3600}[self.ttl[-1]]


class Cache(Model):
    """What is kept so that it need not be computed again."""

    outputs: OutputCache = Field(default=OutputCache(), description="Whole answers, in the frontends.")


class NetworkPolicies(Model):
    """NetworkPolicies of the pods; they need a network plugin that enforces them."""

    mode: Literal["Off", "Restricted"] = Field(
        default="Off",
        description="Restricted: workers accept connections of the frontends, of the operator and, in "
        "replicas of several workers, of the deployment's other workers; frontends accept clients on the "
        "ports of the API. Metrics stay readable. Off: there are no policies. Default: Off.",
    )


class Telemetry(Model):
    """Where traces and metrics are sent."""

    otlp_endpoint: str | None = Field(
        default=None,
        description="OpenTelemetry Collector that accepts OTLP over gRPC, e.g. "
        "http://otel-collector.moe-system:4317. Default: none, so neither traces nor metrics "
        "are sent.",
        max_length=1024,
        json_schema_extra=rules(
            (
                f"self.matches('^https?://([A-Za-z0-9._-]+|[\\\\[][0-9a-fA-F:.]+[\\\\]])(:({_PORT}))?/?$')",
                "otlpEndpoint is http:// or https://, a host and a port, e.g. http://otel-collector.moe-system:4317",
            )
        ),
    )


_GPUS_LIMITED = "(has(self.scaling.gpuLimit) || has(self.scaling.gpuBudget))"
_GPUS_MOST = (
    "(has(self.scaling.gpuLimit) ? quantity(string(self.scaling.gpuLimit)).asApproximateFloat() : "
    "self.scaling.gpuBudget)"
)
_RULES = (
    (
        f"!{halves('self.worker')} || (self.parallelism.pipeline == 1 && self.parallelism.expert == 1)",
        "worker.acceleratorPercentage 50 is for replicas of one worker: set parallelism.pipeline and "
        "parallelism.expert to 1, or take whole GPUs",
    ),
    (
        f"!has(self.scaling) || !{share_set('self.worker')} || !{_GPUS_LIMITED} || "
        "double(self.scaling.minReplicas * self.parallelism.pipeline * self.parallelism.expert) * "
        f"({halves('self.worker')} ? 0.5 : 1.0) <= {_GPUS_MOST}",
        "scaling.gpuLimit does not allow scaling.minReplicas: raise the one or lower the other",
    ),
)
"""A rule reads `parallelism.expert` only where it matters: CEL cannot read the object that earlier versions
stored there.
"""


class Quality(Model):
    """The allowed quality loss of a compressed checkpoint."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "has(self.maxLoss) || has(self.maxBitsPerByteIncrease)",
                "maxLoss is required: the allowed loss in bits per byte, e.g. 5m",
            )
        )
    )

    max_loss: Quantity | None = Field(
        default=None,
        description="Allowed increase of the checkpoint's bits per byte over its original, according to "
        "the quality.json that `moe-worker compress` stores with the weights: a quantity from 0 to 100, such "
        "as 5m. A worker does not load a checkpoint that is worse, or that has no such file. Required.",
        json_schema_extra=rules(
            (
                "isQuantity(string(self)) && quantity(string(self)).compareTo(quantity('0')) >= 0 && "
                "quantity(string(self)).compareTo(quantity('100')) <= 0",
                "maxLoss is a quantity of bits per byte from 0 to 100, e.g. 5m",
            )
        ),
    )
    max_bits_per_byte_increase: float | None = Field(
        default=None,
        description="Deprecated: use maxLoss, which takes precedence. Default: none.",
        json_schema_extra=rules(("self >= 0.0 && self <= 100.0", "give a number of bits from 0 to 100")),
    )
    text: str | None = Field(
        default=None,
        description="Name of the text that must have been scored, as quality.json has it. Default: any.",
        min_length=1,
        max_length=128,
        pattern="^[A-Za-z0-9._/-]+$",
    )

    @property
    def loss_most(self) -> float:
        """Bits per byte that the checkpoint may have more than its original."""
        if self.max_loss is not None:
            return float(quantity.parse(self.max_loss))
        return self.max_bits_per_byte_increase or 0.0


class Spec(Model):
    """The desired state of a deployment."""

    model_config = ConfigDict(json_schema_extra=rules(*_RULES))

    model: ModelSource = Field(description="The model that is served. Required.")
    replicas: int = Field(
        default=1,
        description="Number of replicas that share the requests; 0 stops serving. `kubectl scale` or a "
        "HorizontalPodAutoscaler may set it. With scaling in mode Auto the operator writes "
        "its decision here, and nobody else may. Default: 1.",
        json_schema_extra=rules(
            (f"self >= 0 && self <= {REPLICAS_MOST}", f"replicas is a number from 0 to {REPLICAS_MOST}")
        ),
    )
    scaling: Scaling | None = Field(
        default=None,
        description="Lets the operator decide the number of replicas from the forecast load. Default: "
        "none, so replicas decides.",
    )
    parallelism: Parallelism = Field(
        default=Parallelism(), description="How one replica is distributed over worker pods."
    )
    engine: Engine = Field(default=Engine(), description="How a worker runs the model.")
    quality: Quality | None = Field(
        default=None,
        description="How much worse than its original a compressed checkpoint may be. Default: not checked.",
    )
    worker: Worker = Field(default=Worker(), description="The pods that run the model.")
    frontend: Frontend = Field(
        default=Frontend(),
        description="The pods that clients connect to; they forward requests to the workers.",
    )
    cache: Cache = Field(default=Cache(), description="What is kept so that it need not be computed again.")
    telemetry: Telemetry = Field(default=Telemetry(), description="Where traces and metrics are sent.")
    network_policy: NetworkPolicies = Field(
        default=NetworkPolicies(),
        description="NetworkPolicies of the pods; they need a network plugin that enforces them.",
    )
    rollout: Rollout = Field(
        default=Rollout(), description="How a new revision of the workers replaces an old one."
    )
    revision_history_limit: int = Field(
        default=10,
        description="Revisions kept for `moe rollout undo`, in addition to those in use. Default: 10.",
        json_schema_extra=rules(
            ("self >= 0 && self <= 100", "revisionHistoryLimit is a number from 0 to 100")
        ),
    )

    @property
    def revised(self) -> Spec:
        """The fields that make a revision (names.REVISED_FIELDS); every other field has its default."""
        return self.model_copy(update=_UNREVISED)


_UNREVISED = {
    name: field.get_default() for name, field in Spec.model_fields.items() if name not in names.REVISED_FIELDS
}

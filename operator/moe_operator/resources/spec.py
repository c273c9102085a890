"""User input: the spec of a MoEDeployment."""

from __future__ import annotations

from pydantic import ConfigDict, Field, model_validator

from moe_operator.resources import names, quantity
from moe_operator.resources.accelerator import halves, share_set, takes_gpu
from moe_operator.resources.base import Model, number_between, rules
from moe_operator.resources.cache_spec import Cache
from moe_operator.resources.engine_spec import Engine
from moe_operator.resources.frontend_spec import Frontend
from moe_operator.resources.model_spec import ModelSource
from moe_operator.resources.network_spec import NetworkPolicies
from moe_operator.resources.parallelism_spec import Parallelism
from moe_operator.resources.quality_spec import Quality
from moe_operator.resources.rollout_spec import Rollout
from moe_operator.resources.scaling_spec import REPLICAS_MOST, Scaling
from moe_operator.resources.telemetry_spec import Telemetry
from moe_operator.resources.transport_spec import Transport
from moe_operator.resources.worker_spec import Worker

_GPUS_LIMITED = "(has(self.scaling.gpuLimit) || has(self.scaling.gpuBudget))"
_GPUS_MOST = (
    "(has(self.scaling.gpuLimit) ? quantity(string(self.scaling.gpuLimit)).asApproximateFloat() : "
    "self.scaling.gpuBudget)"
)
_WHOLE_GPUS = (
    "worker.acceleratorPercentage 50 is for replicas of one worker: set parallelism.pipeline and "
    "parallelism.expert to 1, or take whole GPUs"
)
_ONE_LEARNS = (
    "engine.routing.learning Online is for replicas of one worker: set parallelism.pipeline and "
    "parallelism.expert to 1, or learning to Off"
)
_ONE_OFFLOADS = (
    "engine.kvOffload is for replicas of one worker: set parallelism.pipeline and parallelism.expert to 1, "
    "or leave it out"
)
_CPUS_LEARN = (
    "engine.routing.learning Online is for workers on CPUs: set engine.device to cpu, or learning to Off"
)
# Defaults of engine.maxBatchSize, without and with whole GPUs, and of engine.kvMemory without.
_BATCH, _GPU_BATCH, _KV_MEMORY = 16, 256, "512Mi"
_LEARNING = "(has(self.engine.routing.learning) && self.engine.routing.learning == 'Online')"
_DEVICE = "(has(self.engine.device) ? self.engine.device : 'auto')"
_LIMIT = "scaling.gpuLimit does not allow scaling.minReplicas: raise the one or lower the other"


def _rules_of_replicas(workers: str) -> tuple[tuple[str, str], ...]:
    """Rules of several sections. workers: CEL, pods of a replica, as far as the rules may count them."""
    return (
        (f"!{halves('self.worker')} || {workers} == 1", _WHOLE_GPUS),
        (f"!{_LEARNING} || {workers} == 1", _ONE_LEARNS),
        (f"!has(self.engine.kvOffload) || {workers} == 1", _ONE_OFFLOADS),
        (
            f"!has(self.scaling) || !{share_set('self.worker')} || !{_GPUS_LIMITED} || "
            f"double(self.scaling.minReplicas * {workers}) * ({halves('self.worker')} ? 0.5 : 1.0) <= "
            f"{_GPUS_MOST}",
            _LIMIT,
        ),
    )


_RULES = rules(
    *_rules_of_replicas("self.parallelism.pipeline"),
    (
        f"!{_LEARNING} || {_DEVICE} == 'cpu' || {_DEVICE} == 'auto' && !{takes_gpu('self.worker')}",
        _CPUS_LEARN,
    ),
    # CEL fails to read the object that earlier versions stored in `expert`.
    at_creation=_rules_of_replicas("self.parallelism.pipeline * self.parallelism.expert"),
)


class Spec(Model):
    """The desired state of a deployment."""

    model_config = ConfigDict(json_schema_extra=_RULES)

    model: ModelSource = Field(description="The model that is served. Required.")
    replicas: int = Field(
        default=1,
        description="Number of replicas that share the requests; 0 stops serving. `kubectl scale` or a "
        "HorizontalPodAutoscaler may set it. With scaling in mode Auto the operator writes "
        "its decision here, and nobody else may. Default: 1.",
        json_schema_extra=rules(number_between("replicas is a number", 0, REPLICAS_MOST)),
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
    cache: Cache = Field(
        default=Cache(), description="Results that are stored, so that they need not be computed again."
    )
    telemetry: Telemetry = Field(default=Telemetry(), description="Where traces and metrics are sent.")
    network_policy: NetworkPolicies = Field(
        default=NetworkPolicies(),
        description="NetworkPolicies of the pods; they need a network plugin that enforces them.",
    )
    transport: Transport = Field(
        default=Transport(), description="How frontends, workers and the operator connect to each other."
    )
    rollout: Rollout = Field(
        default=Rollout(), description="How a new revision of the workers replaces an old one."
    )
    revision_history_limit: int = Field(
        default=10,
        description="Revisions kept for `moe rollout undo`, in addition to those in use. Default: 10.",
        json_schema_extra=rules(number_between("revisionHistoryLimit is a number", 0, 100)),
    )

    @model_validator(mode="after")
    def _fits(self) -> Spec:
        """What CEL cannot check at an update of an object of an earlier CRD. Raises ValueError."""
        ranks, scaling = self.parallelism.ranks, self.scaling
        if ranks > 1 and self.engine.routing.learning == "Online":
            raise ValueError(_ONE_LEARNS)
        if ranks > 1 and self.engine.kv_offload is not None:
            raise ValueError(_ONE_OFFLOADS)
        if ranks == 1 or not self.worker.accelerators:
            return self
        if self.worker.gpus < 1:
            raise ValueError(_WHOLE_GPUS)
        most = None if scaling is None else scaling.gpus_most
        if scaling is not None and most is not None and scaling.min_replicas * ranks > most:
            raise ValueError(_LIMIT)
        return self

    @property
    def max_batch_size(self) -> int:
        """`engine.max_batch_size`, or its default."""
        if self.engine.max_batch_size is not None:
            return self.engine.max_batch_size
        return _GPU_BATCH if self._has_gpus else _BATCH

    @property
    def kv_memory_bytes(self) -> int | None:
        """`engine.kv_memory` in bytes, or its default; None: the worker takes what it needs and finds."""
        if self.engine.kv_memory is None and self._has_gpus:
            return None
        return int(quantity.parse(self.engine.kv_memory or _KV_MEMORY))

    @property
    def _has_gpus(self) -> bool:
        """Whether a worker has GPUs to itself. It may share a part of one, and its memory, with others."""
        return self.engine.device != "cpu" and self.worker.gpus >= 1

    @property
    def revised(self) -> Spec:
        """The fields that make a revision (names.REVISED_FIELDS); every other field has its default."""
        return self.model_copy(update=_UNREVISED)


_UNREVISED = {
    name: field.get_default() for name, field in Spec.model_fields.items() if name not in names.REVISED_FIELDS
}

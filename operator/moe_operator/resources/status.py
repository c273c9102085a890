"""Information for users: the status of a MoEDeployment."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from moe_operator.resources.base import LIST_KEYS, LIST_TYPE, Model
from moe_operator.resources.scaling_status import SCALING_ACTIVE, ScalingStatus

_INT64: dict[str, Any] = {"format": "int64"}

READY = "Ready"
PROGRESSING = "Progressing"
MODEL_LOADED = "ModelLoaded"
QUALITY_GATE = "QualityGate"
EXPERTS_BALANCED = "ExpertsBalanced"
ACTIVE = "Active"
RECONCILING = "Reconciling"
STALLED = "Stalled"
"""Reconciling and Stalled exist only while they are True, as kstatus reads them (sigs.k8s.io/cli-utils)."""
DEPRECATED_FIELDS = "DeprecatedFields"
"""Exists only while the spec sets a deprecated field."""
COMPLETE = "Complete"
PARTITION_REACHED = "PartitionReached"
SCALED_TO_ZERO = "ScaledToZero"
DONE = (COMPLETE, PARTITION_REACHED)
"""Reasons of Progressing when the deployment matches the spec."""
REPORTED_NAME_MOST = 64
"""Characters of a name that a worker reports."""


class Condition(Model):
    """One aspect of the deployment's state."""

    type: str = Field(
        description="Which aspect: Ready, Active, Progressing, Reconciling, Stalled, ModelLoaded, "
        "QualityGate, ExpertsBalanced, DeprecatedFields or ScalingActive.",
        max_length=64,
    )
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(description="Why, in one CamelCase word for programs.", max_length=128)
    message: str = Field(default="", description="Why, in a sentence for people.", max_length=32768)
    observed_generation: int | None = Field(
        default=None,
        description="metadata.generation of the spec that the condition refers to.",
        json_schema_extra=_INT64,
    )
    last_transition_time: str = Field(
        description="When status last changed (RFC 3339, UTC).", json_schema_extra={"format": "date-time"}
    )


class ModelInfo(Model):
    """The model as a worker reports it."""

    architecture: str = Field(
        default="",
        description='Architecture as the checkpoint names it, e.g. "deepseek_v3".',
        max_length=REPORTED_NAME_MOST,
    )
    parameters_total: int = Field(
        default=0, description="Number of weights of the model.", json_schema_extra=_INT64
    )
    parameters_active: int = Field(
        default=0, description="Number of weights that one token uses.", json_schema_extra=_INT64
    )
    format: str = Field(
        default="",
        description='Number format of the weights as served, e.g. "bf16".',
        max_length=REPORTED_NAME_MOST,
    )
    context_length: int = Field(default=0, description="Tokens of prompt and continuation together, at most.")
    revision: str = Field(default="", description="Revision of the worker that reported this.")


class StageStatus(Model):
    """The layers of one pipeline stage."""

    first_layer: int = Field(default=0, description="Index of its first layer in the model, from 0.")
    layers: int = Field(default=0, description="Number of its layers.")


class GangStatus(Model):
    """One replica of several workers."""

    name: str = Field(description="Name of its StatefulSet.", max_length=63)
    ranks: int = Field(default=0, description="Workers that it has when it is whole.")
    ready_ranks: int = Field(default=0, description="Workers that are ready.")
    epoch: int = Field(default=0, description="How often its mesh has formed anew, as its leader reports it.")
    restarts: int = Field(default=0, description="Restarts of the worker with the most.")
    imbalance_percentage: int | None = Field(
        default=None,
        description="Load of the busiest rank in percent of the mean of its stage, in the worst layer; "
        "absent if it is not measured.",
    )
    layer: int | None = Field(default=None, description="That layer.")
    busiest_rank: int | None = Field(default=None, description="That rank, by its number in its stage.")


class MeshStatus(Model):
    """The replicas of several workers."""

    shape: str = Field(default="", description="PIPELINExEXPERT of the current spec.", max_length=16)
    ranks: int = Field(default=0, description="Workers of all replicas when they are whole.")
    ready_ranks: int = Field(default=0, description="Workers that are ready.")
    stages: tuple[StageStatus, ...] = Field(
        default=(),
        description="Layers of each stage, as a leader reports them.",
        json_schema_extra={LIST_TYPE: "atomic"},
    )
    gangs: tuple[GangStatus, ...] = Field(
        default=(),
        description="The replicas, the first 100.",
        json_schema_extra={LIST_TYPE: "map", LIST_KEYS: ["name"]},
    )


class RolloutStatus(Model):
    """Progress of a rollout, to detect one that is stuck."""

    revision: str = Field(description="Revision of the rollout.")
    ready_replicas: int = Field(
        default=0, description="Maximum number of replicas of this revision that were ready at the same time."
    )
    ready_frontends: int = Field(
        default=0, description="Maximum number of frontend pods that were ready at the same time."
    )
    progressed_at: str = Field(
        description="When one of these last increased, or the rollout started or was paused (RFC 3339, UTC).",
        json_schema_extra={"format": "date-time"},
    )


class Status(Model):
    """The state at the last reconcile."""

    observed_generation: int | None = Field(
        default=None, description="metadata.generation of the spec last acted on.", json_schema_extra=_INT64
    )
    desired_replicas: int | None = Field(
        default=None, description="Desired number of replicas: spec.replicas, or the decision of scaling."
    )
    replicas: int = Field(default=0, description="Replicas whose leader pod exists and is not terminating.")
    ready_replicas: int = Field(default=0, description="Replicas whose leader is ready.")
    updated_replicas: int = Field(
        default=0, description="Ready replicas whose leader runs the current revision."
    )
    selector: str = Field(default="", description="Label selector of the leaders, for the scale subresource.")
    revision: str = Field(default="", description="Hash of the worker's pod template that the spec asks for.")
    restarted_at: str | None = Field(
        default=None,
        description="The annotation kubectl.kubernetes.io/restartedAt that was last acted on; absent where "
        "there was none.",
    )
    rollout: RolloutStatus | None = Field(
        default=None, description="Progress of the current rollout; absent if there is none."
    )
    model: ModelInfo | None = Field(
        default=None, description="The model as a worker reports it; absent before the first report."
    )
    mesh: MeshStatus | None = Field(
        default=None, description="Replicas of several workers; absent if each replica is one worker."
    )
    conditions: tuple[Condition, ...] = Field(
        default=(),
        description="Ready: all wanted replicas and frontends are ready, or none is wanted. Active: a "
        "replica serves; False if none is wanted. Progressing: True while a rollout runs and "
        "when it is complete, False when it is stuck. Reconciling, present only while True: "
        "the cluster does not match the spec yet. Stalled, present only while True: it will "
        "not without help. ModelLoaded: a worker has loaded the model. QualityGate: the checkpoint "
        "satisfies spec.quality. ExpertsBalanced: the ranks of each stage have about the same load. "
        "DeprecatedFields, present only while True: the spec sets fields that have a replacement. "
        "ScalingActive: scaling follows the load.",
        json_schema_extra={LIST_TYPE: "map", LIST_KEYS: ["type"]},
    )
    scaling: ScalingStatus | None = Field(
        default=None,
        description="State of scaling; absent if it is Off.",
    )

    def without_scaling(self) -> Status:
        """The part that the reconcile derives from objects and pods; the scaler writes the other part."""
        others = tuple(condition for condition in self.conditions if condition.type != SCALING_ACTIVE)
        return self.model_copy(update={"scaling": None, "conditions": others})

    def same_as(self, other: Status) -> bool:
        """Whether both are equal; conditions have no order, since the API server merges several writers."""
        return self._ordered() == other._ordered()

    def _ordered(self) -> Status:
        return self.model_copy(update={"conditions": tuple(sorted(self.conditions, key=lambda c: c.type))})

    def condition(self, kind: str) -> Condition | None:
        """The condition of a type, or None."""
        return next((condition for condition in self.conditions if condition.type == kind), None)

"""User input for replicas of several workers: spec.parallelism."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

from moe_operator.resources import duration, quantity
from moe_operator.resources.base import INT_OR_STRING, Model, number_between, rules
from moe_operator.resources.pods import LABEL_KEY, Quantity, quantity_between

RANKS_MOST: Final = 1024
"""Workers of one replica, at most."""


def _size(value: Any) -> Any:
    """The number in {"size": 2}, as earlier versions wrote it."""
    return value.get("size", 1) if isinstance(value, Mapping) else value


_EXPERT_SCHEMA: Final[dict[str, Any]] = {
    "anyOf": [{"type": "integer"}, {"type": "string"}],
    INT_OR_STRING: True,
    "properties": {
        "size": {
            "type": "integer",
            "description": "Deprecated: earlier versions had the number here. Write expert itself as a "
            "number. Default: none.",
        }
    },
    "minimum": 1,
    "maximum": RANKS_MOST,
    "minLength": 1,
    "pattern": "^$",
}
"""Stored objects of earlier versions have {"size": 1} here. With the type integer the API server would prune
`size`, and server-side apply of their status would fail. With this type and property it keeps them as they
are, and refuses new objects of this form. No text satisfies minLength and pattern.
"""
ExpertRanks = Annotated[
    int, Field(ge=1, le=RANKS_MOST), BeforeValidator(_size), WithJsonSchema(_EXPERT_SCHEMA)
]
"""A number of workers."""


class Rebalance(Model):
    """When copies of experts move between the ranks of a stage."""

    mode: Literal["Auto", "On", "Off"] = Field(
        default="Auto",
        description="On: the engine moves experts while it serves, when the load of ranks differs. Off: "
        "experts stay where they were at the start. Auto: On for CPUs, Off for GPUs. Default: Auto.",
    )
    interval: str = Field(
        default="5m",
        description="Minimum time between two rebalancings: a number and s, m or h, e.g. 10m. Default: 5m.",
        max_length=duration.LENGTH_MOST,
        json_schema_extra=rules(duration.rule("interval", "10m")),
    )
    threshold: Quantity = Field(
        default="1.2",
        description="Imbalance above which experts move, and the condition ExpertsBalanced is False: the "
        "load of the busiest rank of a stage divided by the mean of its ranks, in the worst layer. Default: "
        "1.2.",
        json_schema_extra=rules(
            (
                quantity_between("1", "100"),
                "threshold is a ratio of loads from 1 to 100, e.g. 1.2",
            )
        ),
    )

    @property
    def interval_seconds(self) -> int:
        """`interval` in seconds."""
        return duration.seconds(self.interval)

    @property
    def threshold_percentage(self) -> int:
        """`threshold` in percent."""
        return int(quantity.parse(self.threshold) * 100)


class Topology(Model):
    """On which nodes the workers of one replica run, relative to each other."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.exclusive) || !self.exclusive || (has(self.policy) && self.policy == 'Required')",
                "exclusive needs policy Required: only then is a replica alone in its domain",
            )
        )
    )

    key: str = Field(
        description="Label of nodes; nodes with the same value are one domain, e.g. kubernetes.io/hostname "
        "or the label of a rack or NVLink domain. Required.",
        min_length=1,
        max_length=316,
        json_schema_extra=rules(
            (
                f"self.matches('{LABEL_KEY}')",
                "key is that of a node's label, e.g. topology.kubernetes.io/zone",
            )
        ),
    )
    policy: Literal["Required", "Preferred", "Spread"] = Field(
        default="Required",
        description="Required: all workers of a replica run in one domain. Preferred: in one domain where "
        "there is room. Spread: evenly over domains where there is room. Default: Required.",
    )
    exclusive: bool = Field(
        default=False,
        description="No two replicas of the deployment share a domain; only with policy Required. Default: "
        "false.",
    )


_ONLY_OF_EXPERTS: Final = (
    (
        f"!has(self.pipeline) || self.pipeline == 1 || self.pipeline * self.expert <= {RANKS_MOST}",
        f"a replica has pipeline * expert workers, {RANKS_MOST} at most: lower pipeline or expert",
    ),
    (
        "!has(self.redundantExperts) || self.redundantExperts == 0 || self.expert > 1",
        "redundantExperts needs workers that share experts: set expert to 2 or more, or redundantExperts to "
        "0",
    ),
    (
        "!has(self.rebalance) || self.expert > 1",
        "rebalance needs workers that share experts: set expert to 2 or more, or remove rebalance",
    ),
    (
        "!has(self.topology) || self.pipeline > 1 || self.expert > 1",
        "topology is for replicas of several workers: set pipeline or expert to 2 or more, or remove "
        "topology",
    ),
)
"""Each reads `expert` last: CEL fails to read the object that earlier versions stored there, and an `||` with
a true side ignores that. The API server also checks the default {} by these rules, which lacks all fields.
"""
_INTEGER: Final = (
    f"!has(self.expert) || (type(self.expert) == int && self.expert >= 1 && self.expert <= {RANKS_MOST})",
    f"expert is a number of workers from 1 to {RANKS_MOST}",
)


class Parallelism(Model):
    """How one replica is distributed over workers."""

    model_config = ConfigDict(json_schema_extra=rules(*_ONLY_OF_EXPERTS, at_creation=[_INTEGER]))

    pipeline: int = Field(
        default=1,
        description="Number of stages of a replica, each with a part of the layers; at most as many as the "
        "model has layers. Default: 1.",
        json_schema_extra=rules(number_between("pipeline is a number of stages", 1, RANKS_MOST)),
    )
    expert: ExpertRanks = Field(
        default=1,
        description="Workers of each stage; they share the routed experts of its layers. A number: experts "
        "and redundantExperts together must be divisible by it. A replica has pipeline x expert workers. "
        "Default: 1.",
    )
    redundant_experts: int = Field(
        default=0,
        description="Copies of routed experts in each layer, in addition to the model's own, spread over "
        "the workers of a stage: the busiest experts get them. Default: 0.",
        json_schema_extra=rules(number_between("redundantExperts is a number of copies", 0, 65536)),
    )
    rebalance: Rebalance | None = Field(
        default=None, description="When experts move between workers. Default: as the engine decides."
    )
    topology: Topology | None = Field(
        default=None,
        description="On which nodes the workers of one replica run, relative to each other. Needs "
        "Kubernetes 1.31 or newer. Default: anywhere.",
    )
    scheduling_deadline_seconds: int = Field(
        default=300,
        description="How long some workers of a replica may have nodes while others have none. Then all its "
        "pods are deleted, so that they hold no GPUs, and created again after a pause that grows with each "
        "attempt. Default: 300.",
        json_schema_extra=rules(number_between("schedulingDeadlineSeconds is a number", 1, 86400)),
    )
    restart_budget: int = Field(
        default=10,
        description="Restarts of any one worker of a replica that does not become ready; a replica that was "
        "ready for 10 minutes has a new budget. Then its pods are deleted until an edit or `moe rollout "
        "restart`. Default: 10.",
        json_schema_extra=rules(number_between("restartBudget is a number", 1, 1000)),
    )

    @property
    def ranks(self) -> int:
        """Workers of one replica."""
        return self.pipeline * self.expert

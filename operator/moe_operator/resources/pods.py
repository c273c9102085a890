"""The parts of a pod that users set for workers and frontends, as Kubernetes itself spells them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from moe_operator.resources.base import INT_OR_STRING, LIST_KEYS, LIST_TYPE, Model, rules

# The API server bounds the cost of all rules together: maxLength and maxProperties keep these within it.
_QUANTITY_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "integer"}, {"type": "string"}],
    INT_OR_STRING: True,
    "maxLength": 32,
}
_AMOUNT_RULE = (
    "isQuantity(string(self)) && quantity(string(self)).compareTo(quantity('0')) >= 0",
    "an amount is a number of 0 or more with an optional suffix, e.g. 2, 500m, 8Gi",
)
Quantity = Annotated[str | int, WithJsonSchema(_QUANTITY_SCHEMA)]
"""A Kubernetes quantity as written: an integer, or a text such as "512Mi"."""

Amount = Annotated[str | int, WithJsonSchema({**_QUANTITY_SCHEMA, **rules(_AMOUNT_RULE)})]
"""A quantity of 0 or more."""


class Resources(Model):
    """What a container asks of its node."""

    requests: dict[str, Amount] | None = Field(
        default=None,
        description="What the scheduler sets aside, by resource name: cpu in cores, memory in bytes, "
        'devices in pieces, e.g. {"cpu": "2", "memory": "8Gi"}. Default: the limits.',
        max_length=16,
    )
    limits: dict[str, Amount] | None = Field(
        default=None,
        description="What the container may use at most, by resource name, e.g. "
        '{"nvidia.com/gpu": 1, "memory": "16Gi"}. Default: no limit.',
        max_length=16,
    )


class Toleration(Model):
    """Lets pods run on nodes with a matching taint."""

    key: str | None = Field(
        default=None, description="Key of the taint. Default: every key (with operator Exists)."
    )
    operator: Literal["Exists", "Equal"] | None = Field(
        default=None, description="Exists ignores the value, Equal compares it. Default: Equal."
    )
    value: str | None = Field(
        default=None, description="Value of the taint, for Equal. Default: the empty text."
    )
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Effect of the taint. Default: every effect."
    )
    toleration_seconds: int | None = Field(
        default=None,
        description="Seconds that a pod stays on a node after a NoExecute taint. Default: for ever.",
    )


class KeySelector(Model):
    """One key of a ConfigMap or a Secret of the same namespace."""

    name: str = Field(description="Name of the object. Required.", min_length=1)
    key: str = Field(description="Key in the object's data. Required.", min_length=1)
    optional: bool | None = Field(
        default=None, description="Whether pods start without the object or the key. Default: false."
    )


class FieldSelector(Model):
    """One field of the pod itself."""

    field_path: str = Field(description='Path of the field, e.g. "status.hostIP". Required.', min_length=1)


class EnvSource(Model):
    """Where the value of an environment variable comes from."""

    config_map_key_ref: KeySelector | None = Field(
        default=None, description="Takes the value from a ConfigMap."
    )
    secret_key_ref: KeySelector | None = Field(default=None, description="Takes the value from a Secret.")
    field_ref: FieldSelector | None = Field(
        default=None, description="Takes the value from a field of the pod."
    )


class EnvVar(Model):
    """One environment variable."""

    name: str = Field(description="Name of the variable. Required.", min_length=1)
    value: str | None = Field(default=None, description="Its value. Default: the empty text.")
    value_from: EnvSource | None = Field(
        default=None, description="Where its value comes from, instead of value."
    )


class PodSettings(Model):
    """What workers and frontends have in common."""

    resources: Resources = Field(
        default=Resources(),
        description="CPU, memory and devices of one pod. Default: none asked for, none limited.",
    )
    node_selector: dict[str, str] = Field(
        default={}, description="Labels that a node must have to run these pods. Default: none, so any node."
    )
    tolerations: tuple[Toleration, ...] = Field(
        default=(),
        description="Taints that these pods put up with. Default: none.",
        json_schema_extra={LIST_TYPE: "atomic"},
    )
    env: tuple[EnvVar, ...] = Field(
        default=(),
        description="Environment variables, added to those that the operator sets; one of the same name wins "
        "over the operator's. Default: none.",
        max_length=100,
        json_schema_extra=rules(
            (
                "self.all(v, !(has(v.value) && has(v.valueFrom)))",
                "a variable takes either value or valueFrom, not both",
            ),
            **{LIST_TYPE: "map", LIST_KEYS: ["name"]},
        ),
    )

"""The parts of a pod that users set for workers and frontends, as Kubernetes itself spells them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from moe_operator.resources.base import INT_OR_STRING, LIST_KEYS, LIST_TYPE, Model, rules
from moe_operator.resources.environment import EnvVar

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


def quantity_between(least: str, most: str) -> str:
    """CEL: whether a field is a quantity within these bounds, both allowed."""
    found = "quantity(string(self))"
    bounds = f"{found}.compareTo(quantity('{least}')) >= 0 && {found}.compareTo(quantity('{most}')) <= 0"
    return f"isQuantity(string(self)) && {bounds}"


_AMOUNT_TEXT = "A quantity: a number of 0 or more with an optional suffix, such as 2, 500m or 8Gi."
Amount = Annotated[
    str | int,
    WithJsonSchema({"description": _AMOUNT_TEXT, **_QUANTITY_SCHEMA, **rules(_AMOUNT_RULE)}),
]
"""A quantity of 0 or more."""


_REQUEST, _LIMIT = "quantity(string(self.requests[k]))", "quantity(string(self.limits[k]))"
_DOMAIN_NAME = "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
LABEL_KEY = "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
_LABEL_VALUE = "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
_RESOURCE_NAME_RULE = (
    "self.all(k, k.size() <= 253 && (k in ['cpu', 'memory', 'ephemeral-storage'] || "
    f"k.startsWith('hugepages-') || k.matches('{_DOMAIN_NAME}')))",
    "a resource is cpu, memory, ephemeral-storage, hugepages-SIZE, or a device with domain: nvidia.com/gpu",
)
_WHOLE_DEVICES_RULE = (
    "self.all(k, !k.contains('/') || !isQuantity(string(self[k])) || quantity(string(self[k])).isInteger())",
    "devices such as nvidia.com/gpu are requested in whole numbers",
)


class Resources(Model):
    """What a container requests of its node."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                f"!has(self.requests) || !has(self.limits) || self.requests.all(k, !(k in self.limits) || "
                f"!isQuantity(string(self.requests[k])) || !isQuantity(string(self.limits[k])) || "
                f"{_REQUEST}.compareTo({_LIMIT}) <= 0)",
                "a request is not larger than the limit of the same resource",
            ),
            (
                "!has(self.requests) || self.requests.all(k, !k.contains('/') || (has(self.limits) && "
                "k in self.limits && (!isQuantity(string(self.requests[k])) || "
                "!isQuantity(string(self.limits[k])) || "
                f"{_REQUEST}.compareTo({_LIMIT}) == 0)))",
                "a device such as nvidia.com/gpu belongs in limits; a request of it has to be the same",
            ),
        )
    )

    requests: dict[str, Amount] | None = Field(
        default=None,
        description="What the scheduler reserves, by resource name: cpu in cores, memory in bytes, "
        'devices in pieces, e.g. {"cpu": "2", "memory": "8Gi"}. Default: the limits.',
        max_length=16,
        json_schema_extra=rules(_RESOURCE_NAME_RULE, _WHOLE_DEVICES_RULE),
    )
    limits: dict[str, Amount] | None = Field(
        default=None,
        description="What the container may use at most, by resource name, e.g. "
        '{"nvidia.com/gpu": 1, "memory": "16Gi"}. Default: no limit.',
        max_length=16,
        json_schema_extra=rules(_RESOURCE_NAME_RULE, _WHOLE_DEVICES_RULE),
    )


LabelValue = Annotated[str, Field(max_length=63, pattern=_LABEL_VALUE)]


class Toleration(Model):
    """Lets pods run on nodes with a matching taint."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!(has(self.operator) && self.operator == 'Exists' && has(self.value) && self.value != '')",
                "operator Exists takes no value: it ignores the taint's",
            ),
            (
                "(has(self.key) && self.key != '') || (has(self.operator) && self.operator == 'Exists')",
                "a toleration without a key is for every taint: set operator to Exists, or name the key",
            ),
            (
                "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
                "tolerationSeconds needs effect NoExecute: only that one evicts pods",
            ),
        )
    )

    key: str | None = Field(
        default=None,
        description="Key of the taint. Default: every key (with operator Exists).",
        max_length=316,
        json_schema_extra=rules(
            (f"self == '' || self.matches('{LABEL_KEY}')", "key is that of a taint, e.g. nvidia.com/gpu")
        ),
    )
    operator: Literal["Exists", "Equal"] | None = Field(
        default=None, description="Exists ignores the value, Equal compares it. Default: Equal."
    )
    value: str | None = Field(
        default=None,
        description="Value of the taint, for Equal. Default: the empty text.",
        max_length=63,
        json_schema_extra=rules(
            (f"self.matches('{_LABEL_VALUE}')", "value is that of a taint: letters, digits, -_.")
        ),
    )
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Effect of the taint. Default: every effect."
    )
    toleration_seconds: int | None = Field(
        default=None,
        description="Seconds that a pod stays on a node after a NoExecute taint. Default: forever.",
    )


class PodSettings(Model):
    """What workers and frontends have in common."""

    resources: Resources = Field(
        default=Resources(),
        description="CPU, memory and devices of one pod. Default: no requests, no limits.",
    )
    node_selector: dict[str, LabelValue] = Field(
        default={},
        description="Labels that a node must have to run these pods. Default: none, so any node.",
        max_length=16,
        json_schema_extra=rules(
            (
                f"self.all(k, k.size() <= 316 && k.matches('{LABEL_KEY}'))",
                "the keys of nodeSelector are those of labels, e.g. nvidia.com/gpu.product",
            )
        ),
    )
    tolerations: tuple[Toleration, ...] = Field(
        default=(),
        description="Taints of nodes that these pods tolerate. Default: none.",
        max_length=16,
        json_schema_extra={LIST_TYPE: "atomic"},
    )
    env: tuple[EnvVar, ...] = Field(
        default=(),
        description="Environment variables, in addition to those that the operator sets; they take "
        "precedence over the operator's. Default: none.",
        max_length=100,
        json_schema_extra={
            **rules(
                (
                    "self.all(v, !(has(v.value) && has(v.valueFrom)))",
                    "a variable takes either value or valueFrom, not both",
                )
            ),
            LIST_TYPE: "map",
            LIST_KEYS: ["name"],
        },
    )

"""Environment variables of a container, as Kubernetes itself spells them."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from moe_operator.resources.base import Model, object_name, rules


class KeySelector(Model):
    """One key of a ConfigMap or a Secret of the same namespace."""

    name: str = Field(
        description="Name of the object. Required.",
        min_length=1,
        max_length=253,
        json_schema_extra=rules(object_name("name is that of an object")),
    )
    key: str = Field(
        description="Key in the object's data. Required.",
        min_length=1,
        max_length=253,
        json_schema_extra=rules(
            (
                "self.matches('^[-._a-zA-Z0-9]+$') && !self.matches('^[.][.]?$') && !self.startsWith('..')",
                "key is made of letters, digits and -_. and does not begin with two dots",
            )
        ),
    )
    optional: bool | None = Field(
        default=None, description="Whether pods start without the object or the key. Default: false."
    )


_POD_FIELDS = (
    "metadata[.](name|namespace|uid)|spec[.](nodeName|serviceAccountName)|status[.](hostIP|hostIPs|podIP|podIPs)|"
    "metadata[.](labels|annotations)[\\\\[]'([a-z0-9.-]+/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?'[\\\\]]"
)


class FieldSelector(Model):
    """One field of the pod itself."""

    field_path: str = Field(
        description='Path of the field, e.g. "status.hostIP". Required.',
        min_length=1,
        max_length=400,
        json_schema_extra=rules(
            (
                f'self.matches("^({_POD_FIELDS})$")',
                "fieldPath is one that Kubernetes offers: metadata.name, .namespace, .uid, .labels['KEY'], "
                ".annotations['KEY'], spec.nodeName, .serviceAccountName, status.hostIP(s), .podIP(s)",
            )
        ),
    )


class EnvSource(Model):
    """Where the value of an environment variable comes from."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "[has(self.configMapKeyRef), has(self.secretKeyRef), has(self.fieldRef)]"
                ".filter(x, x).size() == 1",
                "valueFrom takes exactly one of configMapKeyRef, secretKeyRef and fieldRef",
            )
        )
    )

    config_map_key_ref: KeySelector | None = Field(
        default=None, description="Takes the value from a ConfigMap."
    )
    secret_key_ref: KeySelector | None = Field(default=None, description="Takes the value from a Secret.")
    field_ref: FieldSelector | None = Field(
        default=None, description="Takes the value from a field of the pod."
    )


class EnvVar(Model):
    """One environment variable."""

    name: str = Field(
        description="Name of the variable. Required.",
        min_length=1,
        max_length=253,
        json_schema_extra=rules(
            (
                "self.matches('^[-._a-zA-Z][-._a-zA-Z0-9]*$') && self != '.' && !self.startsWith('..')",
                "a variable's name is made of letters, digits and -_. and does not begin with a digit",
            )
        ),
    )
    value: str | None = Field(default=None, description="Its value. Default: the empty text.")
    value_from: EnvSource | None = Field(
        default=None, description="Where its value comes from, instead of value."
    )

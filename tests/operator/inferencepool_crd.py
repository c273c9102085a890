"""The CRD InferencePool (inference.networking.k8s.io/v1) with the constraints of the published API.

The published manifest could not be obtained here, so this schema was written from its Go types
(sigs.k8s.io/gateway-api-inference-extension, api/v1/inferencepool_types.go, as of v1.5): the same fields,
defaults, bounds and CEL rules of the spec.
"""

from __future__ import annotations

from typing import Any

from tests.operator.published_crds import published

_DOMAIN = r"^$|^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
_LABEL_VALUE = {
    "type": "string",
    "maxLength": 63,
    "pattern": r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$",
}
_PORT: dict[str, Any] = {
    "type": "object",
    "required": ["number"],
    "properties": {"number": {"type": "integer", "format": "int32", "minimum": 1, "maximum": 65535}},
}
_PICKER: dict[str, Any] = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "group": {"type": "string", "default": "", "maxLength": 253, "pattern": _DOMAIN},
        "kind": {
            "type": "string",
            "default": "Service",
            "minLength": 1,
            "maxLength": 63,
            "pattern": "^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$",
        },
        "name": {"type": "string", "minLength": 1, "maxLength": 253},
        "port": _PORT,
        "failureMode": {"type": "string", "default": "FailClose", "enum": ["FailOpen", "FailClose"]},
    },
    "x-kubernetes-validations": [
        {"rule": "self.kind != 'Service' || has(self.port)", "message": "a Service needs a port"}
    ],
}
_SPEC: dict[str, Any] = {
    "type": "object",
    "required": ["selector", "targetPorts"],
    "properties": {
        "appProtocol": {"type": "string", "default": "http", "enum": ["http", "kubernetes.io/h2c"]},
        "endpointPickerRef": _PICKER,
        "selector": {
            "type": "object",
            "required": ["matchLabels"],
            "properties": {
                "matchLabels": {
                    "type": "object",
                    "minProperties": 1,
                    "maxProperties": 64,
                    "additionalProperties": _LABEL_VALUE,
                }
            },
        },
        "targetPorts": {
            "type": "array",
            "minItems": 1,
            "maxItems": 8,
            "items": _PORT,
            "x-kubernetes-list-type": "atomic",
            "x-kubernetes-validations": [
                {
                    "rule": "self.all(p1, self.exists_one(p2, p1.number==p2.number))",
                    "message": "port numbers are unique",
                }
            ],
        },
    },
}
CRD = published(
    "InferencePool",
    "inference.networking.k8s.io",
    "gateway-api-inference-extension/pull/1173",
    _SPEC,
    short_names=("infpool",),
)

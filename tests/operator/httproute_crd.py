"""The CRDs HTTPRoute and GRPCRoute (gateway.networking.k8s.io/v1), as far as the operator sets their fields.

They have the constraints of the published ones (sigs.k8s.io/gateway-api v1.4.1 and v1.3.0, standard
channel) for these fields and know no others, so the API server reports any other field that is set.
"""

from __future__ import annotations

from typing import Any

from tests.operator.published_crds import published

_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_NAME = rf"^{_LABEL}(\.{_LABEL})*$"
_KIND = "^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$"
_PORT = {"type": "integer", "format": "int32", "minimum": 1, "maximum": 65535}
_SAME_PARENT = (
    "p1.name == p2.name && has(p1.__namespace__) == has(p2.__namespace__)"
    " && (!has(p1.__namespace__) || p1.__namespace__ == p2.__namespace__)"
)
_SAME_SECTION = (
    "has(p1.sectionName) == has(p2.sectionName) && (!has(p1.sectionName) || p1.sectionName == p2.sectionName)"
)


def _text(most: int, pattern: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "maxLength": most, "pattern": pattern, **more}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


def _list(most: int, items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "maxItems": most, "x-kubernetes-list-type": "atomic", "items": items}


_PARENTS = {
    **_list(
        32,
        _object(
            ["name"],
            group={"type": "string", "default": "gateway.networking.k8s.io", "maxLength": 253},
            kind=_text(63, _KIND, default="Gateway"),
            name={"type": "string", "minLength": 1, "maxLength": 253},
            namespace=_text(63, f"^{_LABEL}$"),
            sectionName=_text(253, _NAME),
            port=_PORT,
        ),
    ),
    "x-kubernetes-validations": [
        {
            "rule": "self.all(p1, self.all(p2, "
            f"!({_SAME_PARENT}) || has(p1.sectionName) == has(p2.sectionName)))",
            "message": "all references to a parent have a sectionName, or none",
        },
        {
            "rule": f"self.all(p1, self.exists_one(p2, {_SAME_PARENT} && {_SAME_SECTION}))",
            "message": "sectionName is unique among the references to a parent",
        },
    ],
}
_BACKEND = {
    **_object(
        ["name"],
        group={"type": "string", "default": "", "maxLength": 253},
        kind=_text(63, _KIND, default="Service"),
        name={"type": "string", "minLength": 1, "maxLength": 253},
        port=_PORT,
        weight={"type": "integer", "format": "int32", "default": 1, "minimum": 0, "maximum": 1000000},
    ),
    "x-kubernetes-validations": [
        {
            "rule": "self.group != '' || self.kind != 'Service' || has(self.port)",
            "message": "a Service needs a port",
        }
    ],
}
_PATH = _object(
    [],
    type={
        "type": "string",
        "default": "PathPrefix",
        "enum": ["Exact", "PathPrefix", "RegularExpression"],
    },
    value={"type": "string", "default": "/", "maxLength": 1024, "pattern": "^/"},
)
_RULE = _object(
    [],
    matches=_list(64, _object([], path=_PATH)),
    timeouts=_object([], request={"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}),
    backendRefs=_list(16, _BACKEND),
)
_HOSTNAMES = _list(16, _text(253, rf"^(\*\.)?{_LABEL}(\.{_LABEL})*$"))
CRD = published(
    "HTTPRoute",
    "gateway.networking.k8s.io",
    "gateway-api/pull/3328",
    _object([], parentRefs=_PARENTS, hostnames=_HOSTNAMES, rules=_list(16, _RULE)),
)
_NAMED = {"type": "string", "maxLength": 1024}
_METHOD = {
    **_object(
        [],
        type={"type": "string", "default": "Exact", "enum": ["Exact", "RegularExpression"]},
        service=_NAMED,
        method=_NAMED,
    ),
    "x-kubernetes-validations": [
        {
            "rule": "has(self.type) ? has(self.service) || has(self.method) : true",
            "message": "a service, a method or both",
        },
        {
            "rule": "(!has(self.type) || self.type == 'Exact') && has(self.service)"
            r' ? self.service.matches(r"""^(?i)\.?[a-z_][a-z_0-9]*(\.[a-z_][a-z_0-9]*)*$""") : true',
            "message": "a name of a service",
        },
        {
            "rule": "(!has(self.type) || self.type == 'Exact') && has(self.method)"
            ' ? self.method.matches(r"""^[A-Za-z_][A-Za-z_0-9]*$""") : true',
            "message": "a name of a method",
        },
    ],
}
_GRPC_RULE = _object([], matches=_list(64, _object([], method=_METHOD)), backendRefs=_list(16, _BACKEND))
GRPC_CRD = published(
    "GRPCRoute",
    "gateway.networking.k8s.io",
    "gateway-api/pull/3328",
    _object([], parentRefs=_PARENTS, hostnames=_HOSTNAMES, rules=_list(16, _GRPC_RULE)),
)

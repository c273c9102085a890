"""podTemplate: what users add to the pods of a role. The schema is Kubernetes' own.

`python -m moe_operator.resources.pod_template OPENAPI > podtemplate.json` writes the schema from Kubernetes'
published description (api/openapi-spec/v3/apis__apps__v1_openapi.json), without its texts, without fields
that Kubernetes sets itself and without deprecated volumes (docs/adr/0029).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, TextIO

from pydantic import AfterValidator, WithJsonSchema

from moe_operator.resources import names
from moe_operator.resources.base import INT_OR_STRING, LIST_KEYS, LIST_TYPE, RULES
from moe_operator.resources.digest import canonical

MARK: Final = "x-pod-template"
"""Key of a schema that stands for the schema of a pod template."""

_BYTES_MOST: Final = 32 * 1024
"""Maximum size as JSON. A StatefulSet carries it three times in annotations of together at most 256 KiB."""

OWN_VOLUMES: Final = ("model", "model-cache", "tmp", "moe-tls", "moe-api-keys", "moe-jwks", "moe-internal")
"""Volumes of the operator; users add others."""


def _bounded(template: dict[str, Any]) -> dict[str, Any]:
    size = len(canonical(template).encode())
    if size > _BYTES_MOST:
        raise ValueError(
            f"podTemplate is too large: {size} bytes as JSON of at most {_BYTES_MOST}; "
            "move its content to ConfigMaps or a sidecar's image"
        )
    return template


WorkerTemplate = Annotated[
    dict[str, Any], AfterValidator(_bounded), WithJsonSchema({"type": "object", MARK: names.ROLE_WORKER})
]
"""A PodTemplateSpec for workers."""
FrontendTemplate = Annotated[
    dict[str, Any], AfterValidator(_bounded), WithJsonSchema({"type": "object", MARK: names.ROLE_FRONTEND})
]
"""A PodTemplateSpec for frontends."""


_REMOVE: Final = "remove it"
_OWN_OF_POD: Final[Mapping[str, str]] = {
    "activeDeadlineSeconds": _REMOVE,
    "hostname": _REMOVE,
    "hostnameOverride": _REMOVE,
    "readinessGates": _REMOVE,
    "restartPolicy": _REMOVE,
    "setHostnameAsFQDN": _REMOVE,
    "subdomain": _REMOVE,
    "terminationGracePeriodSeconds": "set spec.{role}.terminationGracePeriodSeconds",
}
"""Fields of a pod's spec that the operator owns, with the remedy."""
_OWN_OF_CONTAINER: Final[Mapping[str, str]] = {
    "args": _REMOVE,
    "command": _REMOVE,
    "image": "set spec.{role}.image",
    "livenessProbe": _REMOVE,
    "readinessProbe": _REMOVE,
    "restartPolicy": _REMOVE,
    "restartPolicyRules": _REMOVE,
    "startupProbe": _REMOVE,
    "terminationMessagePath": _REMOVE,
    "terminationMessagePolicy": _REMOVE,
}
"""Fields of the container of the role, likewise."""
_UNSUPPORTED: Final = (
    *("ephemeralContainers", "nodeName", "overhead", "priority", "schedulingGroup", "serviceAccount"),
    *("awsElasticBlockStore", "azureDisk", "azureFile", "cephfs", "cinder", "fc", "flexVolume", "flocker"),
    *("gcePersistentDisk", "gitRepo", "glusterfs", "iscsi", "photonPersistentDisk", "portworxVolume"),
    *("quobyte", "rbd", "scaleIO", "storageos", "vsphereVolume"),
)
"""Fields that the schema lacks: Kubernetes sets them itself, or they are deprecated."""
_KEY_DEFAULTS: Final[Mapping[str, str]] = {"name": "", "protocol": "TCP"}
_KEPT: Final = ("type", "format", "required", LIST_TYPE, LIST_KEYS, "x-kubernetes-map-type")


def schema(role: str) -> dict[str, Any]:
    """Structural schema of the podTemplate of a role, with the rules that refuse what the operator owns."""
    spec: dict[str, Any] = json.loads(resources.files(__package__).joinpath("podtemplate.json").read_text())
    fields = spec["properties"]
    for name in ("containers", "initContainers"):
        fields[name]["maxItems"] = 16
        fields[name]["items"]["properties"]["name"]["maxLength"] = 63
    fields["volumes"]["maxItems"] = 64
    fields["volumes"]["items"]["properties"]["name"]["maxLength"] = 63
    return {
        "type": "object",
        "properties": {
            "metadata": {
                "type": "object",
                "properties": {name: _texts() for name in ("labels", "annotations")},
            },
            "spec": {**spec, RULES: [*_of_pod(role), *_of_container(role), *_of_fetch(), *_of_volumes()]},
        },
    }


def _texts() -> dict[str, Any]:
    own = f"self.all(k, !k.startsWith('{names.GROUP}/') && k != '{names.ANNOTATION_RESTARTED}')"
    why = f"{names.GROUP}/... and {names.ANNOTATION_RESTARTED} are the operator's: remove them"
    return {
        "type": "object",
        "additionalProperties": {"type": "string"},
        "maxProperties": 64,
        RULES: [{"rule": own, "message": why}],
    }


def _rule(role: str, path: str, expression: str, remedy: str) -> dict[str, str]:
    message = f"podTemplate.spec.{path} is the operator's: {remedy.format(role=role)}"
    return {"rule": expression, "message": message}


def _of_pod(role: str) -> list[dict[str, str]]:
    return [_rule(role, name, f"!has(self.{name})", remedy) for name, remedy in _OWN_OF_POD.items()]


def _of_container(role: str) -> list[dict[str, str]]:
    others = f"!has(self.containers) || self.containers.all(c, c.name != '{role}' || "
    own = [
        _rule(role, f"containers[{role}].{name}", f"{others}!has(c.{name}))", remedy)
        for name, remedy in _OWN_OF_CONTAINER.items()
    ]
    nothing = "!has(c.resources) || (!has(c.resources.limits) && !has(c.resources.requests))"
    amounts = f"containers[{role}].resources.limits or .requests"
    return [*own, _rule(role, amounts, f"{others}{nothing})", "set spec.{role}.resources")]


def _of_fetch() -> list[dict[str, str]]:
    """Of the init container that downloads the model; its env and resources are the user's too."""
    name = names.FETCH_CONTAINER
    others = f"!has(self.initContainers) || self.initContainers.all(c, c.name != '{name}' || "
    return [
        _rule(name, f"initContainers[{name}].{field}", f"{others}!has(c.{field}))", remedy)
        for field, remedy in (("args", _REMOVE), ("command", _REMOVE), ("image", "set spec.worker.image"))
    ]


def _of_volumes() -> list[dict[str, str]]:
    taken = f"!has(self.volumes) || self.volumes.all(v, !(v.name in {list(OWN_VOLUMES)}))"
    message = f"the volumes {', '.join(OWN_VOLUMES)} are the operator's: choose another name"
    return [{"rule": taken, "message": message}]


def from_openapi(document: Mapping[str, Any]) -> dict[str, Any]:
    """Structural schema of a PodSpec, from Kubernetes' description of apps/v1."""
    definitions = document["components"]["schemas"]
    found = _convert(definitions["io.k8s.api.core.v1.PodSpec"], definitions)
    del found["required"]  # a template that only sets an affinity names no container
    return found


def _convert(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    for part in (*node.get("allOf", ()), node):
        if "$ref" in part:
            name = part["$ref"].rsplit("/", 1)[-1]
            if name.endswith((".Quantity", ".IntOrString")):
                return {"anyOf": [{"type": "integer"}, {"type": "string"}], INT_OR_STRING: True}
            node = {**node, **definitions[name]}
    out = {key: node[key] for key in _KEPT if key in node}
    if isinstance(node.get("additionalProperties"), dict):
        out["additionalProperties"] = _convert(node["additionalProperties"], definitions)
    if "items" in node:
        out["items"] = _convert(node["items"], definitions)
        for key in node.get(LIST_KEYS, ()):  # the API server wants keys to be required or to have a default
            if key not in out["items"].get("required", ()):
                out["items"]["properties"][key]["default"] = _KEY_DEFAULTS[key]
    if "properties" in node:
        kept = {key: value for key, value in node["properties"].items() if key not in _UNSUPPORTED}
        out["properties"] = {key: _convert(value, definitions) for key, value in kept.items()}
    return out


def main(path: str, out: TextIO = sys.stdout) -> None:
    """Writes podtemplate.json to standard output."""
    json.dump(from_openapi(json.loads(Path(path).read_text())), out, indent=0, sort_keys=True)
    out.write("\n")


if __name__ == "__main__":
    main(sys.argv[1])

"""MoEDeployments at random: from the CRD's schema, and valid ones with something changed."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

from moe_operator.resources import crd
from moe_operator.resources.base import INT_OR_STRING

# Values on the edge of what anything here takes, and some beyond.
_TEXTS = st.sampled_from(
    [
        "",
        " ",
        "a",
        "A",
        "0",
        "-1",
        "x" * 300,
        "a b",
        "ümlaut",
        "'",
        '"',
        "$(X)",
        "${HOME}",
        "\n",
        "a/b",
        "..",
        "1Gi",
        "cpu",
        "nvidia.com/gpu",
        "example.org/a",
        "file:///mnt/models/x",
        "file:///",
        "file:///tmp",
        "file:///a//b",
        "s3://b/x",
        "http://otel:4317",
        "http://otel:99999",
        "https://[::1]:4317",
        "ghcr.io/moe-operator/worker:dev",
        "a:b:c",
        "Exists",
        "metadata.name",
        "metadata.labels['a']",
        "status.podIP",
        "status.phase",
    ]
)
_NUMBERS = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 60, 1000, 1001, 2**31, 2**63 - 1])
_QUANTITIES = st.sampled_from(
    [
        0,
        1,
        -1,
        2**62,
        "1",
        "500m",
        "1.5",
        "8Gi",
        "1e3",
        "1E3",
        ".5",
        "5.",
        "+5",
        "1Ki",
        "0.1n",
        "9e99",
        "1e-9",
        "8GiB",
        "512Mi",
        "1Pi",
        "2Pi",
        " 1",
    ]
)
_ANYTHING = st.none() | st.booleans() | _NUMBERS | st.floats() | _TEXTS | st.lists(_TEXTS, max_size=2)


# Values that fit where they are, so that not everything is refused for its first field.
_FITTING: dict[str, list[Any]] = {
    "uri": [
        "file:///mnt/models/docs-moe",
        "file:///a",
        "hf://a/b@v1",
        "pvc://a/b",
        "oci://a/b:1",
        "s3://abc/d",
    ],
    "servedName": ["docs", "a/b", "v1.0"],
    "replicas": [1, 2, 3],
    "expert": [1, 2],
    "pipeline": [1, 2],
    "contextLength": [1, 512, 4194304],
    "maxBatchSize": [1, 4096],
    "prefillTokens": [1, 1048576],
    "targetStepMilliseconds": [1, 3600000],
    "kvOffload": ["1Mi", "1.5Gi", 2**30, "1e9", "1Pi"],
    "kvMemory": ["1Mi", "1.5Gi", 2**30, "1e9", "1Pi"],
    "image": ["busybox", "localhost:5000/a/b:1", "ghcr.io/moe-operator/worker:dev"],
    "terminationGracePeriodSeconds": [0, 60, 3600],
    "otlpEndpoint": ["http://otel:4317", "https://[::1]:4317/", "http://10.0.0.1"],
    "requests": [{"cpu": 1}, {"memory": "1Gi", "cpu": "500m"}, {"cpu": 2, "nvidia.com/gpu": 1}],
    "limits": [{"cpu": 1}, {"memory": "2Gi"}, {"nvidia.com/gpu": 1}, {"cpu": "0.5", "memory": "1Gi"}],
    "nodeSelector": [{}, {"zone": "a"}, {"example.org/kind": "H100-80"}],
    "tolerations": [
        [],
        [{"operator": "Exists"}],
        [{"key": "a", "value": "b"}],
        [{"key": "a", "operator": "Equal"}],
    ],
    "env": [
        [],
        [{"name": "A"}],
        [{"name": "A", "value": "$(B)"}, {"name": "b.c"}],
        [{"name": "PATH", "value": ""}],
    ],
    "podTemplate": [
        {},
        {"metadata": {"labels": {"team": "a"}, "annotations": {"example.org/a": "b"}}},
        {"spec": {"priorityClassName": "high", "securityContext": {"runAsUser": 1000}}},
        {"spec": {"containers": [{"name": "side", "image": "busybox"}], "volumes": [{"name": "x"}]}},
        {"spec": {"containers": [{"name": "worker", "command": ["sh"]}]}},
    ],
    "scaling": [
        {"maxReplicas": 3},
        {"minReplicas": 0, "maxReplicas": 2},
        {"maxReplicas": 2, "mode": "Advisory"},
    ],
}


def _field(name: str, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of a field: three of four fit."""
    if name not in _FITTING:
        return of_schema(schema)
    fitting = st.sampled_from(_FITTING[name])
    return st.one_of(fitting, fitting, fitting, of_schema(schema))


def of_schema(schema: dict[str, Any]) -> st.SearchStrategy[Any]:  # noqa: PLR0911
    """Values that mostly have the type, and sometimes the sense, that a schema asks for."""
    if schema.get(INT_OR_STRING):
        return _QUANTITIES | _TEXTS
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema.get("type"):
        case "object":
            return _object(schema)
        case "array":
            return st.lists(of_schema(schema["items"]), max_size=3)
        case "integer":
            return _NUMBERS | st.integers(0, 100)
        case "number":
            return st.floats(0, 100) | st.floats()
        case "boolean":
            return st.booleans()
    return _TEXTS | st.text(max_size=20)


def _object(schema: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    if "properties" not in schema:
        return st.dictionaries(_TEXTS, of_schema(schema.get("additionalProperties", {})), max_size=3)
    fields = {name: _field(name, inner) for name, inner in schema["properties"].items()}
    required = {name: fields.pop(name) for name in schema.get("required", ())}
    return st.fixed_dictionaries(required, optional=fields)


_SPEC = crd.schema()["properties"]["spec"]
for _role in ("worker", "frontend"):
    # The API server knows Kubernetes' own fields better; thousands of them would crowd out all others.
    _SPEC["properties"][_role]["properties"]["podTemplate"] = {"type": "object"}

VALID: list[dict[str, Any]] = [
    {"model": {"uri": "file:///mnt/models/docs-moe"}},
    {"model": {"uri": "file:///mnt/models/x/", "servedName": "docs/one"}, "replicas": 0},
    {
        "model": {"uri": "file:///mnt/models/x"},
        "replicas": 2,
        "engine": {"contextLength": 512, "maxBatchSize": 2, "kvMemory": "1.5Gi", "dtype": "float32"},
        "worker": {
            "resources": {
                "requests": {"cpu": "500m", "memory": "1Gi", "nvidia.com/gpu": 1},
                "limits": {"cpu": 1, "nvidia.com/gpu": 1},
            },
            "nodeSelector": {"zone": "a", "example.org/kind": ""},
            "tolerations": [
                {"key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}
            ],
            "env": [
                {"name": "A", "value": "1"},
                {"name": "HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}},
                {
                    "name": "KEY",
                    "valueFrom": {"secretKeyRef": {"name": "keys", "key": "a.b", "optional": True}},
                },
            ],
            "terminationGracePeriodSeconds": 0,
        },
        "frontend": {"replicas": 2, "resources": {"limits": {"memory": "256Mi"}}, "env": []},
        "telemetry": {"otlpEndpoint": "http://otel:4317"},
    },
]


def _places(
    value: Any, schema: dict[str, Any], path: tuple[Any, ...] = ()
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Every path below the root that a value has, or could have by the schema, with its schema."""
    found = [(path, schema)] if path else []
    if "properties" in schema:
        for name, inner in schema["properties"].items():
            found += _places(value.get(name) if isinstance(value, dict) else None, inner, (*path, name))
    elif isinstance(value, dict):
        for name in value:
            found += _places(value[name], schema.get("additionalProperties", {}), (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += _places(item, schema.get("items", {}), (*path, index))
    return found


def _set(spec: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    *parents, last = path
    here: Any = spec
    for name in parents:
        here = here.setdefault(name, {}) if isinstance(here, dict) else here[name]
    here[last] = value


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A valid spec with one or two values changed."""
    spec = copy.deepcopy(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 2))):
        path, schema = draw(st.sampled_from(_places(spec, _SPEC)))
        usual = _field(str(path[-1]), schema)
        value = draw(st.one_of(usual, usual, usual, usual, _ANYTHING))
        try:
            _set(spec, path, value)
        except (TypeError, IndexError, KeyError):
            break  # the first change left no such place
    return spec


# Deferred, so that a failure is not followed by pages of strategies.
specs = st.deferred(lambda: st.one_of(of_schema(_SPEC), mutated(), mutated(), mutated()))
names = st.deferred(
    lambda: st.one_of(*[st.just("docs")] * 3, st.from_regex(r"[a-z][-a-z0-9.]{0,45}", fullmatch=True), _TEXTS)
)

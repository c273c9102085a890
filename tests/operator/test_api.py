"""The resource on a real API server: what it takes, what it refuses and in which words, what it shows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from localcluster.errors import CommandError
from moe_operator.resources.deployment import parse
from tests.operator.by_hand import COLLECTION, Api
from tests.operator.live import Live, eventually, manifest


@pytest.fixture(scope="module")
def idle(api):
    """A cluster in which no operator acts; other files of tests may have installed one."""
    operator = ("-n", "moe-system", "deployment/moe-operator")
    installed = api.kubectl(
        "get", "deployments", "-A", "-o", "name", "--field-selector=metadata.name=moe-operator"
    )
    if installed:
        api.kubectl("scale", *operator, "--replicas=0")
        api.kubectl("-n", "moe-system", "wait", "--for=delete", "pods", "--all", "--timeout=60s")
    yield api
    if installed:
        api.kubectl("scale", *operator, "--replicas=1")
        api.kubectl("rollout", "status", *operator, "--timeout=90s")


@pytest.fixture
def crd(idle, namespace):
    return Live(idle, namespace)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "wrong type": ({"replicas": "two"}, "spec.replicas in body must be of type integer"),
    "unknown field": ({"replicsa": 2}, 'unknown field "spec.replicsa"'),
    "unknown field inside": ({"engine": {"batch": 2}}, 'unknown field "spec.engine.batch"'),
    "no certificate": ({"frontend": {"tls": {}}}, "spec.frontend.tls.secretName: Required value"),
    "certificate": (
        {"frontend": {"tls": {"secretName": "My_Secret"}}},
        "this is the name of a Secret in the same namespace",
    ),
    "nobody let in": ({"frontend": {"auth": {}}}, "auth needs apiKeysSecret, jwt or both"),
    "keys of no provider": (
        {"frontend": {"auth": {"jwt": {"issuer": "i", "audience": "a"}}}},
        "jwt takes its keys from exactly one of jwksUri and jwksSecret",
    ),
    "keys of two providers": (
        {
            "frontend": {
                "auth": {"jwt": {"issuer": "i", "audience": "a", "jwksUri": "https://i/", "jwksSecret": "a"}}
            }
        },
        "jwt takes its keys from exactly one of jwksUri and jwksSecret",
    ),
    "keys in plain text": (
        {"frontend": {"auth": {"jwt": {"issuer": "i", "audience": "a", "jwksUri": "http://i/"}}}},
        "jwksUri is an https:// URL",
    ),
    "no issuer": (
        {"frontend": {"auth": {"jwt": {"audience": "a", "jwksSecret": "a"}}}},
        "spec.frontend.auth.jwt.issuer: Required value",
    ),
    "no model": ({"model": {}}, "spec.model.uri: Required value"),
    "pipeline zero": ({"parallelism": {"pipeline": 0}}, "pipeline is a number of stages from 1 to 1024"),
    "no experts": ({"parallelism": {"expert": 0}}, "expert is a number of workers from 1 to 1024"),
    "experts as text": ({"parallelism": {"expert": "2"}}, "expert is a number of workers from 1 to 1024"),
    "experts as before": (
        {"parallelism": {"expert": {"size": 2}}},
        "spec.parallelism.expert in body must be of type integer",
    ),
    "workers huge": (
        {"parallelism": {"pipeline": 64, "expert": 64}},
        "a replica has pipeline * expert workers",
    ),
    "copies of one worker's experts": (
        {"parallelism": {"pipeline": 2, "redundantExperts": 2}},
        "redundantExperts needs workers that share experts",
    ),
    "rebalance alone": ({"parallelism": {"rebalance": {}}}, "rebalance needs workers that share experts"),
    "topology of one worker": (
        {"parallelism": {"topology": {"key": "rack"}}},
        "topology is for replicas of several workers",
    ),
    "half a GPU for each rank": (
        {
            "parallelism": {"expert": 2},
            "worker": {"acceleratorPercentage": 50, "acceleratorResource": "nvidia.com/gpu.shared"},
        },
        "acceleratorPercentage 50 is for replicas of one worker",
    ),
    "limit below the ranks": (
        {
            "parallelism": {"expert": 2},
            "worker": {"acceleratorPercentage": 100},
            "scaling": {"maxReplicas": 4, "minReplicas": 2, "gpuLimit": 3},
        },
        "gpuLimit does not allow",
    ),
    "copies negative": (
        {"parallelism": {"expert": 2, "redundantExperts": -1}},
        "redundantExperts is a number of copies from 0",
    ),
    "interval": (
        {"parallelism": {"expert": 2, "rebalance": {"interval": "soon"}}},
        "interval is a number and s, m or h",
    ),
    "threshold": (
        {"parallelism": {"expert": 2, "rebalance": {"threshold": "0.5"}}},
        "threshold is a ratio of loads from 1 to 100",
    ),
    "exclusive": (
        {"parallelism": {"pipeline": 2, "topology": {"key": "rack", "policy": "Spread", "exclusive": True}}},
        "exclusive needs policy Required",
    ),
    "no restart": ({"parallelism": {"restartBudget": 0}}, "restartBudget is a number from 1 to 1000"),
    "no time for nodes": (
        {"parallelism": {"schedulingDeadlineSeconds": 0}},
        "schedulingDeadlineSeconds is a number from 1",
    ),
    "replicas negative": ({"replicas": -1}, "replicas is a number from 0 to 1000"),
    "replicas huge": ({"replicas": 2_000_000_000}, "replicas is a number from 0 to 1000"),
    "context zero": ({"engine": {"contextLength": 0}}, "contextLength is a number of tokens from 1"),
    "batch negative": ({"engine": {"maxBatchSize": -3}}, "maxBatchSize is a number of requests from 1"),
    "prefill zero": ({"engine": {"prefillTokens": 0}}, "prefillTokens is a number of tokens from 1"),
    "step zero": (
        {"engine": {"targetStepMilliseconds": 0}},
        "targetStepMilliseconds is a number of milliseconds from 1",
    ),
    "memory zero": ({"engine": {"kvMemory": 0}}, "kvMemory is an amount of memory of 1Mi or more"),
    "memory unit": (
        {"engine": {"kvMemory": "8GiB"}},
        "kvMemory is an amount of memory of 1Mi or more, e.g. 512Mi",
    ),
    "dtype": ({"engine": {"dtype": "int3"}}, 'supported values: "auto", "bfloat16", "float32"'),
    "format": ({"engine": {"format": "W4A8"}}, 'supported values: "auto", "dense", "fp8", "w4a16", "w4a8"'),
    "cache": ({"engine": {"kvDtype": "fp4"}}, 'supported values: "auto", "float32", "bfloat16", "fp8"'),
    "another scheme": (
        {"model": {"uri": "https://example.org/model"}},
        "begins with one of file://, hf://, s3://, gs://, pvc://, oci://",
    ),
    "relative path": (
        {"model": {"uri": "models/x"}},
        "write e.g. hf://OWNER/NAME or pvc://CLAIM/PATH",
    ),
    "host in the path": ({"model": {"uri": "file://models/x"}}, "an absolute path (three slashes in all)"),
    "no owner": ({"model": {"uri": "hf://model"}}, "after hf:// comes the model's owner and name"),
    "no bucket": ({"model": {"uri": "s3://"}}, "after s3:// comes a bucket and a path"),
    "wrong claim": ({"model": {"uri": "pvc://Models/a"}}, "after pvc:// comes the name of a"),
    "wrong image": ({"model": {"uri": "oci://a b"}}, "after oci:// comes an image"),
    "credentials for nothing": (
        {"model": {"uri": "file:///mnt/models/a", "credentialsSecret": "a"}},
        "credentialsSecret and cache are for models that are downloaded",
    ),
    "endpoint for nothing": (
        {"model": {"uri": "gs://bucket/a", "endpoint": "http://a"}},
        "endpoint is for models of a hub or an S3 API",
    ),
    "cache in two places": (
        {"model": {"uri": "hf://a/b", "cache": {"claimName": "a", "hostPath": "/a"}}},
        "a cache is in one place: set claimName or hostPath, not both",
    ),
    "way up": ({"model": {"uri": "file:///mnt/../etc"}}, "must not hold . or .. as a part"),
    "resources": ({"worker": {"resources": {"limits": {"cpu": -1}}}}, "an amount is a number of 0 or more"),
    "frontends": ({"frontend": {"replicas": 0}}, "frontend.replicas is a number from 1 to 100"),
    "own tmp": ({"model": {"uri": "file:///tmp"}}, "the container has a /tmp of its own"),
    "offload unit": ({"engine": {"kvOffload": "8GB"}}, "kvOffload is an amount of memory of 1Mi or more"),
    "offload of a gang": (
        {"engine": {"kvOffload": "8Gi"}, "parallelism": {"pipeline": 2}},
        "engine.kvOffload is for replicas of one worker: set parallelism.pipeline",
    ),
    "memory huge": ({"engine": {"kvMemory": "2Pi"}}, "and at most 1Pi"),
    "endpoint's port": (
        {"telemetry": {"otlpEndpoint": "http://otel:99999"}},
        "otlpEndpoint is http:// or https://, a host and a port",
    ),
    "image": ({"worker": {"image": "my image"}}, "image is a name with an optional registry, tag and digest"),
    "request above the limit": (
        {"worker": {"resources": {"requests": {"cpu": 2}, "limits": {"cpu": "500m"}}}},
        "a request is not larger than the limit of the same resource",
    ),
    "device without a limit": (
        {"worker": {"resources": {"requests": {"nvidia.com/gpu": 1}}}},
        "a device such as nvidia.com/gpu belongs in limits",
    ),
    "half a device": (
        {"frontend": {"resources": {"limits": {"nvidia.com/gpu": "500m"}}}},
        "devices such as nvidia.com/gpu are requested in whole numbers",
    ),
    "unknown resource": ({"worker": {"resources": {"limits": {"gpu": 1}}}}, "a resource is cpu, memory"),
    "label of a node": (
        {"worker": {"nodeSelector": {"a b": "c"}}},
        "the keys of nodeSelector are those of labels",
    ),
    "label's value": ({"worker": {"nodeSelector": {"a": "b c"}}}, "should match '^([A-Za-z0-9]"),
    "toleration of nothing": (
        {"worker": {"tolerations": [{}]}},
        "a toleration without a key is for every taint",
    ),
    "toleration with a value too many": (
        {"worker": {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}},
        "operator Exists takes no value",
    ),
    "toleration for a time": (
        {"worker": {"tolerations": [{"key": "a", "tolerationSeconds": 5, "effect": "NoSchedule"}]}},
        "tolerationSeconds needs effect NoExecute",
    ),
    "toleration's key": ({"worker": {"tolerations": [{"key": "a b"}]}}, "key is that of a taint"),
    "toleration's value": (
        {"worker": {"tolerations": [{"key": "a", "value": "b c"}]}},
        "value is that of a taint",
    ),
    "variable's name": ({"worker": {"env": [{"name": "1A"}]}}, "a variable's name is made of letters"),
    "variable from two places": (
        {
            "worker": {
                "env": [
                    {
                        "name": "A",
                        "valueFrom": {
                            "fieldRef": {"fieldPath": "metadata.name"},
                            "secretKeyRef": {"name": "a", "key": "b"},
                        },
                    }
                ]
            }
        },
        "valueFrom takes exactly one of configMapKeyRef, secretKeyRef and fieldRef",
    ),
    "variable from nowhere": (
        {"worker": {"env": [{"name": "A", "valueFrom": {}}]}},
        "valueFrom takes exactly one of configMapKeyRef, secretKeyRef and fieldRef",
    ),
    "variable with both": (
        {
            "worker": {
                "env": [{"name": "A", "value": "", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}]
            }
        },
        "a variable takes either value or valueFrom, not both",
    ),
    "field of a pod": (
        {"worker": {"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.phase"}}}]}},
        "fieldPath is one that Kubernetes offers",
    ),
    "name of a secret": (
        {"worker": {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "A_B", "key": "b"}}}]}},
        "name is that of an object",
    ),
    "key in a secret": (
        {"worker": {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b/c"}}}]}},
        "key is made of letters, digits and -_.",
    ),
    "variable twice": ({"worker": {"env": [{"name": "A"}, {"name": "A"}]}}, 'Duplicate value: {"name":"A"}'),
    "replicas together with scaling": (
        {"replicas": 2, "scaling": {"maxReplicas": 4}},
        "replicas and scaling exclude each other: remove replicas, or set scaling.mode to Advisory or Off",
    ),
    "the field of replicas together with scaling": (
        {"replicas": 2, "scaling": {"maxReplicas": 4}},
        "spec.replicas: Invalid value",
    ),
    "scaling without a limit": ({"scaling": {}}, "spec.scaling.maxReplicas: Required value"),
    "bounds crossed": (
        {"scaling": {"minReplicas": 3, "maxReplicas": 2}},
        "minReplicas must not be above maxReplicas",
    ),
    "no replica ever": ({"scaling": {"maxReplicas": 0}}, "maxReplicas is a number from 1 to 1000"),
    "latency zero": (
        {"scaling": {"maxReplicas": 2, "latencyTargetMilliseconds": 0}},
        "latencyTargetMilliseconds is a number of milliseconds from 1 to 10000",
    ),
    "throughput zero": (
        {"scaling": {"maxReplicas": 2, "priorThroughput": "0"}},
        "priorThroughput is a quantity of requests per second above 0",
    ),
    "deprecated latency zero": (
        {"scaling": {"maxReplicas": 2, "latencyTargetSeconds": 0}},
        "latencyTargetSeconds is a number of seconds above 0, up to 10",
    ),
    "prior negative": (
        {"scaling": {"maxReplicas": 2, "priorRequestsPerSecond": -1}},
        "priorRequestsPerSecond is a number above 0",
    ),
    "limit step": (
        {"scaling": {"maxReplicas": 2, "gpuLimit": "1250m"}},
        "gpuLimit is a quantity of GPUs from 500m to 100k, in steps of 500m",
    ),
    "limit below the minimum": (
        {
            "scaling": {"minReplicas": 3, "maxReplicas": 4, "gpuLimit": 1},
            "worker": {"acceleratorPercentage": 50, "acceleratorResource": "nvidia.com/gpu.shared"},
        },
        "scaling.gpuLimit does not allow scaling.minReplicas",
    ),
    "deprecated budget step": (
        {"scaling": {"maxReplicas": 2, "gpuBudget": 1.25}},
        "gpuBudget is a number of GPUs of 0.5 or more, in steps of 0.5",
    ),
    "deprecated budget below the minimum": (
        {
            "scaling": {"minReplicas": 2, "maxReplicas": 4, "gpuBudget": 1},
            "worker": {"acceleratorFraction": 1},
        },
        "scaling.gpuLimit does not allow scaling.minReplicas",
    ),
    "loss": ({"quality": {"maxLoss": "101"}}, "maxLoss is a quantity of bits per byte from 0 to 100"),
    "no loss": ({"quality": {}}, "maxLoss is required"),
    "hold": ({"scaling": {"maxReplicas": 2, "holdSeconds": 0}}, "holdSeconds is a number of seconds from 1"),
    "mode": ({"scaling": {"maxReplicas": 2, "mode": "On"}}, 'supported values: "Auto", "Advisory", "Off"'),
    "percentage": ({"worker": {"acceleratorPercentage": 25}}, "acceleratorPercentage is 50 or 100"),
    "deprecated fraction": ({"worker": {"acceleratorFraction": 0.25}}, "acceleratorFraction is 0.5 or 1"),
    "half of what": ({"worker": {"acceleratorPercentage": 50}}, "50 needs acceleratorResource"),
    "deprecated half of what": ({"worker": {"acceleratorFraction": 0.5}}, "50 needs acceleratorResource"),
    "resource alone": (
        {"worker": {"acceleratorResource": "nvidia.com/gpu.shared"}},
        "acceleratorResource has no effect without acceleratorPercentage",
    ),
    "gpu twice": (
        {"worker": {"acceleratorPercentage": 100, "resources": {"limits": {"nvidia.com/gpu": 1}}}},
        "acceleratorPercentage requests the GPU: remove it from resources.limits",
    ),
    "less mass than an engine takes": (
        {"engine": {"routing": {"mass": "100u"}}},
        "mass is a quantity from 1m to 1",
    ),
    "learning in a pipeline": (
        {"engine": {"routing": {"learning": "Online"}}, "parallelism": {"pipeline": 2}},
        "engine.routing.learning Online is for replicas of one worker",
    ),
    "learning of several that share experts": (
        {"engine": {"routing": {"learning": "Online"}}, "parallelism": {"expert": 2}},
        "engine.routing.learning Online is for replicas of one worker",
    ),
    "learning on a GPU": (
        {"engine": {"routing": {"learning": "Online"}}, "worker": {"acceleratorPercentage": 100}},
        "engine.routing.learning Online is for workers on CPUs: set engine.device to cpu",
    ),
    "learning on a limit of GPUs": (
        {
            "engine": {"routing": {"learning": "Online"}},
            "worker": {"resources": {"limits": {"nvidia.com/gpu": 1}}},
        },
        "engine.routing.learning Online is for workers on CPUs",
    ),
    "learning by CUDA": (
        {"engine": {"routing": {"learning": "Online"}, "device": "cuda"}},
        "engine.routing.learning Online is for workers on CPUs",
    ),
    "halves of a pipeline": (
        {
            "worker": {"acceleratorPercentage": 50, "acceleratorResource": "nvidia.com/gpu.shared"},
            "parallelism": {"pipeline": 2},
        },
        "acceleratorPercentage 50 is for replicas of one worker: set parallelism.pipeline",
    ),
    "a rollout that cannot": (
        {"rollout": {"maxSurge": 0, "maxUnavailable": 0}},
        "maxSurge and maxUnavailable must not both be 0",
    ),
    "surge": ({"rollout": {"maxSurge": -1}}, "maxSurge is a number from 0 to 1000"),
    "unavailable": ({"rollout": {"maxUnavailable": 1001}}, "maxUnavailable is a number from 0 to 1000"),
    "partition": ({"rollout": {"partition": -1}}, "partition is a number from 0 to 1000"),
    "deadline": (
        {"rollout": {"progressDeadlineSeconds": 0}},
        "progressDeadlineSeconds is a number from 1 to 604800",
    ),
    "tenant weight": ({"frontend": {"tenants": [{"name": "a", "weight": 0}]}}, "weight is a number from 1"),
    "tenant rate": (
        {"frontend": {"defaultTenant": {"requestsPerMinute": 0}}},
        "requestsPerMinute is a number from 1",
    ),
    "tenant priority": (
        {"frontend": {"tenants": [{"name": "a", "priority": 10}]}},
        "priority is a number from 0 to 9",
    ),
    "tenant twice": ({"frontend": {"tenants": [{"name": "a"}, {"name": "a"}]}}, "Duplicate value"),
    "tenant name": ({"frontend": {"tenants": [{"name": "a b"}]}}, "should match"),
    "history": ({"revisionHistoryLimit": 101}, "revisionHistoryLimit is a number from 0 to 100"),
    "endpoint": (
        {"telemetry": {"otlpEndpoint": "otel:4317"}},
        "otlpEndpoint is http:// or https://, a host and a port",
    ),
}


@pytest.fixture(scope="module")
def server(api_server):
    return Api(api_server)


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_manifest_is_refused_at_apply_with_a_sentence(server, case):
    """By the request that kubectl makes, without its process: that takes half a second of a core."""
    spec, sentence = REFUSED[case]
    strict = f"{COLLECTION}?fieldValidation=Strict&dryRun=All"
    code, answer = server.ask("POST", strict, manifest(**spec))
    assert code in (400, 422)
    assert sentence in answer["message"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("docs.v1", "lower-case letters, digits and - only"),
        ("d" * 41, "metadata.name has 40 characters at most"),
    ],
)
def test_a_name_that_services_cannot_have_is_refused(crd, name, sentence):
    with pytest.raises(CommandError, match=sentence):
        crd.apply(manifest(name))


def test_defaults_are_written_into_the_object(crd):
    crd.apply({**manifest(), "spec": {"model": {"uri": "file:///mnt/models/docs-moe"}}})
    spec = crd.get("moed", "docs")["spec"]
    assert spec["replicas"] == 1
    assert spec["parallelism"] == {
        "pipeline": 1, "expert": 1, "redundantExperts": 0, "schedulingDeadlineSeconds": 300,
        "restartBudget": 10,
    }  # fmt: skip
    assert spec["engine"] == {
        "dtype": "auto", "device": "auto", "format": "auto", "kvDtype": "auto", "generationConfig": "None",
        "verification": "Weights", "routing": {"learning": "Off"},
    }  # fmt: skip
    assert spec["worker"]["image"] == "ghcr.io/moe-operator/worker:dev"
    assert spec["frontend"]["replicas"] == 1


def test_defaults_of_scaling_are_written_into_the_object(crd):
    crd.apply(manifest(scaling={"maxReplicas": 4}))
    assert crd.get("moed", "docs")["spec"]["scaling"] == {
        "mode": "Auto",
        "minReplicas": 1,
        "maxReplicas": 4,
        "holdSeconds": 600,
    }


@pytest.mark.parametrize(
    "spec",
    [
        {"worker": {"resources": {"limits": {"cpu": 2, "example.org/nic": 1}}}},
        {"engine": {"device": "cpu"}, "worker": {"acceleratorPercentage": 100}},
    ],
)
def test_workers_on_cpus_learn(crd, spec):
    engine = {**spec.get("engine", {}), "routing": {"learning": "Online"}}
    crd.apply(manifest(**{**spec, "engine": engine}))
    assert crd.get("moed", "docs")["spec"]["engine"]["routing"]["learning"] == "Online"


@pytest.mark.parametrize("mode", ["Advisory", "Off"])
def test_replicas_may_stand_next_to_scaling_that_does_not_set_them(crd, mode):
    crd.apply(manifest(replicas=3, scaling={"mode": mode, "maxReplicas": 4}))
    crd.kubectl("scale", "moed/docs", "--replicas=2")
    assert crd.get("moed", "docs")["spec"]["replicas"] == 2
    with pytest.raises(CommandError, match="replicas and scaling exclude each other"):
        crd.patch("moed", "docs", {"spec": {"scaling": {"mode": "Auto"}}})


def test_kubectl_scale_is_refused_where_scaling_decides(crd):
    crd.apply(manifest(scaling={"maxReplicas": 4}))
    with pytest.raises(CommandError, match="replicas and scaling exclude each other"):
        crd.kubectl("scale", "moed/docs", "--replicas=2")


def test_half_a_gpu_is_taken(crd):
    worker = {"acceleratorPercentage": 50, "acceleratorResource": "nvidia.com/mig-3g.40gb"}
    scaling, engine = {"maxReplicas": 4, "gpuLimit": "1500m"}, {"kvOffload": "8Gi"}
    crd.apply(manifest(worker=worker, scaling=scaling, engine=engine))
    found = parse(crd.get("moed", "docs")).spec
    assert (found.worker.gpus, found.scaling.gpus_most) == (0.5, 1.5)
    assert found.engine.kv_offload_bytes == 8 * 2**30


def test_everything_that_can_be_set_is_taken_and_kept(crd):
    pod = {
        "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"nvidia.com/gpu": 1}},
        "nodeSelector": {"zone": "a"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "env": [{"name": "HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}}],
        "image": "example.org/image:1",
        "terminationGracePeriodSeconds": 5,
    }
    limits = {
        "weight": 2,
        "requestsPerMinute": 60,
        "tokensPerMinute": 10_000,
        "concurrency": 8,
        "priority": 3,
    }
    spec = {
        "model": {"uri": "file:///mnt/models/docs-moe/", "servedName": "docs/one"},
        "replicas": 0,
        "parallelism": {
            "pipeline": 2,
            "expert": 4,
            "redundantExperts": 8,
            "rebalance": {"mode": "On", "interval": "10m", "threshold": "1.1"},
            "topology": {"key": "example.org/rack", "policy": "Required", "exclusive": True},
            "schedulingDeadlineSeconds": 60,
            "restartBudget": 3,
        },
        "engine": {
            "contextLength": 512,
            "maxBatchSize": 2,
            "kvMemory": 104857600,
            "dtype": "float32",
            "device": "cpu",
            "format": "w4a8",
            "kvDtype": "bfloat16",
            "generationConfig": "Auto",
            "verification": "Digests",
            "configOverride": '{"max_position_embeddings": 512}',
            "routing": {"mass": "0.8", "margin": "20m", "learning": "Off"},
        },
        "worker": pod,
        "frontend": {
            **pod,
            "replicas": 2,
            "routing": "PrefixAffinity",
            "service": {"type": "NodePort", "annotations": {"example.org/a": "b"}},
            "tls": {"secretName": "front-tls"},
            "auth": {
                "apiKeysSecret": "front-keys",
                "jwt": {
                    "issuer": "https://idp.example",
                    "audience": "moe",
                    "jwksUri": "https://idp.example/.well-known/jwks.json?v=1",
                    "tenantClaim": "team",
                },
            },
            "auditLog": "Requests",
            "tenants": [{"name": "team-a", **limits}],
            "defaultTenant": {**limits, "weight": 1},
        },
        "networkPolicy": {"mode": "Restricted"},
        "transport": {"mode": "MutualTLS"},
        "cache": {"outputs": {"mode": "Deterministic", "memory": "64Mi", "ttl": "30m"}},
        "telemetry": {"otlpEndpoint": "http://otel.moe-system:4317"},
        "rollout": {
            "maxSurge": 0,
            "maxUnavailable": 2,
            "partition": 1,
            "paused": True,
            "progressDeadlineSeconds": 900,
        },
        "revisionHistoryLimit": 3,
    }
    crd.apply(manifest(**spec))
    assert crd.get("moed", "docs")["spec"] == spec


def test_deprecated_fields_are_accepted_and_kept(crd):
    scaling = {"maxReplicas": 2, "latencyTargetSeconds": 0.5, "priorRequestsPerSecond": 1.5}
    crd.apply(manifest(scaling=scaling, rollout={"pause": True}))
    found = parse(crd.get("moed", "docs")).spec
    assert found.rollout.is_paused
    assert (found.scaling.latency_target_s, found.scaling.assumed_throughput) == (0.5, 1.5)


def test_the_spec_explains_itself(api):
    said = " ".join(api.kubectl("explain", "moedeployment.spec.engine").split())
    assert "contextLength <integer> Maximum number of tokens of prompt and continuation together." in said
    one = " ".join(api.kubectl("explain", "moedeployment.spec.engine.kvMemory").split())
    assert "a quantity such as 512Mi or 40Gi, or a number of bytes; 1Mi to 1Pi." in one
    assert "otherwise 512Mi." in one


def test_the_columns_and_the_short_name(crd):
    crd.apply(manifest(replicas=3))
    status = json.dumps({"status": {"desiredReplicas": 3}})
    crd.kubectl("patch", "moed", "docs", "--subresource=status", "--type=merge", "-p", status)
    header, row = crd.kubectl("get", "moed").splitlines()
    assert header.split() == ["NAME", "READY", "DESIRED", "AVAILABLE", "UPDATED", "REASON", "ROLLOUT", "AGE"]
    assert row[header.index("DESIRED") :].split()[0] == "3", "whether or not an operator acts here"


def scale(crd):
    path = f"/apis/serving.moe-operator.dev/v1alpha1/namespaces/{crd.namespace}/moedeployments/docs/scale"
    return json.loads(crd.kubectl("get", "--raw", path))["spec"]["replicas"]


@pytest.mark.parametrize("spec", [{}, {"scaling": {"maxReplicas": 4}}], ids=["fixed", "scaled"])
def test_scale_is_a_subresource_also_where_nobody_wrote_replicas(crd, spec):
    crd.apply(manifest(**spec))
    assert scale(crd) == 1


def test_a_horizontal_pod_autoscaler_adopts_it(crd):
    crd.apply(manifest())
    crd.kubectl("autoscale", "moed/docs", "--min=2", "--max=4", "--cpu=50%")
    eventually(lambda: scale(crd), lambda replicas: replicas == 2, "what it brings replicas to")


def test_scale_can_be_set(crd):
    crd.apply(manifest())
    crd.kubectl("scale", "moed/docs", "--replicas=4")
    assert scale(crd) == 4


def decided(crd, replicas):
    status = json.dumps({"status": {"desiredReplicas": replicas, "scaling": {"desiredReplicas": replicas}}})
    crd.kubectl("patch", "moed", "docs", "--subresource=status", "--type=merge", "-p", status)


def test_where_scaling_decides_only_what_it_decided_may_be_set(crd):
    crd.apply(manifest(scaling={"maxReplicas": 8}))
    decided(crd, 5)
    with pytest.raises(CommandError, match="scaling decides; to set replicas"):
        crd.kubectl("scale", "moed/docs", "--replicas=4")
    crd.kubectl("scale", "moed/docs", "--replicas=5")
    decided(crd, 6)
    crd.apply(manifest(scaling={"maxReplicas": 8}))  # a manifest without replicas does not change them
    assert scale(crd) == 5
    crd.patch("moed", "docs", {"spec": {"scaling": {"mode": "Off"}}})
    assert scale(crd) == 5
    crd.patch("moed", "docs", {"spec": {"scaling": {"mode": "Auto"}}})
    crd.patch("moed", "docs", {"spec": {"replicas": None}})
    assert scale(crd) == 1


def test_before_it_decided_only_the_number_that_there_is_may_be_set(crd):
    crd.apply(manifest(replicas=3))
    status = json.dumps({"status": {"desiredReplicas": 3}})
    crd.kubectl("patch", "moed", "docs", "--subresource=status", "--type=merge", "-p", status)
    crd.patch("moed", "docs", {"spec": {"replicas": None, "scaling": {"maxReplicas": 8}}})
    assert scale(crd) == 1
    with pytest.raises(CommandError, match="scaling decides; to set replicas"):
        crd.kubectl("scale", "moed/docs", "--replicas=4")
    stale = crd.get("moed", "docs")["metadata"]["resourceVersion"]
    crd.kubectl("scale", "moed/docs", "--replicas=3", f"--resource-version={stale}")
    crd.patch("moed", "docs", {"spec": {"scaling": {"mode": "Off"}}})
    assert scale(crd) == 3
    with pytest.raises(CommandError, match="resource"):
        crd.kubectl("scale", "moed/docs", "--replicas=2", f"--resource-version={stale}")


def test_scaling_takes_over_from_replicas(crd):
    crd.apply(manifest(replicas=3))
    status = json.dumps({"status": {"desiredReplicas": 3}})
    crd.kubectl("patch", "moed", "docs", "--subresource=status", "--type=merge", "-p", status)
    crd.patch("moed", "docs", {"spec": {"scaling": {"maxReplicas": 8}}})
    assert scale(crd) == 3

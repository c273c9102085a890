"""Objects that were made with earlier CRDs go on under the present one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from moe_operator.resources import names
from moe_operator.resources.deployment import parse
from moe_operator.resources.deprecated import advice
from moe_operator.resources.status import DEPRECATED_FIELDS
from tests.frontend.apiserver import running_api_server
from tests.operator.by_hand import COLLECTION, CRDS, Api, reconciled_to_true_conditions
from tests.operator.live import ROOT, eventually

PREVIOUS = Path(__file__).parent / "previous"
pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")

FIRST = {
    "plain": {"model": {"uri": "file:///mnt/models/docs-moe"}},
    "two": {
        "model": {"uri": "file:///mnt/models/docs-moe", "servedName": "docs"},
        "replicas": 2,
        "engine": {"contextLength": 512, "kvMemory": "1Gi"},
        "worker": {"resources": {"limits": {"nvidia.com/gpu": 1}}, "env": [{"name": "A", "value": "1"}]},
        "telemetry": {"otlpEndpoint": "http://otel:4317"},
    },
    # Today's rules refuse this one. It is there all the same, and its status has to be written.
    "never-worked": {
        "model": {"uri": "file:///mnt/models/docs-moe"},
        "worker": {"resources": {"requests": {"cpu": 2}, "limits": {"cpu": 1}}},
    },
}
WITH_FLOATS = {
    "floats": {
        "model": {"uri": "file:///mnt/models/docs-moe"},
        "quality": {"maxBitsPerByteIncrease": 0.005},
        "worker": {"acceleratorFraction": 0.5, "acceleratorResource": "nvidia.com/gpu.shared"},
        "scaling": {
            "maxReplicas": 4,
            "gpuBudget": 1.5,
            "latencyTargetSeconds": 0.25,
            "priorRequestsPerSecond": 1.5,
        },
        "rollout": {"pause": True},
    },
}
ADVICE = (
    "spec.rollout.pause is deprecated; replace it with spec.rollout.paused: true",
    "spec.scaling.latencyTargetSeconds is deprecated; "
    "replace it with spec.scaling.latencyTargetMilliseconds: 250",
    "spec.scaling.priorRequestsPerSecond is deprecated; replace it with spec.scaling.priorThroughput: 1500m",
    "spec.scaling.gpuBudget is deprecated; replace it with spec.scaling.gpuLimit: 1500m",
    "spec.worker.acceleratorFraction is deprecated; replace it with spec.worker.acceleratorPercentage: 50",
    "spec.quality.maxBitsPerByteIncrease is deprecated; replace it with spec.quality.maxLoss: 5m",
)
PRESENT = {
    "model": {"uri": "file:///mnt/models/docs-moe"},
    "quality": {"maxLoss": "5m"},
    "worker": {"acceleratorPercentage": 50, "acceleratorResource": "nvidia.com/gpu.shared"},
    "scaling": {
        "maxReplicas": 4,
        "gpuLimit": "1500m",
        "latencyTargetMilliseconds": 250,
        "priorThroughput": "1500m",
    },
    "rollout": {"paused": True},
}


@pytest.fixture
def api(tmp_path):
    with running_api_server(tmp_path) as server:
        yield Api(server)


HALF_OF_A_GPU = "worker.acceleratorPercentage 50 is for replicas of one worker"


def edited(api, name, **spec):
    """The API server's answer to a merge patch: "" or what it refuses."""
    code, answer = api.ask("PATCH", f"{COLLECTION}/{name}?fieldValidation=Strict", {"spec": spec})
    return "" if code == 200 else answer["message"]


def says(now, before):
    """Whether all previous fields are unchanged; there may be new ones."""
    if isinstance(before, dict):
        return all(field in now and says(now[field], value) for field, value in before.items())
    return now == before


def made(api, objects):
    """Creates the objects; returns their specs as the API server stores them."""
    specs = {}
    for name, spec in objects.items():
        body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": spec}
        code, stored = api.ask("POST", COLLECTION, body)
        assert code == 201, stored["message"]
        specs[name] = stored["spec"]
    return specs


def upgraded(api, crd, refused):
    """Replaces the CRD and waits until the API server enforces it, which a manifest that it refuses shows."""
    path = f"{CRDS}/{crd['metadata']['name']}"
    crd["metadata"]["resourceVersion"] = api.ask("GET", path)[1]["metadata"]["resourceVersion"]
    assert api.ask("PUT", path, crd)[0] == 200
    wrong = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": "n"}, "spec": refused}
    dry_run = f"{COLLECTION}?dryRun=All&fieldValidation=Strict"
    eventually(lambda: api.ask("POST", dry_run, wrong)[0] >= 400, bool, "new rules")


def test_objects_of_earlier_crds_are_read_reconciled_and_keep_what_they_say(api):
    first = yaml.safe_load((PREVIOUS / "moedeployments_first.yaml").read_text())
    assert api.ask("POST", CRDS, first)[0] == 201
    eventually(lambda: api.ask("GET", COLLECTION)[0], lambda code: code == 200, "the first CRD is served")
    specs = made(api, FIRST)
    upgraded(
        api, yaml.safe_load((PREVIOUS / "moedeployments_with_floats.yaml").read_text()), FIRST["never-worked"]
    )
    specs |= made(api, WITH_FLOATS)
    present = yaml.safe_load((ROOT / "crds/moedeployments.yaml").read_text())
    upgraded(api, present, {**PRESENT, "scaling": {"maxReplicas": 4, "gpuLimit": "1250m"}})

    for name, before in specs.items():
        body = api.cluster.get(names.KIND, "default", name)
        assert says(body["spec"], before)
        assert parse(body).name == name
        assert reconciled_to_true_conditions(api, name) == (name == "never-worked")
        used = api.condition(name, DEPRECATED_FIELDS).get("message", "")
        assert used == ("; ".join(ADVICE) if name == "floats" else "")

    assert specs["two"]["parallelism"]["expert"] == {"size": 1}, "as earlier versions stored it"
    assert edited(api, "two", engine={"maxBatchSize": 4}) == "", "what it says there is no obstacle"
    assert not reconciled_to_true_conditions(api, "two")
    assert "must be of type integer" in edited(api, "two", parallelism={"expert": {"size": 2}})
    assert edited(api, "two", parallelism={"expert": 2, "redundantExperts": 2}) == ""
    assert not reconciled_to_true_conditions(api, "two")
    assert "redundantExperts needs workers" in edited(api, "two", parallelism={"expert": 1})
    assert edited(api, "floats", engine={"maxBatchSize": 4}) == "", "CEL does not read {size: 1}"
    assert edited(api, "floats", parallelism={"expert": 2}) == ""
    assert reconciled_to_true_conditions(api, "floats"), "refused by the operator"
    assert HALF_OF_A_GPU in api.condition("floats", "Progressing")["message"]
    assert edited(api, "floats", parallelism={"expert": 1}) == ""
    assert not reconciled_to_true_conditions(api, "floats")

    made(api, {"advised": PRESENT})
    old, new = (parse(api.cluster.get(names.KIND, "default", name)).spec for name in ("floats", "advised"))
    assert meaning(new) == meaning(old)
    assert not list(advice(new))
    api.ask("PATCH", f"{COLLECTION}/floats", {"spec": without_deprecated(specs["floats"])})
    api.reconcile_or_raise("floats")
    assert api.condition("floats", DEPRECATED_FIELDS) == {}


def meaning(spec):
    """What the operator makes of a spec that old and new fields state."""
    return (
        spec.rollout.is_paused,
        spec.scaling.latency_target_s,
        spec.scaling.assumed_throughput,
        spec.scaling.gpus_most,
        spec.worker.gpus,
        spec.worker.accelerators,
        spec.quality.loss_most,
    )


def without_deprecated(spec):
    """A merge patch that replaces what a spec says with what the present names say."""
    removed = {section: dict.fromkeys(fields) for section, fields in spec.items() if isinstance(fields, dict)}
    return {section: {**removed.get(section, {}), **fields} for section, fields in PRESENT.items()}

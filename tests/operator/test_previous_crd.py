"""Objects that were made with the previous CRD go on under the present one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from moe_operator.resources import names
from moe_operator.resources.deployment import parse
from tests.frontend.apiserver import running_api_server
from tests.operator.by_hand import COLLECTION, CRDS, Api, reconciled_to_true_conditions
from tests.operator.live import ROOT, eventually

PREVIOUS = Path(__file__).parent / "previous/moedeployments.yaml"
pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")

OBJECTS = {
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


@pytest.fixture
def api(tmp_path):
    with running_api_server(tmp_path) as server:
        yield Api(server)


def says(now, before):
    """Whether all previous fields are unchanged; there may be new ones."""
    if isinstance(before, dict):
        return all(field in now and says(now[field], value) for field, value in before.items())
    return now == before


def test_objects_of_the_previous_crd_are_read_reconciled_and_keep_what_they_say(api):
    previous = yaml.safe_load(PREVIOUS.read_text())
    assert api.ask("POST", CRDS, previous)[0] == 201
    eventually(lambda: api.ask("GET", COLLECTION)[0], lambda code: code == 200, "the previous CRD is served")
    specs = {}
    for name, spec in OBJECTS.items():
        body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": spec}
        code, made = api.ask("POST", COLLECTION, body)
        assert code == 201, made
        specs[name] = made["spec"]

    path = f"{CRDS}/{previous['metadata']['name']}"
    present = yaml.safe_load((ROOT / "crds/moedeployments.yaml").read_text())
    present["metadata"]["resourceVersion"] = api.ask("GET", path)[1]["metadata"]["resourceVersion"]
    assert api.ask("PUT", path, present)[0] == 200
    nonsense = {"model": {"uri": "file:///tmp"}}
    wrong = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": "n"}, "spec": nonsense}
    eventually(lambda: api.ask("POST", f"{COLLECTION}?dryRun=All", wrong)[0], lambda c: c == 422, "new rules")

    for name, before in specs.items():
        body = api.cluster.get(names.KIND, "default", name)
        assert says(body["spec"], before)
        assert parse(body).name == name
        assert reconciled_to_true_conditions(api, name) == (name == "never-worked")

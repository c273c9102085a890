"""An operator that lacks a right says so, and goes on when it gets it. The API server is real."""

from __future__ import annotations

import pytest
import yaml

from tests.frontend.apiserver import LESS_ACCESS
from tests.operator.by_hand import COLLECTION, Api
from tests.operator.live import ROOT, eventually, manifest
from tests.operator.outside import Operator, kubeconfig

pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
RBAC = "/apis/rbac.authorization.k8s.io/v1"
NAME = "righted"


def rules():
    """Of the ClusterRole that is installed."""
    installed = yaml.safe_load_all((ROOT / "charts/install.yaml").read_text())
    return next(one["rules"] for one in installed if one["kind"] == "ClusterRole")


def without(resource, verb):
    return [
        {**rule, "verbs": [one for one in rule["verbs"] if one != verb]}
        if resource in rule["resources"]
        else rule
        for rule in rules()
    ]


@pytest.fixture
def api(api_server):
    made = Api(api_server)
    yield made
    made.clear(NAME)
    for kind in ("clusterrolebindings", "clusterroles"):
        made.ask("DELETE", f"{RBAC}/{kind}/less")


@pytest.fixture
def operator(api, api_server, tmp_path):
    """The operator's process, which may not list PodDisruptionBudgets."""
    base = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "less"}}
    role = {**base, "kind": "ClusterRole", "rules": without("poddisruptionbudgets", "list")}
    group = {"apiGroup": "rbac.authorization.k8s.io"}
    binding = {
        **base,
        "kind": "ClusterRoleBinding",
        "roleRef": {**group, "kind": "ClusterRole", "name": "less"},
        "subjects": [{**group, "kind": "User", "name": "somebody"}],
    }
    assert api.ask("POST", f"{RBAC}/clusterroles", role)[0] == 201
    assert api.ask("POST", f"{RBAC}/clusterrolebindings", binding)[0] == 201
    config = kubeconfig(api_server.directory, api_server.port, LESS_ACCESS)
    process = Operator(tmp_path, config, ROOT)
    yield process
    process.kill()


def test_a_missing_right_to_list_is_said_and_heals_when_it_comes(api, operator, tmp_path):
    assert api.ask("POST", COLLECTION, manifest(NAME, replicas=1))[0] == 201
    said = eventually(
        lambda: api.condition(NAME, "Progressing"), lambda one: one.get("reason") == "ReadForbidden", "said"
    )
    assert 'cannot list resource "poddisruptionbudgets"' in said["message"]
    assert said["message"].endswith("grant the right to the operator's ServiceAccount")
    log = (tmp_path / "operator.log").read_text()
    assert "watch PodDisruptionBudget failed (ReadForbiddenError: reading /apis" in log
    assert api.ask("PATCH", f"{RBAC}/clusterroles/less", {"rules": rules()})[0] == 200
    eventually(lambda: api.cluster.list("StatefulSet", "default", NAME), bool, "a replica", 60)
    eventually(
        lambda: api.condition(NAME, "Progressing"), lambda one: one["reason"] != "ReadForbidden", "healed"
    )
    assert operator.process.poll() is None

"""An operator that serves some namespaces, with Roles and no ClusterRole. The API server is real."""

from __future__ import annotations

import pytest
import yaml

from tests.frontend.apiserver import LESS_ACCESS
from tests.operator.by_hand import COLLECTION, Api
from tests.operator.live import ROOT, eventually, manifest
from tests.operator.outside import Operator, kubeconfig
from tests.operator.test_generated import rendered

pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
SPACES = ("watched", "seen")
RBAC = "rbac.authorization.k8s.io"


def objects(*values):
    return [one for one in yaml.safe_load_all(rendered(*values).stdout) if one]


def test_the_chart_gives_roles_in_the_namespaces_and_none_in_the_cluster():
    found = objects("watchNamespaces={watched,seen}")
    kinds = {one["kind"] for one in found}
    assert not {"ClusterRole", "ClusterRoleBinding"} & kinds
    roles = [one for one in found if one["kind"] == "Role"]
    assert [one["metadata"]["namespace"] for one in roles] == list(SPACES)
    (deployment,) = (one for one in found if one["kind"] == "Deployment")
    variables = deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "MOE_OPERATOR_WATCH_NAMESPACES", "value": "watched,seen"} in variables
    (everywhere,) = (one for one in objects() if one["kind"] == "ClusterRole")
    rest = [rule for rule in everywhere["rules"] if rule["resources"] != ["nodes"]]
    local = [
        {**rule, "resources": [name.replace("kopfpeer", "clusterkopfpeer") for name in rule["resources"]]}
        for rule in roles[0]["rules"]
    ]
    assert local == rest


@pytest.fixture
def operator(api_server, tmp_path):
    """The operator's process, with the rights that the chart gives it in two namespaces."""
    api = Api(api_server)
    for space in SPACES:
        assert api.ask("POST", "/api/v1/namespaces", {"metadata": {"name": space}})[0] == 201
    subject = {"apiGroup": RBAC, "kind": "User", "name": "somebody"}
    for one in objects("watchNamespaces={watched,seen}"):
        if one["kind"] in ("Role", "RoleBinding"):
            body = {**one, **({"subjects": [subject]} if "Binding" in one["kind"] else {})}
            path = f"/apis/{RBAC}/v1/namespaces/{one['metadata']['namespace']}/{one['kind'].lower()}s"
            assert api.ask("POST", path, body)[0] == 201
    config = kubeconfig(api_server.directory, api_server.port, LESS_ACCESS)
    settings = {"watch_namespaces": ",".join(SPACES), "model_roots": "/mnt/models"}
    process = Operator(tmp_path, config, ROOT, **settings)
    yield process
    process.kill()
    api.clear("watch")


def test_it_serves_its_namespaces_and_no_other(api_server, operator, tmp_path):
    api = Api(api_server)
    for space in (*SPACES, "default"):
        path = COLLECTION.replace("/default/", f"/{space}/")
        assert api.ask("POST", path, manifest("watch"))[0] == 201
    for space in SPACES:
        eventually(
            lambda at=space: api.cluster.list("StatefulSet", at, "watch"), bool, f"a replica in {space}", 60
        )
    assert api.cluster.list("StatefulSet", "default", "watch") == []
    sets = "/apis/apps/v1/namespaces/seen/statefulsets/watch-0"
    api.ask("PATCH", sets, {"spec": {"replicas": 0}})
    eventually(
        lambda: api.ask("GET", sets)[1]["spec"]["replicas"], lambda count: count == 1, "drift corrected"
    )
    peering = api.ask("GET", "/apis/kopf.dev/v1/namespaces/watched/kopfpeerings/moe-operator")[1]
    assert len(peering["status"]) == 1
    assert "cannot list" not in (tmp_path / "operator.log").read_text()

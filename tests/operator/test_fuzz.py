"""Manifests at random against a real API server: refused with a sentence, or reconciled to true conditions.

`MOE_FUZZ=10000` sets how many; `make soak` runs so many. The reconcile runs in this process, without
controllers: what it makes stays as it was made.
"""

from __future__ import annotations

import json
import os
import urllib.parse
from datetime import UTC, datetime

import pytest
import urllib3
import yaml
from hypothesis import HealthCheck, given, settings

from moe_operator.errors import RetryableError
from moe_operator.handlers.queue import Name
from moe_operator.handlers.reconcile import Reconciler
from moe_operator.kube import peering
from moe_operator.kube.client import Cluster
from moe_operator.manifests import children
from moe_operator.resources import names
from moe_operator.resources.deployment import parse
from moe_operator.settings import Settings
from tests.frontend.apiserver import ACCESS, running_api_server
from tests.operator import manifests_at_random
from tests.operator.live import ROOT, eventually

EXAMPLES = int(os.environ.get("MOE_FUZZ", "200"))
COLLECTION = f"/apis/{names.API_VERSION}/namespaces/default/{names.PLURAL}"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Unverified HTTPS request"),
    pytest.mark.timeout(120 + EXAMPLES),
]


class Api:
    """The API server, and an operator that is called when the test wants it."""

    def __init__(self, server):
        self._server = server
        self._pool = urllib3.PoolManager(cert_reqs="CERT_NONE")
        self.cluster = Cluster(server.client(), timeout_seconds=30)
        rank = peering.Rank(self.cluster, "moe-operator", 1)
        self._reconciler = Reconciler(self.cluster, Settings(), rank, lambda: datetime.now(UTC))
        self.writes = 0
        for method in ("apply", "create", "delete"):
            self._count(method)

    def _count(self, method):
        work = getattr(self.cluster, method)

        def counted(*arguments, **options):
            self.writes += 1
            return work(*arguments, **options)

        setattr(self.cluster, method, counted)

    def ask(self, method, path, body=None):
        headers = {"Authorization": f"Bearer {ACCESS}", "Content-Type": "application/json"}
        url = f"https://127.0.0.1:{self._server.port}{path}"
        answer = self._pool.request(method, url, body=json.dumps(body), headers=headers)
        known = answer.headers.get("Content-Type", "").startswith("application/json")
        return answer.status, json.loads(answer.data) if known else {"message": answer.data.decode()}

    def reconcile(self, name):
        """Writes that one reconcile made, and whether it wants to try again."""
        before, again = self.writes, False
        try:
            self._reconciler.reconcile(Name("default", name))
        except RetryableError:
            again = True
        return self.writes - before, again

    def clear(self, name):
        """Deletes a deployment and, for want of a garbage collector, what belongs to it."""
        for kind in children.KINDS:
            for child in self.cluster.list(kind, "default", name):
                self.cluster.delete(kind, "default", child["metadata"]["name"], child["metadata"]["uid"])
        self.ask("DELETE", f"{COLLECTION}/{name}")


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    with running_api_server(tmp_path_factory.mktemp("fuzz")) as server:
        made = Api(server)
        for path in (ROOT / "crds").glob("*.yaml"):
            for body in yaml.safe_load_all(path.read_text()):
                code, answer = made.ask(
                    "POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", body
                )
                assert code == 201, answer
        eventually(lambda: made.ask("GET", COLLECTION)[0], lambda code: code == 200, "the CRD is served")
        yield made


def refused_with_a_sentence(code, answer):
    """Whether it was refused; if so, the user is told which field and why."""
    if code in (200, 201):
        return False
    message = answer.get("message", "")
    assert code in (400, 422), message
    assert any(word in message for word in ("spec", "metadata", "name", "json", "unknown field")), message
    return True


def reconciled_to_true_conditions(api, name):
    """What it says of itself is so, and it comes to rest."""
    for _ in range(3):
        writes, again = api.reconcile(name)
    body = api.cluster.get(names.KIND, "default", name)
    conditions = {c["type"]: c for c in body["status"]["conditions"]}
    assert {c["observedGeneration"] for c in conditions.values()} == {body["metadata"]["generation"]}
    assert all(c["reason"] and c["message"] for c in conditions.values())
    ready, progressing = conditions["Ready"], conditions["Progressing"]
    assert ready["status"] == "False", "nothing runs here"
    if progressing["reason"] == "InvalidSpec":
        pytest.fail(f"the CRD took what the operator cannot read: {progressing['message']}")
    if progressing["reason"] == "ApplyRefused":
        assert ready["reason"] == "ApplyRefused"
        assert "refused" in progressing["message"] or "forbids" in progressing["message"]
        return "refused later"
    assert (writes, again) == (0, False), "it does not come to rest"
    for child in children.expected(parse(body)):
        assert api.cluster.get(child.kind, "default", child.name) is not None, child
    return "reconciled"


def small(spec):
    """Few enough objects that a thousand such deployments can be tried; the rest of the spec stays."""
    many = spec.get("replicas")
    return {**spec, "replicas": 3} if isinstance(many, int) and 3 < many <= 1000 else spec


outcomes = dict.fromkeys(("refused", "reconciled", "refused later"), 0)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="MOE_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(manifests_at_random.names, manifests_at_random.specs, manifests_at_random.specs)
def test_any_manifest_is_refused_with_a_sentence_or_reconciled_to_true_conditions(api, name, spec, edited):
    body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}}
    strict = "fieldValidation=Strict"
    if refused_with_a_sentence(*api.ask("POST", f"{COLLECTION}?{strict}", {**body, "spec": small(spec)})):
        outcomes["refused"] += 1
        return
    try:
        outcomes[reconciled_to_true_conditions(api, name)] += 1
        path = f"{COLLECTION}/{urllib.parse.quote(name)}?{strict}"
        version = api.cluster.get(names.KIND, "default", name)["metadata"]["resourceVersion"]
        changed = {**body, "metadata": {"name": name, "resourceVersion": version}, "spec": small(edited)}
        if not refused_with_a_sentence(*api.ask("PUT", path, changed)):
            outcomes[reconciled_to_true_conditions(api, name)] += 1
    finally:
        api.clear(name)


def test_the_manifests_were_not_all_of_one_kind():
    """Had all been refused, or none, the test above would show little."""
    print(outcomes)
    assert min(outcomes["refused"], outcomes["reconciled"]) >= EXAMPLES / 10
    assert outcomes["refused later"] <= sum(outcomes.values()) / 20, outcomes

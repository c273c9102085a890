"""An operator that dies between any two writes, and others who write at the same time.

The API server is real; the reconcile runs in this process, without a cache, so that a new one knows nothing
of what the one before it did.
"""

from __future__ import annotations

import json
import re

import pytest

from moe_operator.render import children
from moe_operator.render.objects import key
from moe_operator.resources import names
from tests.operator.by_hand import COLLECTION, Api, Killed

NAME = "docs"
pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")


@pytest.fixture(scope="module")
def api(api_server):
    return Api(api_server)


@pytest.fixture
def docs(api):
    """Nothing yet, and nothing afterwards."""
    yield api
    api.clear(NAME)


def write(api, **spec):
    """Makes the deployment, or changes its spec."""
    spec = {"model": {"uri": "file:///mnt/models/docs-moe"}, **spec}
    body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": NAME}, "spec": spec}
    before = api.cluster.get(names.KIND, "default", NAME)
    if before is None:
        assert api.ask("POST", COLLECTION, body)[0] == 201
    else:
        body["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"]
        assert api.ask("PUT", f"{COLLECTION}/{NAME}", body)[0] == 200


def rest(api):
    """Reconciles until nothing is left to do; returns how many writes that took."""
    writes = 0
    for _ in range(10):
        made, again = api.reconcile(NAME)
        writes += made
        if (made, again) == (0, False):
            return writes
    raise AssertionError("it does not come to rest")


def found(api):
    """What there is, without what differs between any two runs: which free ranks the replicas took, too."""
    objects = {}
    for kind in children.KINDS:
        for manifest in api.cluster.list(kind, "default", NAME):
            labels = manifest["metadata"]["labels"]
            content = {field: manifest[field] for field in ("spec", "rules", "data") if field in manifest}
            content.get("spec", {}).pop("clusterIP", None)
            content.get("spec", {}).pop("clusterIPs", None)
            objects[str(key(manifest))] = (labels, content)
    status = api.cluster.get(names.KIND, "default", NAME)["status"]
    conditions = [(c["type"], c["status"], c["reason"], c["message"]) for c in status.pop("conditions")]
    seen = objects, conditions, {name: value for name, value in status.items() if name != "rollout"}
    text = json.dumps(seen)
    for number, rank in enumerate(sorted(set(re.findall(rf"StatefulSet {NAME}-(\d+)", text)), key=int)):
        text = re.sub(rf"\b{NAME}-{rank}\b", f"{NAME}-#{number}", text)
        text = text.replace(f'"{names.LABEL_DATA_RANK}": "{rank}"', f'"{names.LABEL_DATA_RANK}": "#{number}"')
    return json.loads(text)


CHANGES = {
    "made": (None, {"replicas": 2}),
    "scaled up": ({"replicas": 1}, {"replicas": 3}),
    "scaled down": ({"replicas": 3}, {"replicas": 1}),
    "rolled out": ({"replicas": 1}, {"replicas": 1, "engine": {"maxBatchSize": 3}}),
    "frontend": ({"replicas": 1}, {"replicas": 1, "frontend": {"replicas": 3}}),
}


@pytest.mark.parametrize(
    "change",
    [pytest.param(change, marks=() if change == "rolled out" else pytest.mark.slow) for change in CHANGES],
)
def test_an_operator_that_dies_after_any_write_is_made_up_for_by_the_next_one(docs, change):
    before, after = CHANGES[change]

    def prepare():
        docs.clear(NAME)
        if before is not None:
            write(docs, **before)
            rest(docs)
        write(docs, **after)

    prepare()
    steps = rest(docs)
    expected = found(docs)
    assert steps >= 3
    for step in range(1, steps + 1):
        prepare()
        with pytest.raises(Killed):
            docs.reconcile_until(NAME, step)
        assert rest(docs) <= steps - step + 2, f"killed after write {step}: things were done twice"
        assert found(docs) == expected, f"killed after write {step}"


def replaced(api, kind, name):
    """Somebody deletes an object of ours and makes one of that name."""
    ours = api.cluster.get(kind, "default", name)
    api.cluster.delete(kind, "default", name, ours["metadata"]["uid"])
    account = {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": "default"}}
    assert api.ask("POST", "/api/v1/namespaces/default/serviceaccounts", account)[0] == 201


def test_an_object_that_was_replaced_since_it_was_read_is_not_written_to(docs):
    write(docs, replicas=0)
    rest(docs)
    account = f"{NAME}-worker"
    docs.ask("PATCH", f"/api/v1/namespaces/default/serviceaccounts/{account}", {"metadata": {"labels": None}})
    docs.before_next_write(lambda: replaced(docs, "ServiceAccount", account))
    _, again = docs.reconcile(NAME)
    assert again, "the write that was late is no success"
    rest(docs)
    theirs = docs.cluster.read("ServiceAccount", "default", account)
    assert "ownerReferences" not in theirs["metadata"]
    conditions = docs.cluster.get(names.KIND, "default", NAME)["status"]["conditions"]
    ready = next(c for c in conditions if c["type"] == "Ready")
    assert (ready["reason"], account in ready["message"]) == ("NameConflict", True)
    docs.ask("DELETE", f"/api/v1/namespaces/default/serviceaccounts/{account}")


def test_a_deployment_that_was_made_anew_meanwhile_gets_objects_of_its_own(docs):
    write(docs, replicas=1)

    def anew():
        docs.ask("DELETE", f"{COLLECTION}/{NAME}")
        write(docs, replicas=2)

    docs.before_next_write(anew)
    docs.reconcile(NAME)
    docs.collect_garbage(NAME)
    rest(docs)
    uid = docs.cluster.get(names.KIND, "default", NAME)["metadata"]["uid"]
    sets = docs.cluster.list("StatefulSet", "default", NAME)
    assert [one["metadata"]["ownerReferences"][0]["uid"] for one in sets] == [uid, uid]


def test_an_edit_during_a_reconcile_is_not_reported_as_seen(docs):
    write(docs, replicas=1)
    rest(docs)
    write(docs, replicas=1, frontend={"replicas": 2})
    docs.before_next_write(lambda: write(docs, replicas=1, frontend={"replicas": 3}))
    docs.reconcile(NAME)
    body = docs.cluster.get(names.KIND, "default", NAME)
    assert body["status"]["observedGeneration"] < body["metadata"]["generation"]
    rest(docs)
    frontend = docs.cluster.get("Deployment", "default", f"{NAME}-frontend")
    assert frontend["spec"]["replicas"] == 3

"""What an admission policy makes of our objects is left alone; what somebody changed by hand is not."""

from __future__ import annotations

import pytest

from moe_operator.observed.ownership import owned
from moe_operator.planner.drift import first_difference
from moe_operator.resources import names
from tests.operator.by_hand import COLLECTION, Api
from tests.operator.live import eventually

pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")

ADMISSION = "/apis/admissionregistration.k8s.io/v1"
DEPLOYMENTS = "/apis/apps/v1/namespaces/default/deployments"
FRONTEND = f"{DEPLOYMENTS}/rewritten-frontend"
WORKER = "/apis/apps/v1/namespaces/default/statefulsets/rewritten-0"
SET = (
    'JSONPatch{op: "replace", path: "/spec/template/spec/containers/0/image", value: "mirror.example/x:1"},'
    'JSONPatch{op: "replace", path: "/spec/template/spec/terminationGracePeriodSeconds", value: 7}'
)
REMOVE = 'JSONPatch{op: "remove", path: "/spec/template/spec/enableServiceLinks"}'
REWRITES = f"[{SET}] + (has(object.spec.template.spec.enableServiceLinks) ? [{REMOVE}] : [])"
POLICY = {
    "kind": "MutatingAdmissionPolicy",
    "metadata": {"name": "rewrites"},
    "spec": {
        "failurePolicy": "Fail",
        "reinvocationPolicy": "Never",
        "matchConstraints": {
            "objectSelector": {"matchLabels": {names.LABEL_NAME: "rewritten"}},
            "resourceRules": [
                {
                    "apiGroups": ["apps"],
                    "apiVersions": ["v1"],
                    "operations": ["CREATE", "UPDATE"],
                    "resources": ["deployments", "statefulsets"],
                }
            ],
        },
        "mutations": [{"patchType": "JSONPatch", "jsonPatch": {"expression": REWRITES}}],
    },
}
BINDING = {
    "kind": "MutatingAdmissionPolicyBinding",
    "metadata": {"name": "rewrites"},
    "spec": {"policyName": "rewrites"},
}


def probe():
    labels = {names.LABEL_NAME: "rewritten"}
    pod = {"enableServiceLinks": False, "containers": [{"name": "x", "image": "y"}]}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "probe", "labels": labels},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


@pytest.fixture
def api(api_server):
    api = Api(api_server)
    for plural, body in (
        ("mutatingadmissionpolicies", POLICY),
        ("mutatingadmissionpolicybindings", BINDING),
    ):
        answer = api.ask(
            "POST", f"{ADMISSION}/{plural}", {"apiVersion": ADMISSION.removeprefix("/apis/"), **body}
        )
        assert answer[0] == 201, answer

    def grace():
        made = api.ask("POST", f"{DEPLOYMENTS}?dryRun=All", probe())[1]
        return made["spec"]["template"]["spec"].get("terminationGracePeriodSeconds")

    eventually(grace, lambda seconds: seconds == 7, "the policy acts")
    yield api
    for plural in ("mutatingadmissionpolicybindings", "mutatingadmissionpolicies"):
        api.ask("DELETE", f"{ADMISSION}/{plural}/rewrites")
    api.clear("rewritten")


def corrected(api):
    events = api.ask("GET", "/api/v1/namespaces/default/events")[1]["items"]
    found = [one for one in events if one["involvedObject"]["name"] == "rewritten"]
    return [one["message"] for one in found if one["reason"] == "DriftCorrected"]


def test_fields_that_a_policy_rewrites_are_no_drift_and_edits_by_hand_are(api):
    body = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": "rewritten"},
        "spec": {"model": {"uri": "file:///mnt/models/x"}},
    }
    assert api.ask("POST", COLLECTION, body)[0] == 201
    api.reconcile("rewritten")
    assert [api.reconcile("rewritten") for _ in range(3)] == [(0, False)] * 3
    pod = api.ask("GET", FRONTEND)[1]["spec"]["template"]["spec"]
    assert (pod["terminationGracePeriodSeconds"], "enableServiceLinks" in pod) == (7, False)
    assert corrected(api) == []

    assert api.ask("PATCH", FRONTEND, {"spec": {"replicas": 3}})[0] == 200
    api.reconcile("rewritten")
    assert api.ask("GET", FRONTEND)[1]["spec"]["replicas"] == 1
    assert corrected(api) == [
        "Deployment rewritten-frontend: spec.replicas was changed by another client; drift corrected"
    ]
    assert api.reconcile("rewritten") == (0, False)


RBAC = "/apis/rbac.authorization.k8s.io/v1/namespaces/default/rolebindings/rewritten-frontend"
ADDED = {
    "a Service's selector": (
        "/api/v1/namespaces/default/services/rewritten-workers",
        lambda it: it["spec"]["selector"],
        {"spec": {"selector": {"by": "hand"}}},
    ),
    "a label selector": (
        "/apis/policy/v1/namespaces/default/poddisruptionbudgets/rewritten-workers",
        lambda it: it["spec"]["selector"]["matchLabels"],
        {"spec": {"selector": {"matchLabels": {"by": "hand"}}}},
    ),
    "a node selector": (
        FRONTEND,
        lambda it: it["spec"]["template"]["spec"]["nodeSelector"],
        {"spec": {"template": {"spec": {"nodeSelector": {"by": "hand"}}}}},
    ),
    "the subjects of a RoleBinding": (
        RBAC,
        lambda it: {one["name"]: one["kind"] for one in it["subjects"]},
        {
            "subjects": [
                {"kind": "ServiceAccount", "name": "rewritten-frontend", "namespace": "default"},
                {"kind": "User", "name": "by-hand", "apiGroup": "rbac.authorization.k8s.io"},
            ]
        },
    ),
}
LEFT = {
    "annotations and labels": (
        FRONTEND,
        {"metadata": {"annotations": {"by": "hand"}, "labels": {"by": "hand"}}},
    ),
    "those of pods": (
        FRONTEND,
        {"spec": {"template": {"metadata": {"labels": {"by": "hand"}, "annotations": {"by": "hand"}}}}},
    ),
}


@pytest.fixture
def applied(api_server):
    api = Api(api_server)
    body = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": "rewritten"},
        "spec": {
            "model": {"uri": "file:///mnt/models/x"},
            "replicas": 2,
            "frontend": {"nodeSelector": {"zone": "a"}},
        },
    }
    assert api.ask("POST", COLLECTION, body)[0] == 201
    api.reconcile("rewritten")
    assert api.reconcile("rewritten") == (0, False)
    yield api
    api.clear("rewritten")


def test_what_is_added_by_hand_to_an_atomic_field_is_taken_out(applied):
    """And nothing is written once it is: server-side apply gives the field back."""
    for what, (path, field, patch) in ADDED.items():
        before = field(applied.ask("GET", path)[1])
        assert applied.ask("PATCH", path, patch)[0] == 200, what
        assert field(applied.ask("GET", path)[1]) != before, what
        applied.reconcile("rewritten")
        assert field(applied.ask("GET", path)[1]) == before, what
        assert applied.reconcile("rewritten") == (0, False), what


def by_hand(api, path, change):
    """What `kubectl edit` does."""
    found = api.ask("GET", path)[1]
    change(found["spec"])
    assert api.ask("PUT", path, found)[0] == 200


def first(spec):
    return spec["template"]["spec"]["containers"][0]


def other_probe(spec):
    first(spec)["livenessProbe"] = {"exec": {"command": ["true"]}}


def other_value(spec):
    variable = next(one for one in first(spec)["env"] if "valueFrom" in one)
    del variable["valueFrom"]
    variable["value"] = "by hand"


def other_volume(spec):
    volume = next(one for one in spec["template"]["spec"]["volumes"] if "hostPath" in one)
    del volume["hostPath"]
    volume["emptyDir"] = {}


def other_budget(spec):
    del spec["maxUnavailable"]
    spec["minAvailable"] = 1


@pytest.mark.parametrize("change", [other_probe, other_value, other_volume, other_budget])
def test_what_excludes_our_field_is_taken_out(applied, change):
    """Together they are invalid, and apply alone would leave it."""
    path = {other_budget: ADDED["a label selector"][0], other_volume: WORKER}.get(change, FRONTEND)
    before = applied.ask("GET", path)[1]["spec"]
    labels = {"metadata": {"annotations": {"by": "hand"}}}
    assert applied.ask("PATCH", path, labels)[0] == 200
    by_hand(applied, path, change)
    assert applied.ask("GET", path)[1]["spec"] != before
    applied.reconcile("rewritten")
    after = applied.ask("GET", path)[1]
    assert (after["spec"], after["metadata"]["annotations"]["by"]) == (before, "hand")
    assert applied.reconcile("rewritten") == (0, False)


def test_what_others_add_to_fields_that_are_shared_is_left(applied):
    for what, (path, patch) in LEFT.items():
        assert applied.ask("PATCH", path, patch)[0] == 200, what
        assert applied.reconcile("rewritten") == (0, False), what


def manifest(fields, **spec):
    entries = [
        {"manager": "moe-operator", "operation": "Apply", "subresource": "status", "fieldsV1": {"f:x": {}}},
        {"manager": "somebody", "operation": "Update", "fieldsV1": {"f:spec": {}}},
        {"manager": "moe-operator", "operation": "Apply", "fieldsV1": {"f:spec": fields}},
    ]
    return {"metadata": {"managedFields": entries}, "spec": spec}


ITEMS = {'k:{"name":"a"}': {".": {}, "f:name": {}, "f:image": {}}}


@pytest.mark.parametrize(
    ("fields", "desired", "actual", "found"),
    [
        ({"f:n": {}}, {"n": 1}, {"n": 2}, None),
        ({}, {"n": 1}, {"n": 2}, "spec.n"),
        ({"f:m": {}}, {"n": 1}, {"n": 2}, "spec.n"),
        ({"f:n": {}}, {"n": 1}, {}, None),
        ({"f:m": {}}, {"n": 1}, {}, "spec.n"),
        ({"f:c": ITEMS}, {"c": [{"name": "a", "image": "i"}]}, {"c": [{"name": "a", "image": "j"}]}, None),
        (
            {"f:c": {'k:{"name":"a"}': {"f:name": {}}}},
            {"c": [{"name": "a", "image": "i"}]},
            {"c": [{"name": "a", "image": "j"}]},
            "spec.c[a].image",
        ),
        ({"f:c": {}}, {"c": ["x"]}, {"c": ["x", "y"]}, None),
        ({"f:c": {'v:"x"': {}}}, {"c": ["x"]}, {"c": ["y"]}, None),
        ({"f:c": {'v:"z"': {}}}, {"c": ["x"]}, {"c": ["y"]}, "spec.c[0]"),
        ({"f:m": {}}, {"m": {"a": 1}}, {"m": {"a": 1, "b": 2}}, None),
        ({"f:m": {"f:a": {}}}, {"m": {"a": 1}}, {"m": {"a": 1, "b": 2}}, None),
        ({"f:n": {}}, {"m": {"a": 1}}, {"m": {"a": 1, "b": 2}}, "spec.m"),
        ({"f:n": {}}, {"m": {"a": 1}}, {"m": {"a": 1}}, None),
        ({"f:n": {}}, {"m": {"l": {"a": 1}}}, {"m": {"l": {"a": 1, "b": 2}}}, "spec.m.l"),
        ({"f:n": {}}, {"m": [{"name": "a"}]}, {"m": [{"name": "a"}, {"name": "b"}]}, "spec.m"),
        ({"f:m": {}}, {"m": [{"name": "a"}]}, {"m": [{"name": "a"}, {"name": "b"}]}, None),
    ],
)
def test_a_difference_counts_where_the_field_is_not_ours_any_more(fields, desired, actual, found):
    whole = manifest(fields or {"f:other": {}}, **actual)
    assert first_difference({"spec": desired}, whole, owned=owned(whole)) == found


def test_where_nobody_says_whose_fields_are_every_difference_counts():
    assert owned({"metadata": {}}) is None
    assert first_difference({"spec": {"n": 1}}, {"spec": {"n": 2}}) == "spec.n"

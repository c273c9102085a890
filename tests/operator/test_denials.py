"""What the API server and its admission refuse: said, kept from nothing else, and tried again.

The API server is real; the policies and the webhook are those that clusters have.
"""

from __future__ import annotations

import json
import socket
import ssl
import threading
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from kubernetes.dynamic.exceptions import DynamicApiError

from moe_operator.apiserver.answers import message, translated
from moe_operator.errors import (
    ApplyForbiddenError,
    ApplyRefusedError,
    ChangedMeanwhileError,
    ClusterUnavailableError,
    OwnerUnknownError,
    ReadForbiddenError,
    WebhookUnavailableError,
)
from moe_operator.resources import names as resource_names
from moe_operator.settings import Settings
from tests.operator.by_hand import COLLECTION, Api
from tests.operator.live import eventually, manifest
from tests.pki import Authority

pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
ADMISSION = "/apis/admissionregistration.k8s.io/v1"
RBAC = "/apis/rbac.authorization.k8s.io/v1/namespaces/default"
ROLES = {
    "apiGroups": ["rbac.authorization.k8s.io"],
    "apiVersions": ["v1"],
    "operations": ["CREATE", "UPDATE"],
    "resources": ["roles"],
}


@pytest.fixture
def api(api_server):
    made = Api(api_server)
    yield made
    for name in ("denied", "odd", "tight"):
        made.clear(name)
    for kind in ("validatingadmissionpolicybindings", "validatingadmissionpolicies"):
        made.ask("DELETE", f"{ADMISSION}/{kind}/no-roles")
    made.ask("DELETE", f"{ADMISSION}/validatingwebhookconfigurations/no-roles")


def make(api, name, **spec):
    assert api.ask("POST", COLLECTION, manifest(name, **spec))[0] == 201


def role(**metadata):
    body = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "rules": []}
    return {**body, "metadata": {"name": "probe", **metadata}}


def in_force(api, denied):
    """Waits until the API server denies Roles, or does not any more."""

    def code():
        return api.ask("POST", f"{RBAC}/roles?dryRun=All", role())[0]

    return eventually(code, lambda found: (found >= 400) is denied, "admission in force")


def policy(reason):
    spec = {
        "failurePolicy": "Fail",
        "matchConstraints": {"resourceRules": [ROLES]},
        "validations": [{"expression": "false", "message": "no Roles here", **reason}],
    }
    kind, binding = "ValidatingAdmissionPolicy", {"policyName": "no-roles", "validationActions": ["Deny"]}
    base = {"apiVersion": "admissionregistration.k8s.io/v1", "metadata": {"name": "no-roles"}}
    return {**base, "kind": kind, "spec": spec}, {**base, "kind": f"{kind}Binding", "spec": binding}


@pytest.fixture
def webhook():
    """A server that denies whatever it is asked about, with the code that it is told."""
    status = {"message": "the team's rules"}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            review["response"] = {"uid": review["request"]["uid"], "allowed": False, "status": status}
            body = json.dumps(review).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return SimpleNamespace(files=Authority().pair("127.0.0.1"), status=status, handler=Handler)


def configure(api, port, **client):
    """Has the API server ask a webhook at a port about Roles."""
    configured = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": "no-roles"},
        "webhooks": [
            {
                "name": "rules.example.org",
                "clientConfig": {"url": f"https://127.0.0.1:{port}/", **client},
                "rules": [ROLES],
                "sideEffects": "None",
                "admissionReviewVersions": ["v1"],
                "timeoutSeconds": 5,
            }
        ],
    }
    assert api.ask("POST", f"{ADMISSION}/validatingwebhookconfigurations", configured)[0] == 201


@pytest.fixture
def denying(api, webhook, tmp_path):
    file = tmp_path / "webhook.pem"
    file.write_bytes(webhook.files["tls.crt"] + webhook.files["tls.key"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    server = ThreadingHTTPServer(("127.0.0.1", 0), webhook.handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    authority = b64encode(webhook.files["ca.crt"]).decode()
    configure(api, server.server_port, caBundle=authority)
    in_force(api, denied=True)
    yield webhook.status
    api.ask("DELETE", f"{ADMISSION}/validatingwebhookconfigurations/no-roles")
    server.shutdown()
    thread.join()
    server.server_close()


def is_denied_and_goes_on(api, sentence, *, made=False):
    """A deployment whose Role is denied has everything else, says why, and is tried again."""
    if not made:
        make(api, "denied", replicas=1)
    with pytest.raises(ApplyForbiddenError, match=sentence):
        api.reconcile_or_raise("denied")
    for kind in ("Ready", "Progressing"):
        found = api.condition("denied", kind)
        assert (found["status"], found["reason"]) == ("False", "ApplyRefused")
        assert sentence in found["message"]
    assert [one["metadata"]["name"] for one in api.cluster.list("StatefulSet", "default", "denied")]
    assert api.cluster.list("Deployment", "default", "denied")
    # One refused shared object keeps no replica from leaving.
    api.ask("PATCH", f"{COLLECTION}/denied", {"spec": {"replicas": 0}})
    with pytest.raises(ApplyForbiddenError, match=sentence):
        api.reconcile_or_raise("denied")
    assert api.cluster.list("StatefulSet", "default", "denied") == []
    events = api.ask("GET", "/api/v1/namespaces/default/events")[1]["items"]
    told = [one["reason"] for one in events if one["involvedObject"]["name"] == "denied"]
    assert "ReplicaRemoved" in told


def heals_without_an_edit(api):
    in_force(api, denied=False)
    for _ in range(2):
        api.reconcile("denied")
    assert api.cluster.list("Role", "default", "denied")
    assert api.condition("denied", "Progressing")["reason"] != "ApplyRefused"


@pytest.mark.parametrize(
    "reason", [{}, {"reason": "Forbidden"}, {"reason": "RequestEntityTooLarge"}], ids=str
)
def test_a_policy_that_denies_with_any_code_is_said_and_heals(api, reason):
    made, bound = policy(reason)
    assert api.ask("POST", f"{ADMISSION}/validatingadmissionpolicies", made)[0] == 201
    assert api.ask("POST", f"{ADMISSION}/validatingadmissionpolicybindings", bound)[0] == 201
    in_force(api, denied=True)
    is_denied_and_goes_on(api, "denied request: no Roles here")
    api.ask("DELETE", f"{ADMISSION}/validatingadmissionpolicybindings/no-roles")
    heals_without_an_edit(api)


@pytest.mark.parametrize("code", [None, 403, 404, 409, 410, 422, 500])
def test_a_webhook_that_denies_with_any_code_is_said_and_heals(api, denying, code):
    if code is not None:
        denying["code"] = code
    is_denied_and_goes_on(api, "denied the request: the team's rules")
    api.ask("DELETE", f"{ADMISSION}/validatingwebhookconfigurations/no-roles")
    heals_without_an_edit(api)


def test_a_webhook_that_does_not_respond_is_said_unless_it_only_restarts(api, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        configure(api, closed.getsockname()[1])
        in_force(api, denied=True)
        make(api, "denied", replicas=1)
        with pytest.raises(WebhookUnavailableError):
            api.reconcile_or_raise("denied")
        assert api.condition("denied", "Progressing") == {}
        assert api.cluster.list("StatefulSet", "default", "denied")
        monkeypatch.setattr(WebhookUnavailableError, "brief_seconds", 0.0)
        is_denied_and_goes_on(api, "failed calling webhook", made=True)
        said = api.condition("denied", "Progressing")["message"]
        assert said.endswith("; repair the webhook, or set its failurePolicy to Ignore")
        api.ask("DELETE", f"{ADMISSION}/validatingwebhookconfigurations/no-roles")
    heals_without_an_edit(api)


def test_an_api_server_that_learns_of_the_crd_soon_is_waited_for(api, monkeypatch):
    """So what is applied right after the installation does not fail for whoever waits for it."""
    applying = api.cluster.apply

    def apply(manifest, **how):
        if manifest["kind"] != resource_names.KIND:
            raise OwnerUnknownError("a young CRD")
        applying(manifest, **how)

    api.cluster.apply = apply
    make(api, "denied", replicas=1)
    for brief, status, reason in ((40.0, "True", "Starting"), (0.0, "False", "ApplyRefused")):
        monkeypatch.setattr(OwnerUnknownError, "brief_seconds", brief)
        with pytest.raises(OwnerUnknownError):
            api.reconcile_or_raise("denied")
        found = api.condition("denied", "Progressing")
        assert (found["status"], found["reason"]) == (status, reason)
    api.cluster.apply = applying
    heals_without_an_edit(api)


def test_an_object_that_is_wrong_in_itself_is_reconciled_again_at_the_resync(api):
    make(api, "odd", replicas=1, worker={"resources": {"limits": {"hugepages-2Mi": "4Mi"}}})
    for _ in range(2):
        assert api.reconcile_or_raise("odd") == Settings().resync_seconds
    found = api.condition("odd", "Progressing")
    assert (found["reason"], "HugePages require cpu or memory" in found["message"]) == ("ApplyRefused", True)


def test_under_a_tight_quota_what_goes_makes_room_for_what_comes(api):
    """There are no controllers here: the quota's admission counts what is created, and the test what goes."""
    make(api, "tight", replicas=1)
    api.reconcile("tight")
    old = api.cluster.list("StatefulSet", "default", "tight")[0]["metadata"]
    quotas, count = "/api/v1/namespaces/default/resourcequotas", "count/statefulsets.apps"
    body = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "tight"}}
    used = {"status": {"hard": {count: "1"}, "used": {count: "1"}}}
    assert api.ask("POST", quotas, {**body, "spec": {"hard": {count: "1"}}})[0] == 201
    assert api.ask("PATCH", f"{quotas}/tight/status", used)[0] == 200
    deleting = api.cluster.delete

    def delete(kind, *which):
        deleting(kind, *which)
        used["status"]["used"][count] = "0"
        api.ask("PATCH", f"{quotas}/tight/status", used)

    api.cluster.delete = delete
    try:
        # It does not serve, so a new revision takes its place at once.
        api.ask("PATCH", f"{COLLECTION}/tight", {"spec": {"engine": {"maxBatchSize": 2}}})
        api.reconcile_or_raise("tight")
        (new,) = api.cluster.list("StatefulSet", "default", "tight")
        assert new["metadata"]["uid"] != old["uid"]
        assert api.condition("tight", "Progressing")["reason"] != "ApplyRefused"
    finally:
        api.ask("DELETE", f"{quotas}/tight")


def answer(code, text="", **status):
    """What a client gets of an answer with a Status, or with a plain text."""
    body = json.dumps({"kind": "Status", "code": code, **status}) if status else text
    return DynamicApiError(SimpleNamespace(status=code, reason="", body=body.encode(), headers={}))


WRONG = {"causes": [{"reason": "FieldValueInvalid", "field": "spec.template"}]}


@pytest.mark.parametrize(
    ("method", "error", "kind"),
    [
        ("get", answer(403, reason="Forbidden", message="pods is forbidden"), ReadForbiddenError),
        ("patch", answer(403, reason="Forbidden", message="exceeded quota"), ApplyForbiddenError),
        ("patch", answer(401, reason="Unauthorized", message="Unauthorized"), ClusterUnavailableError),
        ("patch", answer(408, "timeout"), ClusterUnavailableError),
        ("patch", answer(429, "slower"), ClusterUnavailableError),
        ("patch", answer(503, "<html>"), ClusterUnavailableError),
        ("patch", answer(404, reason="NotFound", message="m", details={"name": "n"}), ChangedMeanwhileError),
        (
            "patch",
            answer(404, reason="NotFound", message="no resource", details={}),
            ApplyForbiddenError,
        ),
        ("patch", answer(404, "404 page not found\n"), ApplyForbiddenError),
        ("patch", answer(422, reason="Invalid", message="m", details=WRONG), ApplyRefusedError),
        ("patch", answer(400, reason="BadRequest", message="strict decoding error"), ApplyRefusedError),
        ("patch", answer(422, reason="Invalid", message="m", details={"causes": [{}]}), ApplyForbiddenError),
        ("patch", answer(500, message="Internal error: failed calling webhook"), WebhookUnavailableError),
        ("patch", answer(413, reason="RequestEntityTooLarge", message="policy"), ApplyForbiddenError),
        ("patch", answer(422, "[]"), ApplyForbiddenError),
    ],
    ids=lambda value: value.status if isinstance(value, DynamicApiError) else "",
)
def test_answers_are_told_apart_by_what_they_say(method, error, kind):
    assert type(translated(error, method, "/path")) is kind


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ('pods "a" is forbidden: exceeded quota: small, requested: pods=1, used: pods=1', "raise the quota"),
        ('admission webhook "p.example.org" denied the request: no', "change the policy that denies it"),
        (
            "roles \"a\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no",
            "change the policy that denies it",
        ),
        (
            'deployments "a" is forbidden: User "system:serviceaccount:moe-system:moe-operator" cannot patch '
            'resource "deployments" in API group "apps" in the namespace "default"',
            "grant the right to the operator's ServiceAccount",
        ),
    ],
)
def test_a_refused_request_says_what_to_do(said, remedy):
    refused = translated(answer(403, reason="Forbidden", message=said), "patch", "/path")
    assert str(refused) == f"the API server forbids /path: {said}; {remedy}"
    unknown = translated(answer(403, reason="Forbidden", message="no"), "patch", "/path")
    assert str(unknown) == "the API server forbids /path: no"


def test_a_sentence_of_any_length_is_cut():
    assert len(message(answer(400, message="x" * 10**6).body)) < 2100

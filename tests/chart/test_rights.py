"""What the operator may do is what it does: granted rights against those that the audit log shows in use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from localcluster.errors import CommandError
from moe_operator.render import children
from moe_operator.render.objects import Manifest
from moe_operator.resources.deployment import parse
from tests.chart.conftest import NAMESPACE
from tests.operator import httproute_crd, inferencepool_crd
from tests.operator.live import Live, eventually, manifest

ACCOUNT = f"system:serviceaccount:{NAMESPACE}:moe-operator"
GROUP = "serving.moe-operator.dev"
Right = tuple[str, str, str]
"""API group, resource with its subresource, verb."""

# Rights to delete, without which the API server lets nobody adopt an orphan of the kind.
ASKED_FOR_ADOPTION: dict[Right, str] = {
    ("", "services", "delete"): "Service",
    ("", "serviceaccounts", "delete"): "ServiceAccount",
    ("apps", "deployments", "delete"): "Deployment",
    ("apps", "statefulsets", "delete"): "StatefulSet",
    ("policy", "poddisruptionbudgets", "delete"): "PodDisruptionBudget",
    ("rbac.authorization.k8s.io", "roles", "delete"): "Role",
    ("rbac.authorization.k8s.io", "rolebindings", "delete"): "RoleBinding",
}

# Rights that the API server looks for when the operator asks for something else; each is tried without below.
ASKED_OF_OTHERS: dict[Right, tuple[str, str]] = {
    (GROUP, "moedeployments/finalizers", "update"): ("ServiceAccount", "cannot set blockOwnerDeletion"),
    **{
        ("discovery.k8s.io", "endpointslices", verb): ("Role", "attempting to grant RBAC permissions")
        for verb in ("get", "list", "watch")
    },
    **{
        (GROUP, "frontendroutes", verb): ("Role", "attempting to grant RBAC permissions")
        for verb in ("create", "patch")
    },
}


def granted(role: dict[str, Any]) -> set[Right]:
    """The rights of a ClusterRole."""
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def used(request: dict[str, Any]) -> set[Right]:
    """The rights that a request needed. A server-side apply of something new needs `create` as well."""
    what = request["objectRef"]
    resource = "/".join(filter(None, (what["resource"], what.get("subresource"))))
    made = request["verb"] == "patch" and request["responseStatus"]["code"] == 201
    verbs = (request["verb"], *(["create"] if made else []))
    return {(what.get("apiGroup", ""), resource, verb) for verb in verbs}


def restricted(docs: Live) -> None:
    """A namespace that refuses worker pods, because their model lies on the node."""
    docs.cluster.kubectl("create", "namespace", "strict")
    docs.cluster.kubectl("label", "namespace", "strict", "pod-security.kubernetes.io/enforce=restricted")
    strict = Live(docs.cluster, "strict")
    strict.apply(manifest("refused"))
    condition = strict.wait("Ready", "PodRefused", "refused")
    assert condition["message"].startswith(
        "0/1 replicas ready; refused-0-0: the namespace's Pod Security level forbids the pod; relax it, "
    )
    assert "; the API server says: Create Pod refused-0-0 in StatefulSet" in condition["message"]
    assert 'violates PodSecurity "restricted:latest": restricted volume types' in condition["message"]
    strict.kubectl("label", "namespace", "strict", "pod-security.kubernetes.io/enforce-")
    strict.wait("Ready", "AllReplicasReady", "refused", seconds=120)
    strict.kubectl("delete", "moed", "refused")


class Requests:
    """What the operator asked of the API server so far, refused or not."""

    def __init__(self, log: Path) -> None:
        self._file = log.open("rb")
        self._part = b""
        self.used: set[Right] = set()
        self.refused: list[str] = []

    def read(self) -> Requests:
        """Reads what was logged since the last call; the log has tens of thousands of lines."""
        *lines, self._part = (self._part + self._file.read()).split(b"\n")
        for line in lines:
            if ACCOUNT.encode() in line:
                self._take(json.loads(line))
        return self

    def _take(self, event: dict[str, Any]) -> None:
        if event["user"].get("username") == ACCOUNT and event.get("objectRef", {}).get("resource"):
            self.used |= used(event)
            if event["responseStatus"]["code"] == 403:
                self.refused.append(event["requestURI"])


def role(docs: Live) -> dict[str, Any]:
    return docs.get("clusterrole", "moe-operator")


EXPOSED: dict[str, tuple[str, dict[str, Any]]] = {
    "inferencePool": ("inferencepools", {"endpointPicker": {"name": "picker"}}),
    "httpRoute": ("httproutes", {"parentRefs": [{"name": "public"}]}),
    "grpcRoute": ("grpcroutes", {"parentRefs": [{"name": "inside"}]}),
    "ingress": ("ingresses", {"hosts": ["models.example"]}),
}


def exposed(docs: Live) -> None:
    """Routes from outside and a pool for an inference gateway come and go; CRDs come after the operator."""
    for crd in (inferencepool_crd.CRD, httproute_crd.CRD, httproute_crd.GRPC_CRD):
        docs.cluster.kubectl("apply", "-f", "-", input=json.dumps(crd))
        docs.cluster.kubectl("wait", "--for=condition=Established", f"crd/{crd['metadata']['name']}")
    docs.patch(
        "moed", "docs", {"spec": {"frontend": {field: asked for field, (_, asked) in EXPOSED.items()}}}
    )
    for kind, _ in EXPOSED.values():
        eventually(lambda kind=kind: docs.list(kind), lambda found: len(found) == 1, f"{kind} made")
    docs.patch("moed", "docs", {"spec": {"frontend": dict.fromkeys(EXPOSED)}})
    for kind, _ in EXPOSED.values():
        eventually(lambda kind=kind: docs.list(kind), lambda found: found == [], f"{kind} deleted")


@pytest.mark.timeout(400)  # many steps, one after the other
def test_every_right_that_is_granted_is_used_and_no_other_is_asked_for(docs, helm):
    requests = Requests(docs.cluster.audit_log)
    requests.read().refused.clear()
    docs.kubectl("scale", "moed/docs", "--replicas=1")
    eventually(docs.leaders, lambda pods: len(pods) == 1, "scaled down")
    docs.patch("service", "docs-frontend", {"spec": {"selector": {f"{GROUP}/role": "other"}}})
    eventually(lambda: docs.events("DriftCorrected"), len, "drift corrected")
    docs.patch("moed", "docs", {"spec": {"networkPolicy": {"mode": "Restricted"}}})
    eventually(lambda: docs.list("networkpolicies"), lambda found: len(found) == 2, "policies made")
    docs.patch("moed", "docs", {"spec": {"networkPolicy": {"mode": "Off"}}})
    eventually(lambda: docs.list("networkpolicies"), lambda found: found == [], "policies deleted")
    exposed(docs)
    # Certificates are made, and renewed by the operator that the next step starts again.
    docs.apply(manifest("secure", replicas=0, transport={"mode": "MutualTLS"}))
    made = "app.kubernetes.io/name in (moe-internal-ca, moe-internal-worker, moe-internal-frontend)"
    eventually(lambda: docs.list("secrets", made), lambda found: len(found) == 3, "certificates")
    docs.patch("secret", "moe-internal-worker", {"data": {"ca.crt": None}})
    # What scaling learns is written in every round, instead of every five minutes.
    setting = ("--set", "env[0].name=MOE_OPERATOR_HISTORY_SECONDS", "--set-string", "env[0].value=1")
    helm.upgrade("--reuse-values", *setting)
    docs.patch("moed", "docs", {"spec": {"scaling": {"mode": "Advisory", "maxReplicas": 2}}})
    # A rollout that finds no room looks whether the new pod would fit in the place of an old one.
    elsewhere = {"worker": {"nodeSelector": {"nowhere": "at-all"}}, "rollout": {"maxUnavailable": 1}}
    docs.patch("moed", "docs", {"spec": elsewhere})
    docs.wait("Progressing", "Unschedulable")
    docs.patch("moed", "docs", {"spec": {"worker": {"nodeSelector": None}}})
    docs.patch("moed", "docs", {"spec": {"scaling": {"mode": "Auto", "minReplicas": 2}}})
    eventually(lambda: docs.get("moed", "docs")["spec"]["replicas"], lambda count: count == 2, "recorded")
    # A new revision, after which the record of the old one goes.
    docs.patch("moed", "docs", {"spec": {"revisionHistoryLimit": 0, "engine": {"maxBatchSize": 9}}})

    restricted(docs)
    # A replica of several workers has a secret.
    docs.apply(manifest("gang", parallelism={"pipeline": 2}))
    eventually(lambda: docs.list("statefulsets", f"{GROUP}/name=gang"), bool, "a gang")
    docs.kubectl("delete", "moed", "gang", "secure")
    wanted = granted(role(docs)) - set(ASKED_OF_OTHERS) - set(ASKED_FOR_ADOPTION)
    eventually(lambda: sorted(wanted - requests.read().used), lambda left: left == [], "every right used")
    assert sorted(requests.used - wanted - set(ASKED_FOR_ADOPTION)) == []
    assert requests.refused == []


@pytest.fixture
def less(docs: Live) -> Iterator[str]:
    """An account without rights."""
    docs.kubectl("create", "serviceaccount", "less")
    yield f"system:serviceaccount:{docs.namespace}:less"
    docs.kubectl("delete", "clusterrolebinding,clusterrole", "less")
    docs.kubectl("delete", "serviceaccount", "less")


@pytest.mark.parametrize("right", ASKED_OF_OTHERS, ids=lambda right: "-".join(right[1:]))
def test_rights_that_no_request_names_are_needed_all_the_same(docs, less, right):
    kind, refusal = ASKED_OF_OTHERS[right]
    child = next(m for m in children.shared(parse(docs.get("moed", "docs"))) if m["kind"] == kind)
    child["metadata"]["name"] = "other"
    may(docs, less, granted(role(docs)))
    try_to_make(docs, child, less)
    may(docs, less, granted(role(docs)) - {right})
    with pytest.raises(CommandError, match=refusal):
        try_to_make(docs, child, less)


def test_adoption_needs_the_right_to_delete_each_kind(docs, less):
    """With the admission plugin OwnerReferencesPermissionEnforcement, which the local cluster has."""
    deployment = parse(docs.get("moed", "docs"))
    made = {
        manifest["kind"]: manifest
        for manifest in (*children.shared(deployment), children.replica(deployment, 7))
    }
    wanted = {kind: orphan(docs, made[kind]) for kind in ASKED_FOR_ADOPTION.values()}
    may(docs, less, granted(role(docs)))
    for child in wanted.values():
        try_to_adopt(docs, child, less)
    may(docs, less, granted(role(docs)) - set(ASKED_FOR_ADOPTION))
    for child in wanted.values():
        with pytest.raises(CommandError, match="cannot set an ownerRef on a resource you can't delete"):
            try_to_adopt(docs, child, less)


def orphan(docs: Live, child: Manifest) -> Manifest:
    """Makes an object like a child, without an owner; returns what would adopt it."""
    metadata = {"name": "orphan", "namespace": docs.namespace}
    alone = {**child, "metadata": metadata}
    if child["kind"] in ("StatefulSet", "Deployment"):
        alone["spec"] = {**child["spec"], "replicas": 0}
    docs.kubectl("create", "-f", "-", input=json.dumps(alone))
    return {**alone, "metadata": {**metadata, "ownerReferences": child["metadata"]["ownerReferences"]}}


def try_to_adopt(docs: Live, child: Manifest, account: str) -> None:
    words = ("apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=false")
    docs.kubectl(*words, f"--as={account}", "-f", "-", input=json.dumps(child))


def may(docs: Live, account: str, rights: set[Right]) -> None:
    """Gives an account exactly these rights; returns when the API server knows."""
    name = account.rpartition(":")[2]
    rules = [{"apiGroups": [group], "resources": [what], "verbs": [verb]} for group, what, verb in rights]
    metadata, api = {"name": name}, "rbac.authorization.k8s.io"
    rule = {"apiVersion": f"{api}/v1", "kind": "ClusterRole", "metadata": metadata, "rules": rules}
    binding = {
        "apiVersion": f"{api}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": metadata,
        "roleRef": {"apiGroup": api, "kind": "ClusterRole", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": docs.namespace}],
    }
    docs.kubectl("apply", "-f", "-", input=yaml.safe_dump_all([rule, binding]))
    eventually(lambda: allowed(docs, account), lambda found: found == rights, "rights in force")


def allowed(docs: Live, account: str) -> set[Right]:
    """What the API server says an account may do, less what everybody may."""
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": docs.namespace},
    }
    answer = docs.kubectl(
        "create", "-o", "json", f"--as={account}", "--validate=false", "-f", "-", input=json.dumps(review)
    )
    rules = granted({"rules": json.loads(answer)["status"]["resourceRules"]})
    return {right for right in rules if not right[0].startswith(("authorization", "authentication"))}


def try_to_make(docs: Live, child: Manifest, account: str) -> None:
    docs.kubectl(
        "create",
        "--dry-run=server",
        f"--as={account}",
        "--validate=false",
        "-f",
        "-",
        input=json.dumps(child),
    )

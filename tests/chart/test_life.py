"""The chart's life with the real helm: install, upgrade, rollback, uninstall, install again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import urllib3
import yaml

from localcluster import images
from localcluster.errors import CommandError
from localcluster.forward import Forward
from localcluster.layout import Layout
from tests.chart.conftest import CHART, NAMESPACE, HelmError
from tests.operator.live import ROOT, Live, eventually, manifest

ROLE = "serving.moe-operator.dev/role"
CRDS = ("moedeployments.serving.moe-operator.dev", "clusterkopfpeerings.kopf.dev")


def workers(docs: Live) -> dict[str, str]:
    """UIDs of the deployment's pods, frontends too."""
    return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in docs.list("pods")}


def operator_variables(docs: Live) -> dict[str, str]:
    body = Live(docs.cluster, NAMESPACE).get("deployment", "moe-operator")
    env = body["spec"]["template"]["spec"]["containers"][0]["env"]
    return {item["name"]: item.get("value", "") for item in env}


def acts(docs: Live) -> None:
    """The operator answers a change: it takes back one made by hand."""
    docs.patch("service", "docs-workers", {"spec": {"selector": {ROLE: "other"}}})
    eventually(
        lambda: docs.get("service", "docs-workers")["spec"]["selector"][ROLE],
        lambda role: role == "worker",
        "drift corrected",
    )


def metrics(docs: Live) -> str:
    """What Prometheus would fetch through the Service."""
    with Forward(docs.cluster.directory, NAMESPACE, "moe-operator-metrics", "9464", 0) as opened:
        return urllib3.request("GET", f"http://{opened.address}/metrics").data.decode()


def test_install_says_what_to_do_next(installed):
    for step in (
        f"kubectl -n {NAMESPACE} rollout status deployment/moe-operator",
        "kubectl get moed -w",
        "kubectl port-forward service/docs-moe-frontend 8000",
        "helm uninstall leaves the CRDs, the MoEDeployments and all that they run in place",
    ):
        assert step in installed


def test_the_example_in_the_notes_is_taken(installed, audited):
    example = installed.partition("<<'EOF'\n")[2].partition("EOF\n")[0]
    assert "created" in audited.kubectl("apply", "--dry-run=server", "-f", "-", input=example)


def test_the_operator_runs_where_only_restricted_pods_are_admitted(installed, audited):
    namespace = Live(audited, NAMESPACE)
    eventually(
        lambda: [pod["status"]["phase"] for pod in namespace.list("pods", "app.kubernetes.io/name")],
        lambda phases: phases == ["Running"],
        "one pod runs",
    )
    # Had the namespace not enforced anything, this test would show nothing.
    with pytest.raises(CommandError, match="violates PodSecurity"):
        namespace.kubectl("run", "loose", "--image=busybox:latest")


def test_frontends_are_restricted_pods_and_workers_but_for_the_model_on_their_node(docs):
    restricted = Live(docs.cluster, NAMESPACE)

    def admitted(kind: str, name: str) -> str:
        spec = docs.get(kind, name)["spec"]["template"]["spec"] | {"serviceAccountName": "default"}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "tried"}, "spec": spec}
        return restricted.kubectl("create", "--dry-run=server", "-f", "-", input=json.dumps(pod))

    assert "created" in admitted("deployment", "docs-frontend")
    with pytest.raises(CommandError) as caught:
        admitted("statefulset", docs.list("statefulsets")[0]["metadata"]["name"])
    violations = str(caught.value).partition('"restricted:latest": ')[2]
    assert violations.startswith(
        'restricted volume types (volume "model" uses restricted volume type "hostPath")'
    )
    assert ", " not in violations


def test_upgrade_and_rollback_change_the_operator_and_restart_no_worker(docs, helm):
    before = workers(docs)
    variable = "env[0].name=MOE_OPERATOR_WORKERS,env[0].value=3"
    helm.upgrade("--set-string", variable, "--set", "networkPolicy.enabled=true,metrics.enabled=true")
    assert operator_variables(docs)["MOE_OPERATOR_WORKERS"] == "3"
    policy = Live(docs.cluster, NAMESPACE).get("networkpolicy", "moe-operator")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    acts(docs)
    assert workers(docs) == before
    told = metrics(docs)
    assert 'moe_operator_decisions_total{moe_operator_reason="DriftCorrected"' in told
    assert "moe_operator_reconcile_duration_seconds_count" in told

    helm("rollback", "moe-operator", "1", "--wait", "--timeout=120s")
    assert "MOE_OPERATOR_WORKERS" not in operator_variables(docs)
    assert Live(docs.cluster, NAMESPACE).kubectl("get", "networkpolicy", "-o", "name") == ""
    acts(docs)
    assert workers(docs) == before


@pytest.fixture
def later(docs: Live) -> str:
    """Image of an operator that renders every pod differently; the CRD has another default too."""
    image = "ghcr.io/moe-operator/operator:later"
    folders = (str(ROOT / "tests/chart/next"), str(ROOT / ".venv/bin"))
    images.load(Layout(docs.cluster.directory).images, images.Image(image, folders, user=65532))
    field = (
        "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/engine/properties/verification"
    )
    change = [{"op": "replace", "path": f"{field}/default", "value": "None"}]
    docs.kubectl("patch", "crd", CRDS[0], "--type=json", "-p", json.dumps(change))
    return image


@pytest.mark.slow
def test_an_operator_that_renders_other_pods_restarts_none_before_an_edit(docs, helm, later):
    def thresholds() -> dict[str, int]:
        pods = docs.leaders().items()
        return {n: pod["spec"]["containers"][0]["livenessProbe"]["failureThreshold"] for n, pod in pods}

    before, engine = workers(docs), docs.get("moed", "docs")["spec"]["engine"]
    helm.upgrade("--set", f"image={later}", "--force-conflicts")
    acts(docs)
    docs.kubectl("scale", "moed/docs", "--replicas=3")
    docs.settled()
    assert before.items() <= workers(docs).items()
    assert thresholds() == {"docs-0-0": 3, "docs-1-0": 3, "docs-2-0": 3}
    assert docs.get("moed", "docs")["spec"]["engine"] == engine

    docs.patch("moed", "docs", {"spec": {"replicas": 2, "engine": {"maxBatchSize": 8}}})
    eventually(thresholds, lambda found: set(found.values()) == {7}, "the newer rendering", 90)
    docs.settled()
    before = workers(docs)
    helm.upgrade("--set", "image=ghcr.io/moe-operator/operator:dev")
    acts(docs)
    assert workers(docs) == before


def test_upgrade_brings_new_fields_of_the_crd(docs, helm):
    """An older release's CRD stands for one that lacks a field."""
    path = '{"spec":{"versions":[{"name":"v1alpha1","served":true,"storage":true,"schema":%s}]}}'
    older = json.dumps({"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}})
    docs.kubectl("patch", "crd", CRDS[0], "--type=merge", "-p", path % older)
    helm.upgrade("--force-conflicts")
    with pytest.raises(CommandError, match="replicas is a number from 0 to 1000"):
        docs.apply(manifest("wrong", replicas=-1))


def test_uninstall_keeps_what_users_made_and_a_new_release_takes_it_over(docs, helm):
    before = workers(docs)
    said = helm("uninstall", "moe-operator", "--wait", "--timeout=120s")
    for name in CRDS:
        assert f"[CustomResourceDefinition] {name}" in said
    left = "all,roles,serviceaccounts"
    eventually(
        lambda: Live(docs.cluster, NAMESPACE).kubectl("get", left, "-o", "name").split(),
        lambda found: found == ["serviceaccount/default"],
        "nothing of the operator is left",
    )
    assert workers(docs) == before

    helm.install()
    acts(docs)
    assert workers(docs) == before


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("imge=x", "additional properties 'imge' not allowed"),
        ("imagePullPolicy=Sometimes", "value must be one of 'Always', 'IfNotPresent', 'Never'"),
        ("telemetry.otlpEndpoint=collector:4317", "does not match pattern"),
        ("networkPolicy.apiServerPorts[0]=0", "minimum: got 0, want 1"),
        ("env[0].name=A,env[0].value=3", "at '/env/0/value': got number, want string"),
        ("resources.limit.cpu=1", "additional properties 'limit' not allowed"),
    ],
)
def test_values_that_cannot_work_are_refused_before_anything_is_changed(helm, setting, sentence):
    with pytest.raises(HelmError) as caught:
        helm("template", str(CHART), "--set", setting)
    assert sentence in str(caught.value)


def test_the_schema_describes_every_value():
    def fields(schema: dict, path: str = "") -> set[str]:
        found = set()
        for name, inner in schema.get("properties", {}).items():
            assert inner.get("description", "").endswith("."), f"{path}{name} is not described"
            found |= {f"{path}{name}"} | fields(inner, f"{path}{name}.")
        return found

    def values(tree: dict, path: str = "") -> set[str]:
        inner = [values(value, f"{path}{name}.") for name, value in tree.items() if isinstance(value, dict)]
        return {f"{path}{name}" for name in tree}.union(*inner)

    read = lambda name: yaml.safe_load((Path(CHART) / name).read_text())  # noqa: E731
    described = fields(read("values.schema.json")) - {"global"}
    free = {
        name for name in values(read("values.yaml")) if name.startswith("resources.") and name.count(".") > 1
    }
    assert described == values(read("values.yaml")) - free

"""podTemplate of workers and frontends: what users add to pods, and what they cannot change."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moe_operator.errors import InvalidSpecError
from moe_operator.observed import pod_status, problems
from moe_operator.render import frontend, internal_tls, worker
from moe_operator.resources import names
from moe_operator.resources.deployment import parse
from tests.operator.by_hand import COLLECTION, Api
from tests.operator.live import manifest
from tests.operator.worlds import deployment, settled

TEAM = {"matchLabels": {"team": "search"}}
TMP = ["/tmp"]  # noqa: S108 - the pod's own
SHM = "/dev/shm"  # noqa: S108 - the pod's own
EVERYTHING: dict[str, Any] = {
    "metadata": {"labels": {"team": "search"}, "annotations": {"sidecar.istio.io/inject": "false"}},
    "spec": {
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "kubernetes.io/hostname", "labelSelector": TEAM}]}},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "a", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": TEAM}],
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "nodeSelector": {"pool": "gpu"},
        "imagePullSecrets": [{"name": "registry"}],
        "serviceAccountName": "models",
        "priorityClassName": "system-cluster-critical",
        "runtimeClassName": "nvidia",
        "schedulerName": "volcano",
        "resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "h100"}],
        "securityContext": {"runAsUser": 1000, "fsGroup": 2000},
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}],
        "containers": [
            {
                "name": "worker",
                "imagePullPolicy": "Always",
                "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
                "volumeMounts": [{"name": "shm", "mountPath": SHM}],
                "resources": {"claims": [{"name": "gpu"}]},
                "securityContext": {"capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]}},
            },
            {"name": "proxy", "image": "example.org/proxy:1", "ports": [{"containerPort": 9000}]},
        ],
        "initContainers": [{"name": "tune", "image": "busybox", "command": ["true"]}],
    },
}  # fmt: skip


def test_what_the_user_sets_is_merged_into_what_the_operator_renders():
    of = deployment(worker={"podTemplate": EVERYTHING, "tolerations": [{"key": "a", "operator": "Exists"}]})
    template, plain = worker.rendered(of), worker.rendered(deployment())
    spec, (serving, proxy) = template["spec"], template["spec"]["containers"]
    (before,) = plain["spec"]["containers"]
    for name in (
        "affinity",
        "topologySpreadConstraints",
        "resourceClaims",
        "schedulerName",
        "imagePullSecrets",
    ):
        assert spec[name] == EVERYTHING["spec"][name]
    assert [one["key"] for one in spec["tolerations"]] == ["a", "nvidia.com/gpu"]
    assert spec["securityContext"] == {**plain["spec"]["securityContext"], "runAsUser": 1000, "fsGroup": 2000}
    assert [one["name"] for one in spec["volumes"]] == ["model", "tmp", "moe-internal", "shm"]
    assert [one["name"] for one in spec["initContainers"]] == ["tune"]
    for name in ("command", "image", "ports", "readinessProbe", "startupProbe", "livenessProbe"):
        assert serving[name] == before[name]
    assert [e["name"] for e in serving["env"]] == [*(e["name"] for e in before["env"]), "HF_TOKEN"]
    mounts = ["/mnt/models/docs-moe", *TMP, internal_tls.FOLDER, SHM]
    assert [m["mountPath"] for m in serving["volumeMounts"]] == mounts
    assert serving["resources"] == {"claims": [{"name": "gpu"}]}
    assert serving["securityContext"]["readOnlyRootFilesystem"] is True
    assert proxy == EVERYTHING["spec"]["containers"][1]
    labels = template["metadata"]["labels"]
    assert labels == {**plain["metadata"]["labels"], "team": "search"}
    assert names.single_labels("docs").items() <= labels.items()


def test_a_variable_of_the_user_replaces_that_of_the_operator_as_a_whole():
    env = [{"name": "OTEL_SERVICE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]
    template = {"spec": {"containers": [{"name": "frontend", "env": env}]}}
    (container,) = frontend.rendered(deployment(frontend={"podTemplate": template}))["spec"]["containers"]
    assert [e for e in container["env"] if e["name"] == "OTEL_SERVICE_NAME"] == env


def test_ports_are_told_apart_by_number_and_protocol_because_they_need_no_name():
    added = [{"containerPort": 9000}, {"containerPort": 9001}, {"containerPort": 9001, "protocol": "UDP"}]
    published = {"containerPort": names.METRICS_PORT, "protocol": "TCP", "hostPort": 30000}
    of = deployment(worker=template(containers=[{"name": "worker", "ports": [*added, published]}]))
    (container,) = worker.rendered(of)["spec"]["containers"]
    (before,) = worker.rendered(deployment())["spec"]["containers"]
    metrics = next(port for port in before["ports"] if port["name"] == names.METRICS_PORT_NAME)
    others = [port for port in before["ports"] if port != metrics]
    assert all(port in container["ports"] for port in [*others, metrics | published, *added])
    assert len(container["ports"]) == len(before["ports"]) + len(added)


@pytest.mark.parametrize("role", [worker, frontend])
def test_ports_keep_the_names_by_which_others_find_them(role):
    """Services name the port that they forward to, and the name says that it serves mutual TLS."""
    name = {worker: "worker", frontend: "frontend"}[role]
    (before,) = role.rendered(deployment())["spec"]["containers"]
    others = [{**port, "name": f"mine-{n}"} for n, port in enumerate(before["ports"])]
    of = deployment(**{name: template(containers=[{"name": name, "ports": others}])})
    (container,) = role.rendered(of)["spec"]["containers"]
    assert container["ports"] == before["ports"]


def test_a_deployment_without_a_template_is_written_as_before():
    assert "podTemplate" not in json.dumps(deployment().spec.manifest())


@pytest.mark.parametrize(
    "change",
    [{"spec": {"priorityClassName": "high"}}, {"metadata": {"labels": {"a": "b"}}},
     {"metadata": {"annotations": {"a": "b"}}}],
    ids=["spec", "label", "annotation"],
)  # fmt: skip
def test_a_change_of_the_template_is_a_new_revision(change):
    world = settled()
    before = world.revisions()
    world.change(worker={"podTemplate": change})
    world.step()
    assert set(world.revisions().values()) - set(before.values())


def test_a_change_of_the_frontends_template_replaces_no_worker():
    world = settled()
    before = world.revisions()
    world.change(frontend={"podTemplate": {"metadata": {"labels": {"a": "b"}}}})
    assert [manifest["kind"] for manifest in world.step().apply] == ["Deployment"]
    assert world.revisions() == before


def test_a_template_that_fits_no_annotation_is_refused():
    large = {"metadata": {"annotations": {"a": "x" * 33_000}}}
    body = {"metadata": {"namespace": "a", "name": "docs", "uid": "1"},
            "spec": {"model": {"uri": "file:///a"}, "worker": {"podTemplate": large}}}  # fmt: skip
    with pytest.raises(
        InvalidSpecError, match=r"podTemplate is too large: 330\d\d bytes as JSON of at most 32768"
    ):
        parse(body)


def test_a_sidecar_that_fails_gives_a_reason_that_kubernetes_takes():
    end = {"terminated": {"exitCode": 1, "message": "error: no licence"}}
    status = {"containerStatuses": [{"name": "my-proxy", "ready": False, "state": end}]}
    assert problems.of_pod(pod_status.read({"status": status})) == problems.Problem(
        "SidecarFailed", "no licence"
    )


@pytest.fixture(scope="module")
def api(api_server):
    return Api(api_server)


def refusal(api: Api, **spec: Any) -> str:
    code, answer = api.ask("POST", f"{COLLECTION}?fieldValidation=Strict&dryRun=All", manifest(**spec))
    return "" if code == 201 else answer["message"]


def template(**spec: Any) -> dict[str, Any]:
    return {"podTemplate": {"spec": spec}}


OWN: dict[str, tuple[dict[str, Any], str]] = {
    "command": (
        template(containers=[{"name": "worker", "command": ["sh"]}]),
        "podTemplate.spec.containers[worker].command is the operator's: remove it",
    ),
    "image": (
        template(containers=[{"name": "worker", "image": "a"}]),
        "podTemplate.spec.containers[worker].image is the operator's: set spec.worker.image",
    ),
    "probe": (
        template(containers=[{"name": "worker", "readinessProbe": {"grpc": {"port": 1}}}]),
        "podTemplate.spec.containers[worker].readinessProbe is the operator's",
    ),
    "limits": (
        template(containers=[{"name": "worker", "resources": {"limits": {"cpu": 1}}}]),
        "is the operator's: set spec.worker.resources",
    ),
    "grace": (
        template(terminationGracePeriodSeconds=5),
        "is the operator's: set spec.worker.terminationGracePeriodSeconds",
    ),
    "gates": (
        template(readinessGates=[{"conditionType": "a"}]),
        "podTemplate.spec.readinessGates is the operator's: remove it",
    ),
    "volume": (
        template(volumes=[{"name": "model", "emptyDir": {}}]),
        "the volumes model, model-cache, tmp, moe-tls, moe-api-keys, moe-jwks, moe-internal are the "
        "operator's",
    ),
    "label": (
        {"podTemplate": {"metadata": {"labels": {"serving.moe-operator.dev/role": "frontend"}}}},
        "serving.moe-operator.dev/... and kubectl.kubernetes.io/restartedAt are the operator's",
    ),
    "typo": (template(afinity={}), 'unknown field "spec.worker.podTemplate.spec.afinity"'),
    "deep typo": (
        template(containers=[{"name": "worker", "securityContext": {"runAsRoot": True}}]),
        'unknown field "spec.worker.podTemplate.spec.containers[0].securityContext.runAsRoot"',
    ),
    "type": (template(nodeSelector={"a": 1}), "must be of type string"),
}


@pytest.mark.parametrize("case", OWN)
def test_the_api_server_refuses_by_name_what_is_the_operators(api, case):
    settings, sentence = OWN[case]
    assert sentence in refusal(api, worker=settings)


def test_the_api_server_takes_the_rest_and_the_operator_comes_to_rest_on_it(api):
    """The defaults that Kubernetes adds to a user's fields are no drift."""
    assert refusal(api, worker={"podTemplate": EVERYTHING}) == ""
    service = {"type": "NodePort", "annotations": {"example.org/a": "b"}}
    front = {
        "service": service,
        "podTemplate": {"spec": {"hostAliases": [{"ip": "10.0.0.1", "hostnames": ["a"]}]}},
    }
    code, _ = api.ask("POST", COLLECTION, manifest(worker={"podTemplate": EVERYTHING}, frontend=front))
    assert code == 201
    api.reconcile("docs")
    assert api.reconcile("docs") == (0, False)
    pods = api.cluster.read("StatefulSet", "default", "docs-0")["spec"]["template"]["spec"]
    assert pods["schedulerName"] == "volcano"
    found = api.cluster.read("Service", "default", "docs-frontend")
    assert found["spec"]["type"] == "NodePort"
    assert found["metadata"]["annotations"]["example.org/a"] == "b"
    api.clear("docs")


def test_what_only_kubernetes_can_check_stops_the_rollout_with_its_sentence(api):
    wrong = {"podTemplate": {"spec": {"containers": [{"name": "proxy"}]}}}
    api.ask("POST", COLLECTION, manifest(worker=wrong))
    api.reconcile("docs")
    condition = api.condition("docs", "Progressing")
    assert condition["reason"] == "ApplyRefused"
    assert "spec.template.spec.containers[1].image: Required value" in condition["message"]
    api.clear("docs")


def test_a_load_balancer_class_needs_a_load_balancer(api):
    said = refusal(api, frontend={"service": {"loadBalancerClass": "example.org/lb"}})
    assert "set type to LoadBalancer" in said


def test_a_service_has_the_ip_families_that_the_spec_says(api):
    """The API server under test has IPv4 only."""
    families = {"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv4", "IPv6"]}
    assert refusal(api, frontend={"service": families}) == ""
    assert frontend.service(deployment(frontend={"service": families}))["spec"].items() >= families.items()
    one = {"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv4"]}
    service = frontend.service(deployment(frontend={"service": one}))
    path = "/api/v1/namespaces/default/services?fieldValidation=Strict&dryRun=All"
    service["metadata"] = {"name": "docs-frontend"}
    assert api.ask("POST", path, service)[0] == 201
    service = frontend.service(deployment(frontend={"service": {"ipFamilyPolicy": "RequireDualStack"}}))
    service["metadata"] = {"name": "docs-frontend"}
    assert "dual-stack" in api.ask("POST", path, service)[1]["message"]
    assert not frontend.service(deployment())["spec"].keys() & families.keys()
    for wrong in ({"ipFamilies": ["IPv6", "IPv4"]}, {**families, "ipFamilyPolicy": "SingleStack"}):
        said = refusal(api, frontend={"service": wrong})
        assert "need ipFamilyPolicy PreferDualStack or RequireDualStack" in said
    said = refusal(api, frontend={"service": {**families, "ipFamilies": ["IPv6", "IPv6"]}})
    assert "name each family once" in said

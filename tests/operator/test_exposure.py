"""`httpRoute`, `grpcRoute` and `ingress` of `spec.frontend` lead to the frontends. The API server is real."""

from __future__ import annotations

import re

import pytest

from moe_api.inference.v1 import chat_pb2, inference_pb2
from moe_operator.render import exposure, frontend
from tests.operator.by_hand import COLLECTION, Api
from tests.operator.httproute_crd import CRD, GRPC_CRD
from tests.operator.live import manifest
from tests.operator.optional_kinds import collection, come_and_go, kept, refusal, strictly, told_without_crds
from tests.operator.worlds import World, deployment

pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
PARENT = {"name": "public", "namespace": "gateways", "sectionName": "https", "port": 443}
HTTP_ROUTE = {
    "parentRefs": [PARENT, {"name": "inside"}],
    "hostnames": ["models.example", "*.models.example"],
    "annotations": {"example.org/owner": "docs"},
    "labels": {"team": "docs"},
}
INGRESS = {
    "className": "nginx",
    "hosts": ["models.example", "models.other.example"],
    "tlsSecretName": "models-tls",
    "annotations": {"nginx.ingress.kubernetes.io/proxy-read-timeout": "600"},
    "labels": {"team": "docs"},
}
GRPC_ROUTE = HTTP_ROUTE | {"hostnames": ["grpc.example"]}
ALL = {"httpRoute": HTTP_ROUTE, "grpcRoute": GRPC_ROUTE, "ingress": INGRESS}


def rendered(**front):
    return {one["kind"]: one for one in exposure.routes(deployment(frontend=front))}


def test_by_default_nothing_is_exposed():
    assert exposure.routes(deployment()) == []


def test_the_route_leads_from_the_gateway_to_the_service_without_a_time_limit():
    route = rendered(httpRoute=HTTP_ROUTE)["HTTPRoute"]
    assert route["spec"]["parentRefs"] == HTTP_ROUTE["parentRefs"]
    assert route["spec"]["hostnames"] == HTTP_ROUTE["hostnames"]
    (rule,) = route["spec"]["rules"]
    service = frontend.service(deployment())
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert rule["backendRefs"] == [{"name": service["metadata"]["name"], "port": ports["http"]}]
    assert rule["timeouts"] == {"request": "0s"}
    assert rule["matches"][0]["path"]["value"] == "/v1/", "/metrics is not for clients"


def test_with_a_pool_the_route_leads_to_it_because_its_picker_chooses_the_frontend():
    asked = {"httpRoute": HTTP_ROUTE, "inferencePool": {"endpointPicker": {"name": "picker"}}}
    (backend,) = rendered(**asked)["HTTPRoute"]["spec"]["rules"][0]["backendRefs"]
    assert backend == {
        "group": "inference.networking.k8s.io",
        "kind": "InferencePool",
        "name": "docs-frontend",
    }


def test_the_grpc_route_leads_the_methods_of_clients_to_the_service_also_with_a_pool():
    spec = rendered(grpcRoute=GRPC_ROUTE, inferencePool={"endpointPicker": {"name": "picker"}})["GRPCRoute"][
        "spec"
    ]
    assert (spec["parentRefs"], spec["hostnames"]) == (GRPC_ROUTE["parentRefs"], GRPC_ROUTE["hostnames"])
    (rule,) = spec["rules"]
    service = frontend.service(deployment())
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert rule["backendRefs"] == [{"name": service["metadata"]["name"], "port": ports["grpc"]}]
    offered = {
        (service.full_name, method.name)
        for file in (inference_pb2.DESCRIPTOR, chat_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert {(each["method"]["service"], each["method"]["method"]) for each in rule["matches"]} == offered


def test_the_ingress_leads_each_host_to_the_service_with_the_certificate():
    spec = rendered(ingress=INGRESS)["Ingress"]["spec"]
    assert [rule["host"] for rule in spec["rules"]] == INGRESS["hosts"]
    service = frontend.service(deployment())
    assert {port["name"] for port in service["spec"]["ports"]} >= {"http"}
    for rule in spec["rules"]:
        (path,) = rule["http"]["paths"]
        named = {"name": service["metadata"]["name"], "port": {"name": "http"}}
        assert (path["path"], path["backend"]) == ("/v1/", {"service": named})
    assert spec["tls"] == [{"secretName": "models-tls", "hosts": INGRESS["hosts"]}]
    assert spec["ingressClassName"] == "nginx"


def test_labels_and_annotations_come_in_addition_to_those_of_the_operator():
    for one, asked in zip(rendered(**ALL).values(), ALL.values(), strict=True):
        labels = one["metadata"]["labels"]
        assert (labels["team"], labels["app.kubernetes.io/managed-by"]) == ("docs", "moe-operator")
        assert one["metadata"]["annotations"] == asked["annotations"]


def test_routes_come_and_go_as_the_spec_says():
    come_and_go(ALL, [*rendered(**ALL).values()])
    world = World(deployment(frontend=ALL))
    world.step()
    world.change(frontend={"ingress": INGRESS})
    assert [deletion.key.kind for deletion in world.step().delete] == ["HTTPRoute", "GRPCRoute"]


@pytest.fixture(scope="module")
def api(api_server):
    with Api(api_server) as made:
        yield made


@pytest.fixture
def gateways(api):
    """The CRDs are installed."""
    api.install(CRD)
    api.install(GRPC_CRD)
    return api


def test_a_cluster_without_the_gateway_api_is_named_and_the_rest_is_applied(api):
    said = told_without_crds(api, "routed", ALL)
    assert re.search("(http|grpc)routes/routed-frontend; install the CRD of its kind", said)
    assert api.cluster.get("Ingress", "default", "routed-frontend")
    api.clear("routed")


def test_the_api_server_takes_the_routes_as_they_are_and_the_operator_keeps_them(gateways):
    kept(gateways, ALL, [*rendered(**ALL).values()], {"ingressClassName": "other"})


def test_a_changed_host_reaches_the_route(gateways):
    assert gateways.ask("POST", COLLECTION, manifest("docs", replicas=1, frontend=ALL))[0] == 201
    gateways.reconcile("docs")
    moved = {"spec": {"frontend": {"httpRoute": {"hostnames": ["new.example"]}}}}
    gateways.ask("PATCH", f"{COLLECTION}/docs", moved)
    gateways.reconcile("docs")
    route = rendered(**ALL)["HTTPRoute"]
    assert gateways.ask("GET", f"{collection(route)}/docs-frontend")[1]["spec"]["hostnames"] == [
        "new.example"
    ]
    gateways.clear("docs")


LEAST = {
    "httpRoute": {"parentRefs": [{"name": "a"}]},
    "grpcRoute": {"parentRefs": [{"name": "b"}]},
    "ingress": {},
}


@pytest.mark.parametrize("front", [ALL, LEAST])
def test_the_schemas_know_every_field_that_is_rendered(gateways, front):
    for body in rendered(**front).values():
        code, said = strictly(gateways, body)
        assert code == 201, said


def route(*parents, **more):
    return {"httpRoute": {"parentRefs": list(parents) or [{"name": "public"}], **more}}


@pytest.mark.parametrize(
    ("front", "sentence"),
    [
        ({"httpRoute": {}}, "spec.frontend.httpRoute.parentRefs: Required value"),
        ({"httpRoute": {"parentRefs": []}}, "should have at least 1 items"),
        (route({"name": "My_Gateway"}), "name is that of a Gateway"),
        (route({**PARENT, "namespace": "a.b"}), "namespace is the name of a namespace"),
        (route({**PARENT, "sectionName": "Https"}), "sectionName is the name of a listener"),
        (route({**PARENT, "port": 65536}), "port is a number from 1 to 65535"),
        (route(PARENT, {**PARENT, "port": 80}), "parentRefs to the same Gateway each need a sectionName"),
        (route({"name": "a"}, {"name": "a", "sectionName": "b"}), "each need a sectionName of their own"),
        (route(hostnames=["Models.example"]), "a host is a DNS name"),
        (route(hostnames=["10.0.0.1"]), "a host is a DNS name"),
        (route(hostnames=["a.example", "a.example"]), "Duplicate value"),
        (route(hostnames=[f"{index}.example" for index in range(17)]), "must have at most 16 items"),
        (route(labels={"app.kubernetes.io/name": "x"}), "are the operator's: remove them"),
        (route(labels={"a": "b c"}), "spec.frontend.httpRoute.labels.a"),
        (route(annotations={"serving.moe-operator.dev/digest": "x"}), "are the operator's: remove them"),
        ({"grpcRoute": {}}, "spec.frontend.grpcRoute.parentRefs: Required value"),
        ({"grpcRoute": GRPC_ROUTE | {"hostnames": ["*.*.example"]}}, "a host is a DNS name"),
        ({"ingress": {"className": "a b"}}, "className is the name of an IngressClass"),
        ({"ingress": {"hosts": ["*"]}}, "a host is a DNS name"),
        ({"ingress": {"tlsSecretName": "A"}}, "tlsSecretName is the name of a Secret"),
        ({"ingress": {"annotations": {"a b": "c"}}}, "the keys of annotations are names"),
    ],
)
def test_a_wrong_route_is_refused_at_apply(api, front, sentence):
    assert sentence in refusal(api, front)


def test_the_same_gateway_may_be_named_once_for_each_listener(api):
    listeners = route(PARENT, {**PARENT, "sectionName": "http"}, {"name": "public"})
    code, said = api.ask("POST", f"{COLLECTION}?dryRun=All", manifest("right", frontend=listeners))
    assert code == 201, said


PUBLIC = {"name": "public"}
HTTPS = {**PUBLIC, "sectionName": "https"}


@pytest.mark.parametrize(
    ("http", "grpc", "apart"),
    [
        ((HTTPS, []), (HTTPS, []), False),
        ((HTTPS, ["a.example"]), (HTTPS, []), False),
        ((HTTPS, ["a.example"]), (HTTPS, ["b.example", "a.example"]), False),
        ((HTTPS, ["a.example"]), (HTTPS, ["grpc.a.example"]), True),
        ((HTTPS, ["*.a.example"]), (HTTPS, ["grpc.a.example"]), False),
        ((HTTPS, ["grpc.a.example"]), (HTTPS, ["*.example"]), False),
        ((HTTPS, ["*.a.example"]), (HTTPS, ["*.example"]), False),
        ((HTTPS, ["*.a.example"]), (HTTPS, ["a.example"]), True),
        ((HTTPS, ["a.example"]), ({**PUBLIC, "sectionName": "grpc"}, ["a.example"]), True),
        ((HTTPS, []), (PUBLIC, []), False),
        ((PUBLIC, []), (HTTPS, []), False),
        (({**PUBLIC, "port": 443}, []), ({**PUBLIC, "port": 8443}, []), True),
        (({**PUBLIC, "port": 443}, []), (HTTPS, []), False),
        ((PUBLIC, []), ({**PUBLIC, "namespace": "gateways"}, []), True),
    ],
)
def test_a_listener_gets_one_of_the_two_kinds_for_a_host(api, http, grpc, apart):
    """The Gateway API says so where a listener's routes of both kinds have an intersection of hostnames."""
    kinds = {"httpRoute": http, "grpcRoute": grpc}
    front = {kind: {"parentRefs": [parent], "hostnames": hosts} for kind, (parent, hosts) in kinds.items()}
    code, said = api.ask("POST", f"{COLLECTION}?dryRun=All", manifest("both", frontend=front))
    assert code == (201 if apart else 422), said
    assert apart or "need different hostnames or listeners" in said["message"]

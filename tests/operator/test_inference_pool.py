"""`spec.frontend.inferencePool` makes frontends backends of an inference gateway. The API server is real."""

from __future__ import annotations

import copy

import pytest

from moe_operator.render import frontend, inference_pool
from moe_operator.resources import names
from tests.operator.by_hand import COLLECTION, Api
from tests.operator.inferencepool_crd import CRD
from tests.operator.live import manifest
from tests.operator.optional_kinds import come_and_go, kept, refusal, strictly, told_without_crds
from tests.operator.worlds import deployment

pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
ASKED = {"inferencePool": {"endpointPicker": {"name": "picker"}}}
PICKER = {"name": "picker", "port": 9003, "failureMode": "FailOpen"}


def pool(**picker):
    settings = {"inferencePool": {"endpointPicker": {"name": "picker", **picker}}}
    (found,) = inference_pool.pools(deployment(frontend=settings))
    return found


def test_by_default_there_is_no_pool_and_no_label_of_one():
    assert inference_pool.pools(deployment()) == []
    assert not set(names.ENGINE_LABELS) & frontend.rendered(deployment())["metadata"]["labels"].keys()


def test_the_pool_selects_exactly_the_frontends_at_the_port_of_the_api():
    spec, template = pool()["spec"], frontend.rendered(deployment(frontend=ASKED))
    labels = template["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert spec["selector"]["matchLabels"] == frontend.service(deployment())["spec"]["selector"]
    (container,) = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert spec["targetPorts"] == [{"number": ports["http"]}]
    assert [labels[name] for name in names.ENGINE_LABELS] == ["moe-operator", "moe-operator"]


def test_the_picker_is_the_one_that_the_user_names():
    assert pool()["spec"]["endpointPickerRef"]["port"] == {"number": 9002}
    reference = pool(**PICKER)["spec"]["endpointPickerRef"]
    assert (reference["name"], reference["port"]) == ("picker", {"number": 9003})
    assert reference["failureMode"] == "FailOpen"


def test_the_pool_comes_and_goes_as_the_spec_says_and_the_policies_stay():
    come_and_go(ASKED, [pool()], networkPolicy={"mode": "Restricted"})


@pytest.fixture(scope="module")
def api(api_server):
    with Api(api_server) as made:
        yield made


@pytest.fixture
def pools(api):
    """The CRD is installed."""
    api.install(CRD)
    return api


def test_a_cluster_without_the_extension_is_named_and_only_for_deployments_that_ask_for_a_pool(api):
    said = told_without_crds(api, "pooled", ASKED)
    assert "inferencepools/pooled-frontend; install the CRD of its kind" in said
    assert api.ask("POST", COLLECTION, manifest("plain", replicas=1))[0] == 201
    api.reconcile("plain")
    assert api.condition("plain", "Progressing")["reason"] != "ApplyRefused"
    for name in ("plain", "pooled"):
        api.clear(name)


def test_the_api_server_takes_the_pool_as_it_is_and_the_operator_keeps_it(pools):
    asked = {"inferencePool": {"endpointPicker": PICKER}}
    kept(pools, asked, [pool(**PICKER)], {"targetPorts": [{"number": 1}]})


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda spec: None, False),
        (lambda spec: spec["endpointPickerRef"].pop("port"), True),
        (lambda spec: spec["endpointPickerRef"].update(failureMode="Open"), True),
        (lambda spec: spec.update(targetPorts=[]), True),
        (lambda spec: spec.update(targetPorts=[{"number": 1}, {"number": 1}]), True),
        (lambda spec: spec.update(selector={}), True),
    ],
)
def test_the_schema_has_teeth(pools, change, refused):
    body = copy.deepcopy(pool())
    change(body["spec"])
    code, said = strictly(pools, body)
    assert code == (422 if refused else 201), said


@pytest.mark.parametrize(
    ("front", "sentence"),
    [
        ({"inferencePool": {}}, "spec.frontend.inferencePool.endpointPicker: Required value"),
        ({"inferencePool": {"endpointPicker": {"name": "My_Picker"}}}, "this is the name of a Service"),
        ({"inferencePool": {"endpointPicker": {"name": "p", "port": 0}}}, "port is a number from 1 to 65535"),
        ({**ASKED, "tls": {"secretName": "front-tls"}}, "an InferencePool knows no TLS to its pods"),
    ],
)
def test_a_wrong_pool_is_refused_at_apply(api, front, sentence):
    assert sentence in refusal(api, front)

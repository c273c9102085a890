"""`spec.frontend.tls`, `spec.frontend.auth`, `spec.networkPolicy` reach the pods; they are off by default."""

import dataclasses

import pytest
from click.testing import CliRunner

from moe_frontend import main
from moe_operator.observed.observation import observe
from moe_operator.observed.pods import Pod
from moe_operator.render import frontend, network
from moe_operator.render.objects import Key, key
from moe_operator.resources import names
from moe_operator.rpc.dialing import target
from tests.operator.worlds import World
from tests.operator.worlds import deployment as with_mutual_tls

JWT = {"issuer": "https://idp.example", "audience": "moe"}
ALL = {
    "tls": {"secretName": "front-tls"},
    "auth": {"apiKeysSecret": "keys", "jwt": {**JWT, "jwksSecret": "jwks", "tenantClaim": "team"}},
}


def deployment(**spec):
    """Without TLS between the components, which adds ports of its own (test_transport)."""
    return with_mutual_tls(transport={"mode": "Plaintext"}, **spec)


def container(**settings):
    (found,) = frontend.pod_spec(deployment(frontend=settings))["containers"]
    return found


def environment(**settings):
    return {variable["name"]: variable.get("value") for variable in container(**settings)["env"]}


def test_by_default_nothing_is_guarded():
    plain = frontend.pod_spec(deployment())
    assert [volume["name"] for volume in plain["volumes"]] == ["tmp"]
    assert not [
        name for name in environment() if name.startswith(("MOE_TLS", "MOE_API", "MOE_J", "MOE_ADMIN"))
    ]
    assert container()["readinessProbe"]["grpc"]["port"] == names.GRPC_PORT
    assert network.policies(deployment()) == []


def test_secrets_are_mounted_where_the_frontend_reads_them():
    given = environment(**ALL)
    spec = frontend.pod_spec(deployment(frontend=ALL))
    folders = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
    secrets = {
        folders[volume["name"]]: volume["secret"]["secretName"]
        for volume in spec["volumes"]
        if "secret" in volume
    }
    assert secrets == {
        given["MOE_TLS"]: "front-tls",
        given["MOE_API_KEYS"]: "keys",
        given["MOE_JWKS"]: "jwks",
    }
    assert (given["MOE_JWT_ISSUER"], given["MOE_JWT_AUDIENCE"]) == ("https://idp.example", "moe")
    assert given["MOE_JWT_TENANT_CLAIM"] == "team"
    known = {option.envvar for option in main.main.params}
    assert {name for name in given if name.startswith("MOE_")} <= known


def test_the_audit_log_is_turned_on_by_the_spec():
    assert environment(auditLog="Requests")["MOE_AUDIT_LOG"] == "1"
    assert "MOE_AUDIT_LOG" not in environment(auditLog="Off")


def test_a_url_of_keys_is_not_mounted():
    jwt = {**JWT, "jwksUri": "https://idp.example/jwks"}
    spec = frontend.pod_spec(deployment(frontend={"auth": {"jwt": jwt}}))
    assert [volume["name"] for volume in spec["volumes"]] == ["tmp"]
    assert environment(auth={"jwt": jwt})["MOE_JWKS"] == "https://idp.example/jwks"


@pytest.mark.parametrize("settings", [{"tls": ALL["tls"]}, {"auth": ALL["auth"]}])
def test_probes_and_the_operator_get_a_port_that_asks_for_nothing(settings):
    found = container(**settings)
    probes = {found[probe]["grpc"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes == {names.ADMIN_PORT}
    ports = {port["name"]: port["containerPort"] for port in found["ports"]}
    assert ports == {"grpc": 8000, "api": 8080, "admin": 8001, "metrics": 9464}
    targets = {
        port["targetPort"] for port in frontend.service(deployment(frontend=settings))["spec"]["ports"]
    }
    assert targets <= set(ports)


def test_gateways_are_told_about_tls():
    protocols = [
        [port["appProtocol"] for port in frontend.service(deployment(frontend=settings))["spec"]["ports"]]
        for settings in ({}, {"tls": ALL["tls"]})
    ]
    assert protocols == [["kubernetes.io/h2c", "http"], ["https", "https"]]


def observed_pod(address, **settings):
    labels = names.frontend_labels("docs")
    manifest = {
        "metadata": {"name": "docs-frontend-1", "labels": labels, "uid": "u"},
        "spec": frontend.pod_spec(deployment(frontend=settings)),
        "status": {"podIP": address},
    }
    (pod,) = observe(pods_there=(manifest,)).frontends
    return pod


@pytest.mark.parametrize(
    ("settings", "address", "asked"),
    [
        ({}, "10.0.0.1", "10.0.0.1:8000"),
        ({}, "fd00::1", "[fd00::1]:8000"),
        (ALL, "10.0.0.1", "10.0.0.1:8001"),
        (ALL, "fd00::1", "[fd00::1]:8001"),
    ],
)
def test_the_operator_asks_the_port_that_the_pod_declares(settings, address, asked):
    pod = observed_pod(address, **settings)
    assert isinstance(pod, Pod)
    assert target(pod.admin_address) == asked


def test_policies_name_the_frontends_the_operator_and_the_gang():
    gang = {"parallelism": {"pipeline": 2}}
    of = deployment(networkPolicy={"mode": "Restricted"}, frontend=ALL, **gang)
    workers, fronts = (policy["spec"] for policy in network.policies(of))
    assert workers["podSelector"] == {"matchLabels": names.worker_labels("docs")}
    asking, metrics, mates = workers["ingress"]
    assert asking["ports"] == [{"port": 8000, "protocol": "TCP"}]
    assert asking["from"][0] == {"podSelector": {"matchLabels": names.frontend_labels("docs")}}
    assert asking["from"][1]["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "moe-operator"}}
    assert metrics == {"ports": [{"port": 9464, "protocol": "TCP"}]}
    assert mates == {"from": [{"podSelector": workers["podSelector"]}]}
    assert "from" not in fronts["ingress"][0]
    assert fronts["ingress"][1]["ports"] == [{"port": 8001, "protocol": "TCP"}]
    assert len(fronts["ingress"][1]["from"]) == 1


def test_the_operator_is_let_in_from_its_own_namespace_only():
    of = dataclasses.replace(
        deployment(networkPolicy={"mode": "Restricted"}), operator_namespace="moe-system"
    )
    operator = network.policies(of)[0]["spec"]["ingress"][0]["from"][1]
    assert operator["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "moe-system"}}


def test_policies_are_created_and_deleted_as_the_spec_says():
    world = World(deployment(networkPolicy={"mode": "Restricted"}))
    applied = [key(manifest) for manifest in world.step().apply]
    expected = [Key("NetworkPolicy", "docs-workers"), Key("NetworkPolicy", "docs-frontend")]
    assert [one for one in applied if one.kind == "NetworkPolicy"] == expected
    world.change(networkPolicy={"mode": "Off"})
    assert [deletion.key for deletion in world.step().delete] == expected
    assert not world.step().delete


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--tls", "/nowhere"], "'/nowhere' does not exist"),
        (["--jwks", "http://idp.example/jwks"], "must begin with https://"),
        (["--jwks", "https://idp.example/jwks"], "give --jwt-issuer and --jwt-audience"),
        (["--jwks", "/nowhere"], "does not exist"),
    ],
)
def test_the_command_says_what_is_wrong_with_its_options(args, sentence):
    result = CliRunner().invoke(main.main, ["--static", "127.0.0.1:1", *args])
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.split())

"""`moe status` against a real API server with our CRD."""

import subprocess
from pathlib import Path

import kubernetes
import pytest
import yaml

from moe_operator.resources import names
from tests.frontend.apiserver import ACCESS, running_api_server
from tests.operator.live import eventually

CRDS = Path(__file__).parents[2] / "crds"

pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_api_server(tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest.fixture
def kubeconfig(server, tmp_path):
    path = tmp_path / "kubeconfig"
    cluster = {"server": f"https://127.0.0.1:{server.port}", "insecure-skip-tls-verify": True}
    body = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": cluster}],
        "users": [{"name": "me", "user": {"token": ACCESS}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "default"}}],
    }
    path.write_text(yaml.safe_dump(body))
    return {"KUBECONFIG": str(path), "PYTHONWARNINGS": "ignore"}


async def test_before_and_after_the_crd_is_installed(server, moe, kubeconfig):
    result = await moe("status", **kubeconfig)
    assert result.returncode == 2
    assert result.stderr.decode() == (
        "error: this cluster does not know MoEDeployments; install the CRD (kubectl apply -f crds/)\n"
    )
    install(server)
    result = await moe("status", **kubeconfig)
    assert "no MoEDeployments here" in result.stdout.decode()
    create(server, "demo")
    listed = (await moe("status", "-A", **kubeconfig)).stdout.decode()
    assert ["default", "demo", "?", "0/1"] in [line.split()[:4] for line in listed.splitlines()]
    one = (await moe("status", "demo", "-n", "default", **kubeconfig)).stdout.decode()
    assert "demo from file:///mnt/models/x" in one
    assert "no conditions yet" in one
    missing = await moe("status", "other", **kubeconfig)
    assert missing.returncode == 2
    assert missing.stderr.decode().startswith("error: no MoEDeployment other in namespace default")


def install(server):
    client = server.client()
    for path in sorted(CRDS.glob("*.yaml")):
        for body in yaml.safe_load_all(path.read_text()):
            if body["spec"]["names"]["plural"] == names.PLURAL:
                kubernetes.client.ApiextensionsV1Api(client).create_custom_resource_definition(body)
    # `kubectl wait` fails on a condition while there are none at all.
    for what in ("jsonpath={.status.conditions}", "condition=Established"):
        subprocess.run(
            [
                server.executables["kubectl"],
                f"--server=https://127.0.0.1:{server.port}",
                "--insecure-skip-tls-verify",
                f"--token={ACCESS}",
                "wait",
                f"--for={what}",
                f"crd/{names.PLURAL}.{names.GROUP}",
                "--timeout=60s",
            ],
            check=True,
            capture_output=True,
        )
    # It is served a little after it is Established.
    eventually(lambda: served(client), bool, "the kind is served")


def served(client):
    api = kubernetes.client.CustomObjectsApi(client)
    try:
        api.list_cluster_custom_object(names.GROUP, names.VERSION, names.PLURAL)
    except kubernetes.client.ApiException:
        return False
    return True


def create(server, name):
    body = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name},
        "spec": {"model": {"uri": "file:///mnt/models/x"}},
    }
    api = kubernetes.client.CustomObjectsApi(server.client())
    api.create_namespaced_custom_object(names.GROUP, names.VERSION, "default", names.PLURAL, body)

"""What a frontend publishes of its routes, on a real API server, with the rights the operator gives it."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import kubernetes
import pytest
import yaml

from moe_api.supervision import Backoff, Supervisor
from moe_frontend.discovery import publishing
from moe_frontend.discovery.endpoints import Endpoint
from moe_operator.apiserver.requests import Requests
from moe_operator.observed.routes import published
from moe_operator.render import frontend
from moe_operator.resources import cache_sums, names
from moe_operator.resources.deployment import parse
from tests.frontend.apiserver import running_api_server

ROOT = Path(__file__).parents[2]
POD = publishing.OwnPod("default", "demo-frontend-x", "u1", "demo")
ACCOUNT = "system:serviceaccount:default:demo-frontend"
ONE, TWO = Endpoint("demo-0-0", "10.0.0.1:8000", "r1"), Endpoint("demo-1-0", "[fd00::2]:8000", "r1")

pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_api_server(tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest.fixture(scope="module")
def rights(server):
    """The Role and RoleBinding that the operator renders, and the CRD."""
    api = server.client()
    crd = yaml.safe_load((ROOT / "crds/frontendroutes.yaml").read_text())
    kubernetes.client.ApiextensionsV1Api(api).create_custom_resource_definition(crd)
    body = {
        "metadata": {"name": "demo", "namespace": "default", "uid": "0", "generation": 1},
        "spec": {"model": {"uri": "file:///mnt/models/none"}},
    }
    rbac = kubernetes.client.RbacAuthorizationV1Api(api)
    for create, render in (
        (rbac.create_namespaced_role, frontend.role),
        (rbac.create_namespaced_role_binding, frontend.role_binding),
    ):
        manifest = render(parse(body))
        manifest["metadata"].pop("ownerReferences")
        create("default", manifest)
    custom = kubernetes.client.CustomObjectsApi(api)
    deadline = time.monotonic() + 30
    while True:
        try:
            custom.list_namespaced_custom_object(names.GROUP, names.VERSION, "default", names.ROUTES_PLURAL)
            return custom
        except kubernetes.client.ApiException:
            assert time.monotonic() < deadline
            time.sleep(0.1)


class Running:
    """A publisher under a supervisor; `routes` are what it is to publish."""

    def __init__(self, server, custom):
        self.custom, self.routes = custom, []
        client = server.client()
        client.set_default_header("Impersonate-User", ACCOUNT)
        self.sums = {}
        self.publisher = publishing.Publisher(
            Requests(client, 10.0), POD, lambda: self.routes, lambda: self.sums, sums_s=0.05
        )
        self.supervisor = Supervisor(backoff=Backoff(first_s=0.05), expected=(publishing.PublishError,))

    def set(self, *routes):
        self.routes = list(routes)
        self.publisher.changed()

    def read(self):
        listed = self.custom.list_namespaced_custom_object(
            names.GROUP, names.VERSION, "default", names.ROUTES_PLURAL
        )
        return next((item for item in listed["items"] if item["metadata"]["name"] == POD.name), None)

    def read_when_served(self):
        """None while a restarted API server still initializes the storage of custom resources."""
        try:
            return self.read()
        except kubernetes.client.ApiException as error:
            if error.status not in {429, 503}:
                raise
            return None

    async def until(self, *routes):
        async with asyncio.timeout(60):
            while True:
                found = await asyncio.to_thread(self.read_when_served)
                if found and {to["name"] for to in found["routes"]} == {to.name for to in routes}:
                    return found
                await asyncio.sleep(0.05)


@pytest.fixture
async def running(server, rights):
    one = Running(server, rights)
    one.supervisor.start("publishing", one.publisher.run)
    yield one
    await one.supervisor.close()


async def test_routes_are_published_once_each_time_they_change(running):
    await running.until()
    running.set(ONE, TWO)
    found = await running.until(ONE, TWO)
    assert published((found,)) == {"u1": {(ONE.name, "10.0.0.1"), (TWO.name, "fd00::2")}}
    assert found["metadata"]["labels"][names.LABEL_NAME] == "demo"
    running.set(TWO, ONE)
    await asyncio.sleep(2 * publishing.BETWEEN_WRITES_S)
    again = await asyncio.to_thread(running.read)
    assert again["metadata"]["resourceVersion"] == found["metadata"]["resourceVersion"], "nothing was written"

    # Many changes are one write, and the last one is there in the end.
    began = time.monotonic()
    for number in range(100):
        running.set(*[Endpoint(f"demo-{n}-0", "10.0.0.1:8000") for n in range(number)])
        await asyncio.sleep(0.002)
    last = await running.until(*running.routes)
    most = 3 + (time.monotonic() - began) / publishing.BETWEEN_WRITES_S
    assert last["metadata"]["generation"] - found["metadata"]["generation"] <= most


async def test_sums_of_caches_follow_without_a_change_of_routes(running):
    await running.until()
    for hits in (1, 2):
        running.sums = {"outputHits": hits}
        async with asyncio.timeout(60):
            while True:
                found = await asyncio.to_thread(running.read)
                annotations = found["metadata"].get("annotations", {}) if found else {}
                if cache_sums.total([annotations.get(names.ANNOTATION_CACHES)]) == {"outputHits": hits}:
                    break
                await asyncio.sleep(0.05)


async def test_what_somebody_may_have_deleted_is_written_again(monkeypatch):
    monkeypatch.setattr(publishing, "BETWEEN_WRITES_S", 0.0)
    writes, enough = [], asyncio.Event()
    loop = asyncio.get_running_loop()

    def send(*_, body, **__):
        writes.append(body)
        if len(writes) == 3:
            loop.call_soon_threadsafe(enough.set)

    publisher = publishing.Publisher(
        SimpleNamespace(send=send), POD, lambda: [ONE], sums_s=0.001, repeat_s=0.02
    )
    began = time.monotonic()
    task = asyncio.create_task(publisher.run())
    async with asyncio.timeout(20):
        await enough.wait()
    task.cancel()
    assert time.monotonic() - began >= 0.04
    assert writes[0] == writes[1] == writes[2]


async def test_an_api_server_that_is_away_gets_the_routes_when_it_is_back(running, server):
    await running.until()
    server.kill()
    running.set(ONE)
    async with asyncio.timeout(60):
        while not any(state.failures for state in running.supervisor.states):
            await asyncio.sleep(0.05)
    await asyncio.to_thread(server.start)
    await running.until(ONE)


async def test_a_frontend_may_do_nothing_else(server, rights):
    client = server.client()
    client.set_default_header("Impersonate-User", ACCOUNT)
    custom = kubernetes.client.CustomObjectsApi(client)
    for attempt in (
        lambda: custom.delete_namespaced_custom_object(
            names.GROUP, names.VERSION, "default", names.ROUTES_PLURAL, POD.name
        ),
        lambda: kubernetes.client.CoreV1Api(client).list_namespaced_pod("default"),
        lambda: kubernetes.client.CoreV1Api(client).patch_namespaced_pod("x", "default", {}),
    ):
        with pytest.raises(kubernetes.client.ApiException) as caught:
            attempt()
        assert caught.value.status == 403


def test_outside_a_pod_nothing_is_published():
    assert publishing.own_pod("default", "demo", {}) is None
    assert publishing.own_pod("default", "demo", {"POD_NAME": POD.name, "POD_UID": "u1"}) == POD

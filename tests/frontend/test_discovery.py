"""Following EndpointSlices of a real API server, also when it goes away and comes back."""

import queue

import kubernetes
import pytest

from moe_api.listwatch import ExpiredError, Page
from moe_api.supervision import Supervisor
from moe_frontend.discovery.endpoints import Endpoint
from moe_frontend.discovery.slices import SERVICE_LABEL, SliceWatcher, slices_of
from moe_operator.apiserver.requests import Requests
from moe_operator.errors import MoEOperatorError
from tests.frontend.apiserver import running_api_server

PATIENCE_S = 45

pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_api_server(tmp_path_factory.mktemp("api")) as running:
        yield running


class Followed:
    """A watcher, and what it published."""

    def __init__(self, server, service):
        self.api = kubernetes.client.DiscoveryV1Api(server.client())
        self.service = service
        self.written = set()
        self.published = queue.Queue()
        self.source = slices_of(Requests(server.client(), 5.0), "default", service)
        self.watcher = SliceWatcher(
            self.source,
            service,
            self.published.put,
            Supervisor(expected=(MoEOperatorError,)),
        )
        self.watcher.start()

    def until(self, *names):
        """Waits until exactly these pods are published."""
        while (seen := self.published.get(timeout=PATIENCE_S)) != {
            Endpoint(n, f"10.0.0.{n}:8000") for n in names
        }:
            pass
        return seen

    def body(self, *names, service=None):
        return {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"labels": {SERVICE_LABEL: service or self.service}},
            "addressType": "IPv4",
            "ports": [{"name": "grpc", "port": 8000, "protocol": "TCP"}],
            "endpoints": [
                {
                    "addresses": [f"10.0.0.{name}"],
                    "conditions": {"ready": True, "serving": True, "terminating": False},
                    "targetRef": {"kind": "Pod", "name": name, "namespace": "default"},
                }
                for name in names
            ],
        }

    def write(self, slice_name, *names, **options):
        body = self.body(*names, **options)
        body["metadata"]["name"] = slice_name
        if slice_name in self.written:
            self.api.replace_namespaced_endpoint_slice(slice_name, "default", body)
        else:
            self.api.create_namespaced_endpoint_slice("default", body)
            self.written.add(slice_name)

    def delete(self, slice_name):
        self.api.delete_namespaced_endpoint_slice(slice_name, "default")


@pytest.fixture
def follow(server):
    followed = []

    def start(service):
        followed.append(Followed(server, service))
        return followed[-1]

    yield start
    for one in followed:
        one.watcher.stop()


def test_endpoints_follow_the_slices_of_the_service(follow):
    f = follow("one-workers")
    f.until()
    f.write("one-a", "1", "2")
    f.until("1", "2")
    f.write("two-a", "9", service="two-workers")
    f.write("one-b", "3")
    f.until("1", "2", "3")
    f.write("one-a", "1")
    f.until("1", "3")
    f.write("one-a")
    f.until("3")
    f.delete("one-b")
    f.until()


def test_an_api_server_that_restarts_costs_no_endpoints_and_no_news(server, follow, caplog):
    f = follow("three-workers")
    f.write("three-a", "4")
    f.until("4")
    server.kill()
    with pytest.raises(queue.Empty):
        f.published.get(timeout=1.5)
    server.start()
    f.write("three-a", "4", "5")
    f.until("4", "5")
    f.write("three-a", "5")
    f.until("5")
    told = [r for r in caplog.records if "EndpointSlices of three-workers" in r.getMessage()]
    assert len(told) == 1, "one warning, whatever the number of attempts"


def test_a_watch_from_before_history_is_answered_with_410(server, follow):
    """After which the list-watch lists again."""
    f = follow("four-workers")
    with pytest.raises(ExpiredError):
        list(f.source.events("1"))


class Broken:
    """A source whose first list fails."""

    def __init__(self, error):
        self.error = error

    def pages(self):
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        yield Page([], "1")

    def events(self, version):
        yield from ()


@pytest.mark.parametrize(
    "error", [ValueError("a line was cut off"), KeyError("metadata"), RuntimeError("a bug")]
)
def test_the_watcher_survives_what_nobody_expects(error):
    published = queue.Queue()
    supervisor = Supervisor()
    watcher = SliceWatcher(Broken(error), "w", published.put, supervisor)
    watcher.start()
    try:
        assert published.get(timeout=PATIENCE_S) == frozenset()
        assert [state.loop for state in supervisor.states] == ["endpoint-slices"]
    finally:
        watcher.stop()

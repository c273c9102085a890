"""Follows the EndpointSlices of a service, in a thread of its own.

Lists, then watches from there on, and lists again whenever the watch cannot go on: its history expired
(410), the API server restarted, the connection broke. Meanwhile the endpoints known last stay in use: an
API server that is away for a minute must not take the deployment down with it.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import kubernetes
import urllib3

from moe_api.supervision import Backoff, Supervisor
from moe_frontend.discovery.endpoints import Endpoint, endpoints
from moe_operator.errors import ClusterUnavailableError, InstallationError

SERVICE_LABEL: Final = "kubernetes.io/service-name"

# The server ends a watch after this long; one on a connection that died unnoticed is replaced then.
_WATCH_S: Final = 60
_CONNECT_S: Final = 5
_BACKOFF: Final = Backoff(first_s=0.5, longest_s=5.0)
_BETWEEN_LISTS_S: Final = 0.5
"""A server whose history expires at once shall not be asked in a tight loop."""

_Slices = dict[str, Mapping[str, Any]]


class SliceWatcher:
    """Calls back with the endpoints of a service, at first and after every change.

    Args:
        api: of the cluster.
        namespace: of the service.
        service: its name.
        publish: takes the endpoints; called in the watcher's thread.
        supervisor: runs the thread; what nobody expects (a line of the watch that is cut off, for one) ends a
            run of it, and the next one begins with a list.
    """

    def __init__(
        self,
        api: kubernetes.client.DiscoveryV1Api,
        namespace: str,
        service: str,
        publish: Callable[[frozenset[Endpoint]], None],
        supervisor: Supervisor,
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._service = service
        self._selector = f"{SERVICE_LABEL}={service}"
        self._publish = publish
        self._supervisor = supervisor
        self._stopping = threading.Event()

    def start(self) -> None:
        """Starts the thread."""
        self._supervisor.start_thread("endpoint-slices", self._run, self._stopping, self._service, _BACKOFF)

    def stop(self) -> None:
        """Lets the thread end at its next event; it is a daemon, so nobody has to wait for it."""
        self._stopping.set()

    def _run(self) -> None:
        """Follows until an error, after which the supervisor begins anew.

        Raises:
            ClusterUnavailableError: the API server cannot be asked now.
        """
        while not self._stopping.is_set():
            try:
                for slices in self._list_and_watch():
                    self._publish(endpoints(slices.values()))
            except (kubernetes.client.ApiException, urllib3.exceptions.HTTPError, OSError) as error:
                if not _expired(error):
                    raise ClusterUnavailableError(
                        f"cannot follow the EndpointSlices of {self._service} ({_brief(error)}); "
                        "continuing with the last known endpoints"
                    ) from error
                self._stopping.wait(_BETWEEN_LISTS_S)

    def _list_and_watch(self) -> Iterator[_Slices]:
        listed = self._api.list_namespaced_endpoint_slice(
            self._namespace, label_selector=self._selector, _request_timeout=(_CONNECT_S, _WATCH_S)
        )
        # The typed answer names its fields otherwise than events do; JSON's names serve both.
        plain = self._api.api_client.sanitize_for_serialization(listed)
        slices: _Slices = {item["metadata"]["name"]: item for item in plain["items"]}
        version = plain["metadata"]["resourceVersion"]
        yield slices
        while not self._stopping.is_set():
            for event in self._watch(version):
                version = event["raw_object"]["metadata"]["resourceVersion"]
                if apply_event(slices, event["type"], event["raw_object"]):
                    yield slices

    def _watch(self, version: str) -> Iterator[Mapping[str, Any]]:
        stream: Iterator[Mapping[str, Any]] = kubernetes.watch.Watch().stream(
            self._api.list_namespaced_endpoint_slice,
            self._namespace,
            label_selector=self._selector,
            resource_version=version,
            allow_watch_bookmarks=True,
            timeout_seconds=_WATCH_S,
            _request_timeout=(_CONNECT_S, _WATCH_S + _CONNECT_S),
        )
        return stream


def apply_event(slices: _Slices, kind: str, item: Mapping[str, Any]) -> bool:
    """Takes a watch event into `slices` (by name); says whether anything may have changed."""
    name = item["metadata"].get("name")
    if kind in ("ADDED", "MODIFIED"):
        slices[name] = item
        return True
    if kind == "DELETED":
        return slices.pop(name, None) is not None
    return False


def cluster_api() -> kubernetes.client.DiscoveryV1Api:
    """The API of the cluster this process runs in, or else of the user's kubeconfig.

    Raises:
        InstallationError: there is neither.
    """
    try:
        kubernetes.config.load_incluster_config()
    except kubernetes.config.ConfigException:
        _load_kubeconfig()
    configuration = kubernetes.client.Configuration.get_default_copy()
    configuration.retries = (
        False  # the watcher tries again itself; urllib3 would log each of its own attempts
    )
    return kubernetes.client.DiscoveryV1Api(kubernetes.client.ApiClient(configuration))


def _load_kubeconfig() -> None:
    try:
        kubernetes.config.load_kube_config()
    except kubernetes.config.ConfigException as error:
        raise InstallationError(
            "no Kubernetes cluster found: run inside a pod with a service account, set KUBECONFIG, "
            "or name the workers with --static HOST:PORT,..."
        ) from error


def _expired(error: Exception) -> bool:
    """Whether the history of the watch is gone: everyday life, and everything is listed again."""
    return isinstance(error, kubernetes.client.ApiException) and error.status == 410


def _brief(error: Exception) -> str:
    if isinstance(error, kubernetes.client.ApiException):
        return f"{error.status} {error.reason}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__

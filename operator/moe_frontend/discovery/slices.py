"""Watches the EndpointSlices of a service, in a thread of its own.

While the API server does not respond, the last known endpoints stay in use: an API server that is away for a
minute must not take the deployment down with it.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Final

from moe_api.listwatch import ListWatch, Manifest, Snapshot, Source, UnavailableError
from moe_api.supervision import Backoff, Supervisor
from moe_frontend.discovery.endpoints import Endpoint, endpoints
from moe_operator.apiserver import requests
from moe_operator.apiserver.requests import Requests
from moe_operator.errors import ClusterUnavailableError, InstallationError

SERVICE_LABEL: Final = "kubernetes.io/service-name"
_PATH: Final = "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices"
_REQUEST_S: Final = 10.0
# Short, so that a connection that died unnoticed is replaced within about a minute.
_WATCH_S: Final = 60
_SILENCE_S: Final = 65.0
_CONNECTIONS: Final = 4
_BACKOFF: Final = Backoff(first_s=0.5, longest_s=5.0)


class SliceWatcher:
    """Calls back with the endpoints of a service, at first and after every change.

    Args:
        source: the EndpointSlices of the service.
        service: its name, for messages.
        publish: takes the endpoints; called in the watcher's thread.
        supervisor: runs the thread; an unexpected error ends one run of it, and the next run lists again.
    """

    def __init__(
        self,
        source: Source,
        service: str,
        publish: Callable[[frozenset[Endpoint]], None],
        supervisor: Supervisor,
    ) -> None:
        def changed(slices: Mapping[str, Manifest]) -> None:
            publish(endpoints(slices.values()))

        self._service = service
        self._supervisor = supervisor
        self._stopping = threading.Event()
        self._watch = ListWatch(source, Snapshot(changed), self._stopping)

    def start(self) -> None:
        """Starts the thread."""
        self._supervisor.start_thread("endpoint-slices", self._run, self._stopping, self._service, _BACKOFF)

    def stop(self) -> None:
        """Lets the thread end at its next event; it is a daemon, so nobody has to wait for it."""
        self._stopping.set()

    def _run(self) -> None:
        """Watches until an error, after which the supervisor starts it again.

        Raises:
            ClusterUnavailableError: the API server does not respond.
        """
        try:
            self._watch.run()
        except UnavailableError as error:
            raise ClusterUnavailableError(
                f"cannot watch the EndpointSlices of {self._service}: {error}; "
                "continuing with the last known endpoints"
            ) from error


def slices_of(api: Requests, namespace: str, service: str) -> Source:
    """The EndpointSlices of a service."""
    selector = f"{SERVICE_LABEL}={service}"
    return api.collection(_PATH.format(namespace), selector, watch_s=_WATCH_S, silence_s=_SILENCE_S)


def cluster_api() -> Requests:
    """A connection to the cluster this process runs in, or else to the one of the user's kubeconfig.

    Raises:
        InstallationError: there is neither.
    """
    try:
        return Requests(requests.connect(_CONNECTIONS), _REQUEST_S)
    except InstallationError as error:
        raise InstallationError(f"{error}, or name the workers with --static HOST:PORT,...") from error

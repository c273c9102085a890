"""A connection to the API server. Blocking: call it in a thread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import urllib3.exceptions
from kubernetes import client, config
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import DynamicApiError

from moe_api.listwatch import Collection, Manifest, Query
from moe_operator.apiserver.answers import translated
from moe_operator.errors import ClusterUnavailableError, InstallationError, KindUnknownError

_NOT_FOUND = 404


class Requests:
    """Sends requests to paths of the API server.

    Every method raises a RetryableError if a retry can help (its type says why), and ApplyRefusedError if
    only a change of the object helps.
    """

    def __init__(self, api: client.ApiClient, timeout_s: float) -> None:
        """timeout_s: limit of one request."""
        # No discovery: the paths of the few kinds are known, and the discoverer would keep a cache in /tmp.
        self._dynamic = DynamicClient(api, discoverer=lambda _client, _cache: None)
        self._timeout_s = timeout_s

    def send(self, method: str, path: str, **parameters: Any) -> Manifest | None:
        """The object of a response; None if it does not exist.

        parameters: of DynamicClient.request: body, content_type, field_manager, label_selector ...
        """
        response = self._respond(method, path, read=True, _request_timeout=self._timeout_s, **parameters)
        result: Manifest | None = None if response is None else orjson.loads(response.data)
        return result

    def collection(self, path: str, selector: str, watch_s: int = 300, silence_s: float = 90.0) -> Collection:
        """The objects below a path that carry the labels, to be listed and watched."""
        return Collection(self, path, selector, watch_s=watch_s, silence_s=silence_s, decode=orjson.loads)

    def get(self, path: str, query: Query) -> bytes:
        """The body of a response.

        Raises KindUnknownError if the API server does not know the path.
        """
        response = self._respond("get", path, read=True, **self._reading(query, self._timeout_s))
        content: bytes = _found(response, path).data
        return content

    @contextmanager
    def stream(self, path: str, query: Query, silence_s: float) -> Iterator[Iterable[bytes]]:
        """The body of a response, in pieces as they come."""
        response = _found(self._respond("get", path, read=False, **self._reading(query, silence_s)), path)
        try:
            yield response.stream(1 << 16)
        except urllib3.exceptions.HTTPError as error:
            raise ClusterUnavailableError(f"the watch of {path} was interrupted: {error}") from error
        finally:
            response.close()

    def _reading(self, query: Query, silence_s: float) -> dict[str, Any]:
        return {"query_params": [*query.items()], "_request_timeout": (self._timeout_s, silence_s)}

    def _respond(self, method: str, path: str, *, read: bool, **parameters: Any) -> Any:
        """The response, with its body read or not; None if there is no such object."""
        try:
            response = self._dynamic.request(method, path, serialize=False, **parameters)
            if read:
                _ = response.data
            return response
        except DynamicApiError as error:
            if error.status == _NOT_FOUND and method in ("get", "delete"):
                return None
            raise translated(error, method, path) from error
        except urllib3.exceptions.HTTPError as error:
            raise ClusterUnavailableError(
                f"the API server did not respond to {method} {path}: {error}"
            ) from error


def _found(response: Any, path: str) -> Any:
    if response is None:
        raise KindUnknownError(f"{path} is unknown to the API server; apply the CRDs of the chart")
    return response


def connect(connections: int) -> client.ApiClient:
    """The connection of the pod's ServiceAccount, or outside a pod of the kubeconfig.

    connections: kept open, one for each watch and each thread.

    Raises InstallationError if there is neither.
    """
    configuration = client.Configuration()
    configuration.connection_pool_maxsize = connections
    # Once, for a kept connection that just ended; callers have a backoff of their own for all else.
    configuration.retries = 1
    try:
        try:
            config.load_incluster_config(configuration)
        except config.ConfigException:
            config.load_kube_config(client_configuration=configuration)
    except config.ConfigException as error:
        raise InstallationError(
            f"no Kubernetes cluster found: {error}; run in a pod with a ServiceAccount or set KUBECONFIG"
        ) from error
    return client.ApiClient(configuration)

"""Publishes the routes of this frontend in a FrontendRoutes object, which the operator reads.

`moe status` reads what caches saved from an annotation of the same object.

The operator opens a worker's readiness gate once every frontend routes to it. It could ask each frontend over
gRPC, but a service mesh or a NetworkPolicy may block that port; both can reach the API server.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from moe_frontend.discovery.endpoints import Endpoint
from moe_operator.apiserver.requests import Requests
from moe_operator.errors import MoEOperatorError, RetryableError
from moe_operator.resources import cache_sums, names

FIELD_MANAGER: Final = "moe-frontend"
BETWEEN_WRITES_S: Final = 0.5
"""Minimum time between writes: frequent changes, as in a rollout of many replicas, become one write."""
SUMS_S: Final = 30.0
"""Time between writes of new sums: each one is a write to the API server and a reconcile."""
REPEAT_S: Final = 300.0
"""Time after which the same content is written again, in case that somebody deleted or changed the object.
If nobody did, the API server stores nothing.
"""
_MOST: Final = 2500
"""Of crds/frontendroutes.yaml, maxItems."""


class PublishError(RetryableError):
    """The API server did not accept the routes."""


@dataclass(frozen=True)
class OwnPod:
    """The pod that this frontend runs in."""

    namespace: str
    name: str
    uid: str
    deployment: str


def own_pod(namespace: str, deployment: str, environ: Mapping[str, str] = os.environ) -> OwnPod | None:
    """The pod of this process, from its environment; None outside a pod."""
    name, uid = environ.get("POD_NAME"), environ.get("POD_UID")
    return OwnPod(namespace, name, uid, deployment) if name and uid else None


class Publisher:
    """Keeps the object up to date. Belongs to one event loop; requests to the API server run in threads.

    Args:
        api: of the cluster.
        pod: of this frontend.
        routes: returns the current routes.
        sums: returns what caches saved so far, with the keys of `cache_sums`.
        sums_s: time between writes of new sums, in seconds.
        repeat_s: time after which the same content is written again, in seconds.
    """

    def __init__(
        self,
        api: Requests,
        pod: OwnPod,
        routes: Callable[[], Iterable[Endpoint]],
        sums: Callable[[], Mapping[str, int]] = dict,
        sums_s: float = SUMS_S,
        repeat_s: float = REPEAT_S,
    ) -> None:
        self._api = api
        self._pod = pod
        self._routes = routes
        self._sums = sums
        self._sums_s = sums_s
        self._repeat_s = repeat_s
        self._written: dict[str, Any] | None = None
        self._written_at = 0.0
        self._news = asyncio.Event()

    def changed(self) -> None:
        """Notes that the routes may have changed."""
        self._news.set()

    async def run(self) -> None:
        """Writes the routes whenever they differ from the last written ones, and now and then.

        Raises:
            PublishError: the API server did not accept them; the next run writes them again.
        """
        while True:
            self._news.clear()
            wanted = manifest(self._pod, self._routes(), self._sums())
            if wanted != self._written or time.monotonic() - self._written_at >= self._repeat_s:
                await asyncio.to_thread(self._apply, wanted)
                self._written, self._written_at = wanted, time.monotonic()
                await asyncio.sleep(BETWEEN_WRITES_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), self._sums_s)

    def _apply(self, body: dict[str, Any]) -> None:
        path = f"/apis/{names.API_VERSION}/namespaces/{self._pod.namespace}/{names.ROUTES_PLURAL}"
        try:
            self._api.send(
                "patch",
                f"{path}/{self._pod.name}",
                body=body,
                content_type="application/apply-patch+yaml",
                field_manager=FIELD_MANAGER,
                force_conflicts=True,
            )
        except (MoEOperatorError, OSError) as error:
            raise PublishError(
                f"FrontendRoutes {self._pod.name} not written: {error}; the operator has to "
                "reach this pod until it is"
            ) from error


def manifest(pod: OwnPod, routes: Iterable[Endpoint], sums: Mapping[str, int]) -> dict[str, Any]:
    """The FrontendRoutes of a pod, which is deleted with it."""
    owner = {"apiVersion": "v1", "kind": "Pod", "name": pod.name, "uid": pod.uid}
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.ROUTES_KIND,
        "metadata": {
            "name": pod.name,
            "namespace": pod.namespace,
            "annotations": {names.ANNOTATION_CACHES: cache_sums.write(sums)},
            "labels": {names.LABEL_NAME: pod.deployment, names.LABEL_ROLE: names.ROLE_FRONTEND},
            "ownerReferences": [owner],
        },
        "routes": [{"name": to.name, "address": to.address} for to in sorted(routes)[:_MOST]],
    }

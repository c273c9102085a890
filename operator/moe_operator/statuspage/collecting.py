"""Reads what the page shows: from the watch cache, the API server's Events, and the leaders."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from moe_api.worker.v1 import worker_pb2
from moe_operator.errors import MoEOperatorError
from moe_operator.kube.cache import ObjectCache
from moe_operator.kube.client import Cluster
from moe_operator.observed import pods as observed
from moe_operator.render.objects import Manifest
from moe_operator.resources import names
from moe_operator.statuspage.overview import overview

FRESH_S: Final = 3.0
"""An answer is valid for all viewers this long: many cost the API server and the workers no more than one."""
ASKED_MOST: Final = 200
"""Leaders that are asked for their load."""


class Collector:
    """What the page shows, at most `FRESH_S` old. Thread-safe.

    Args:
        cluster: has the Events.
        cache: has deployments and pods.
        namespaces: those that are watched; none stands for all.
        loads: asks leaders by address; without those that do not respond in time.
    """

    def __init__(
        self,
        cluster: Cluster,
        cache: ObjectCache,
        namespaces: Sequence[str],
        loads: Callable[[Collection[str]], Mapping[str, worker_pb2.Load]],
    ) -> None:
        self._cluster, self._cache, self._loads = cluster, cache, loads
        self._namespaces = namespaces or ("",)
        self._lock = threading.Lock()
        self._found: dict[str, Any] = {}
        self._read_at = float("-inf")

    def read(self) -> dict[str, Any]:
        """The overview. What cannot be read is missing, and named in `problems`."""
        with self._lock:
            if time.monotonic() - self._read_at > FRESH_S:
                self._found = self._read()
                self._read_at = time.monotonic()
            return self._found

    def _read(self) -> dict[str, Any]:
        deployments = [
            (body, self._of(body, "Pod"), self._of(body, names.ROUTES_KIND))
            for body in self._cache.all(names.KIND)
        ]
        problems: list[str] = []
        events = self._events(problems)
        asked = _leaders(pods for _, pods, _ in deployments)
        answers = self._loads(tuple(asked))
        loads = {asked[address]: load for address, load in answers.items()}
        return {**overview(deployments, events, loads, datetime.now(UTC)), "problems": problems}

    def _of(self, body: Manifest, kind: str) -> list[Manifest]:
        metadata = body["metadata"]
        return self._cache.of_deployment(kind, metadata["namespace"], metadata["name"])

    def _events(self, problems: list[str]) -> list[Manifest]:
        found = []
        for namespace in self._namespaces:
            try:
                found += self._cluster.events_about(names.KIND, namespace)
            except MoEOperatorError as error:
                problems.append(f"decisions are missing: {error}")
        return found


def _leaders(pods_of_deployments: Iterable[list[Manifest]]) -> dict[str, str]:
    """Addresses of the workers that can say how busy they are, each with its IP address."""
    found = {}
    for pods in pods_of_deployments:
        for pod in pods:
            labels, address = pod["metadata"].get("labels", {}), pod.get("status", {}).get("podIP")
            if address and labels.get(names.LABEL_ROLE) == names.ROLE_WORKER and _leads(pod, labels):
                found[observed.read(pod).grpc_address] = address
            if len(found) == ASKED_MOST:
                return found
    return found


def _leads(pod: Manifest, labels: Mapping[str, str]) -> bool:
    """Whether it is the only worker of its replica, or the first one."""
    ordinal = labels.get(names.LABEL_POD_INDEX) or pod["metadata"]["name"].rpartition("-")[2]
    return names.ranks_of(labels) == 1 or ordinal == "0"

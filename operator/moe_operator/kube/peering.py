"""Whether this process is the one that acts, among several operators of one cluster.

kopf writes every process into the status of one ClusterKopfPeering object and stops the watches of those that
are outranked. It cannot stop reconciles that run or wait, so every reconcile checks here first.
Ranks are start times: the process that started last acts, so a replaced operator never waits for its
predecessor's record to expire.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from moe_operator.kube.client import Cluster
from moe_operator.render.objects import Manifest

KIND: Final = "ClusterKopfPeering"
API_VERSION: Final = "kopf.dev/v1"


def manifest(name: str) -> Manifest:
    """The object; kopf fills its status."""
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}}


def priority(started: datetime) -> int:
    """Rank of a process that started then: milliseconds of the epoch, so that two are never the same."""
    return int(started.timestamp() * 1000)


_REMEMBERED_S: Final = 2.0
"""For this long two processes may both act after a start; they do the same."""


@dataclass
class Rank:
    """The rank of this process among all operators, read at most every two seconds. Thread-safe."""

    cluster: Cluster
    name: str
    priority: int
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _looked: float | None = None
    """When, on the monotonic clock."""
    _outranked: bool = False

    def outranked(self, now: datetime) -> bool:
        """Whether another live process ranks higher. Raises what the client raises."""
        with self._lock:
            at = time.monotonic()
            if self._looked is None or at - self._looked >= _REMEMBERED_S:
                self._outranked = outranked(self.cluster, self.name, self.priority, now)
                self._looked = at
            return self._outranked


def outranked(cluster: Cluster, name: str, own_priority: int, now: datetime) -> bool:
    """Whether another live process ranks higher."""
    peering = cluster.get(KIND, None, name) or {}
    peers: Mapping[str, Any] = peering.get("status") or {}
    return any(peer["priority"] > own_priority and alive(peer, now) for peer in peers.values())


def alive(peer: Mapping[str, Any], now: datetime) -> bool:
    """Whether the record of another operator has not expired. The record is kopf's: priority, lifetime in s,
    lastseen.
    """
    return datetime.fromisoformat(peer["lastseen"]) + timedelta(seconds=int(peer["lifetime"])) > now

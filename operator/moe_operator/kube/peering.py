"""Whether this process is the active one among several operators of a cluster.

kopf writes a record of every process into the status of a peering object and stops the watches of processes
that are outranked. It cannot stop running or queued reconciles, so each checks here first.
Ranks are start times: the process that started last is active, so a new operator never waits until the record
of its predecessor expires.
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
LOCAL_KIND: Final = "KopfPeering"
"""Of one namespace, where the operator does not watch all."""
API_VERSION: Final = "kopf.dev/v1"


def manifest(name: str, namespace: str = "") -> Manifest:
    """The peering object of the cluster, or of a namespace; kopf fills its status."""
    place = {"namespace": namespace} if namespace else {}
    return {
        "apiVersion": API_VERSION,
        "kind": LOCAL_KIND if namespace else KIND,
        "metadata": {"name": name, **place},
    }


def priority(started: datetime) -> int:
    """Rank of a process: its start in milliseconds since the epoch, so that no two are equal."""
    return int(started.timestamp() * 1000)


_REMEMBERED_S: Final = 2.0
"""For so long after a start, two processes may both be active; both do the same."""


@dataclass
class Rank:
    """The rank of this process among all operators; read at most every two seconds. Thread-safe."""

    cluster: Cluster
    name: str
    priority: int
    namespace: str = ""
    """Of the peering object: one of the watched ones, which all have the same; empty for the cluster's."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _read_at: float | None = None
    """Time of the last read, on the monotonic clock."""
    _outranked: bool = False

    def outranked(self, now: datetime) -> bool:
        """Whether another live process ranks higher. Raises what the client raises."""
        with self._lock:
            at = time.monotonic()
            if self._read_at is None or at - self._read_at >= _REMEMBERED_S:
                self._outranked = outranked(self.cluster, self.name, self.priority, now, self.namespace)
                self._read_at = at
            return self._outranked


@dataclass(frozen=True)
class Record:
    """The record of one process, as kopf writes it."""

    priority: int
    expires: datetime

    @staticmethod
    def parse(record: Mapping[str, Any]) -> Record:
        """Reads priority, lastseen (ISO 8601) and lifetime (seconds)."""
        lifetime = timedelta(seconds=int(record["lifetime"]))
        return Record(int(record["priority"]), datetime.fromisoformat(record["lastseen"]) + lifetime)


def outranked(cluster: Cluster, name: str, own_priority: int, now: datetime, namespace: str = "") -> bool:
    """Whether another live process ranks higher."""
    kind = LOCAL_KIND if namespace else KIND
    peering = cluster.get(kind, namespace or None, name) or {}
    records = map(Record.parse, (peering.get("status") or {}).values())
    return any(record.priority > own_priority and record.expires > now for record in records)

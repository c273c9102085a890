"""Maintains the cache: lists a kind in chunks, then watches it, each kind in a supervised thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from moe_api.supervision import Backoff, Supervisor
from moe_operator.errors import ClusterUnavailableError, HistoryExpiredError, ReadForbiddenError
from moe_operator.kube.client import Cluster
from moe_operator.kube.mirror import Mirror, Place, deployment_of
from moe_operator.resources import names

_CHUNK: Final = 500
"""Objects of one list request: 20,000 pods at once would take hundreds of MB to parse."""
_BACKOFF: Final = Backoff(first_s=1.0, longest_s=8.0)
_BETWEEN_WATCHES_S: Final = 0.2
"""Avoids a tight loop if a server ends every watch at once."""

Changed = Callable[[str, str], None]
"""Called with the namespace and name of a deployment after a change, in the watcher's thread."""


@dataclass
class Follower:
    """Watches the objects of one kind that have a deployment's label."""

    cluster: Cluster
    mirror: Mirror
    kind: str
    changed: Changed
    readable: Callable[[], None] = lambda: None
    """Called in the watcher's thread when the kind can be listed after it was forbidden."""
    settled: threading.Event = field(default_factory=threading.Event)
    """Set when all initial objects are in the cache, or listing is forbidden."""
    _stopping: threading.Event = field(default_factory=threading.Event)
    _version: str | None = None
    """Where to watch from; None where everything has to be listed."""
    _forbidden: bool = False

    def start(self, supervisor: Supervisor) -> None:
        """Starts the thread, which ends only after `stop`."""
        supervisor.start_thread("watch", self._follow, self._stopping, self.kind, _BACKOFF)

    def stop(self) -> None:
        """Lets the thread end; nobody needs to wait for it."""
        self._stopping.set()

    def _follow(self) -> None:
        """Lists and watches until an error, which the supervisor logs and counts."""
        while not self._stopping.is_set():
            try:
                self._version = self._version or self._list()
                for event in self.cluster.watch(self.kind, names.LABEL_NAME, self._version):
                    self._version = self._take(event)
            except HistoryExpiredError:
                self._version = None
            except ClusterUnavailableError:
                raise  # the next watch continues from the last version
            except ReadForbiddenError:
                self._lose_sight()
                raise
            except Exception:
                self._version = None  # a change may be lost with what could not be read
                raise
            self._stopping.wait(_BETWEEN_WATCHES_S)

    def _lose_sight(self) -> None:
        """Without the right to read a kind, reconciles ask the API server themselves and report it."""
        self._forbidden = self._version is None
        self._version = None
        self.mirror.doubt(self.kind)
        self.settled.set()

    def _list(self) -> str:
        """Puts all objects into the cache; returns the version to watch from."""
        there: dict[Place, int] = {}
        version, following = "", None
        while following or not version:
            chunk = self.cluster.chunk(self.kind, names.LABEL_NAME, _CHUNK, following)
            for manifest in chunk.items:
                metadata = manifest["metadata"]
                there[Place(metadata["namespace"], metadata["name"])] = int(metadata["resourceVersion"])
                self._put(manifest)
            version, following = chunk.version, chunk.following
        for namespace, deployment in self.mirror.replace(self.kind, there, int(version)):
            self.changed(namespace, deployment)
        self.settled.set()
        if self._forbidden:
            self._forbidden = False
            self.readable()
        return version

    def _take(self, event: dict[str, Any]) -> str:
        """One event of a watch; returns the version after it."""
        manifest = event["object"]
        metadata = manifest["metadata"]
        if event["type"] == "DELETED":
            self.mirror.drop(self.kind, metadata["namespace"], metadata["name"], metadata["uid"])
            self.changed(metadata["namespace"], deployment_of(manifest))
        elif event["type"] != "BOOKMARK":
            self._put(manifest)
        return str(metadata["resourceVersion"])

    def _put(self, manifest: dict[str, Any]) -> None:
        """The cache already has the result of an own write."""
        if self.mirror.put(self.kind, manifest):
            self.changed(manifest["metadata"]["namespace"], deployment_of(manifest))

"""Keeps the mirror true: lists a kind in chunks, then watches it, each kind in a thread."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from moe_operator.errors import MoEOperatorError
from moe_operator.kube.client import Cluster, HistoryExpiredError
from moe_operator.kube.mirror import Mirror, Place, deployment_of
from moe_operator.resources import names

logger = logging.getLogger(__name__)

_CHUNK: Final = 500
"""Objects of one list request: 20,000 pods at once would take hundreds of MB to parse."""
_LONGEST_PAUSE_S: Final = 8.0
_BETWEEN_WATCHES_S: Final = 0.2
"""A server that ends every watch at once shall not be asked in a tight loop."""

Changed = Callable[[str, str], None]
"""Told the namespace and name of a deployment of which something changed, in the follower's thread."""


@dataclass
class Follower:
    """Follows the objects of one kind that carry a deployment's label."""

    cluster: Cluster
    mirror: Mirror
    kind: str
    changed: Changed
    listed: threading.Event = field(default_factory=threading.Event)
    """Set once everything that there was at the start is in the mirror."""
    _stopping: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Starts the thread, which never ends by itself."""
        threading.Thread(target=self._run, name=f"follow-{self.kind}", daemon=True).start()

    def stop(self) -> None:
        """Lets the thread end; nobody needs to wait for it."""
        self._stopping.set()

    def _run(self) -> None:
        failures, version = 0, None
        while not self._stopping.is_set():
            try:
                version = version or self._list()
                for event in self.cluster.watch(self.kind, names.LABEL_NAME, version):
                    failures, version = 0, self._take(event)
                self._stopping.wait(_BETWEEN_WATCHES_S)
            except HistoryExpiredError:
                version = None
            except MoEOperatorError as error:
                failures += 1
                pause = min(2.0**failures, _LONGEST_PAUSE_S) * (1 - random.random() / 2)  # noqa: S311
                logger.warning("%s: %s; following it again in %.1f s", self.kind, error, pause)
                self._stopping.wait(pause)

    def _list(self) -> str:
        """Puts everything into the mirror; returns the version to watch from."""
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
        self.listed.set()
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
        """What our own write brought here already is no news."""
        if self.mirror.put(self.kind, manifest):
            self.changed(manifest["metadata"]["namespace"], deployment_of(manifest))

"""Maintains the cache: each kind is listed and watched in a supervised thread."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Final

from moe_api.listwatch import Event, ListWatch, Manifest, Page, Source
from moe_api.supervision import Backoff, Supervisor
from moe_operator.errors import KindUnknownError, ReadForbiddenError
from moe_operator.kube.cache import ObjectCache, Place, deployment_of
from moe_operator.render.children import OPTIONAL_KINDS

_LOG: Final = logging.getLogger(__name__)
_BACKOFF: Final = Backoff(first_s=1.0, longest_s=8.0)
UNKNOWN_S: Final = 30.0
"""Pause before the API server is asked again for an optional kind that it does not serve, or not to us."""

Changed = Callable[[str, str], None]
"""Called with the namespace and name of a deployment after a change, in the watcher's thread."""


class KindWatcher:
    """Watches the objects of one kind that have a deployment's label, and keeps the cache equal to them.

    Args:
        source: the objects.
        cache: of observed objects.
        kind: of the objects.
        changed: called for every deployment one of whose objects changed.
        readable: called in the watcher's thread when the kind can be listed after that was forbidden.
        settled: called in the watcher's thread when all initial objects are in the cache, or listing is
            forbidden; once or more often.
        namespace: of the source; empty if it has objects of all namespaces.
    """

    def __init__(
        self,
        source: Source,
        cache: ObjectCache,
        kind: str,
        changed: Changed,
        readable: Callable[[], None] = lambda: None,
        settled: Callable[[], None] = lambda: None,
        namespace: str = "",
    ) -> None:
        self._cache = cache
        self._kind = kind
        self._namespace = namespace
        self._changed = changed
        self._readable = readable
        self._settled = settled
        self._stopping = threading.Event()
        self._watch = ListWatch(source, self, self._stopping)
        self._listed = False
        """A list succeeded since reading was last forbidden."""
        self._forbidden = False
        """Listing is forbidden."""
        self._warned = False
        """That it is forbidden is in the log."""

    def start(self, supervisor: Supervisor) -> None:
        """Starts the thread, which ends only after `stop`."""
        supervisor.start_thread("watch", self._watch_on, self._stopping, self._title, _BACKOFF)

    @property
    def _title(self) -> str:
        return f"{self._kind} in {self._namespace}" if self._namespace else self._kind

    def stop(self) -> None:
        """Lets the thread end; callers need not wait for it."""
        self._stopping.set()

    def replace(self, pages: Iterator[Page]) -> None:
        """Puts all objects into the cache and drops those that do not exist any more."""
        there: dict[Place, int] = {}
        version = "0"
        for page in pages:
            version = page.version
            for manifest in page.items:
                metadata = manifest["metadata"]
                there[Place(metadata["namespace"], metadata["name"])] = int(metadata["resourceVersion"])
                self._put(manifest)
        for namespace, deployment in self._cache.replace(self._kind, there, int(version), self._namespace):
            self._changed(namespace, deployment)
        self._listed, self._warned = True, False
        self._settled()
        if self._forbidden:
            self._forbidden = False
            self._readable()

    def take(self, event: Event) -> None:
        """A change of one object."""
        if event.kind != "DELETED":
            self._put(event.item)
            return
        metadata = event.item["metadata"]
        self._cache.drop(self._kind, metadata["namespace"], metadata["name"], metadata["uid"])
        self._changed(metadata["namespace"], deployment_of(event.item))

    def _watch_on(self) -> None:
        """Lists and watches until an error, which the supervisor logs and counts.

        An optional kind that cannot be read is no error: of one that the API server does not serve there are
        no objects, and one that is forbidden concerns only deployments that use it: reconciles report it.
        """
        while not self._stopping.is_set():
            try:
                self._watch.run()
            except ReadForbiddenError as error:
                if self._kind not in OPTIONAL_KINDS:
                    self._lose_sight()
                    raise
                self._do_without(error)
                self._stopping.wait(UNKNOWN_S)

    def _do_without(self, error: ReadForbiddenError) -> None:
        """Goes on without an optional kind."""
        if isinstance(error, KindUnknownError):
            self.replace(iter([Page([], str(sys.maxsize))]))
            return
        if not self._warned:
            _LOG.warning("%s; only deployments with objects of this kind (%s) need it", error, self._kind)
        self._warned = True
        self._lose_sight()

    def _lose_sight(self) -> None:
        """Without the right to read a kind, reconciles ask the API server themselves and report it."""
        self._forbidden = not self._listed
        self._listed = False
        self._cache.doubt(self._kind, self._namespace)
        self._settled()

    def _put(self, manifest: Manifest) -> None:
        """The cache already has the result of an own write."""
        metadata = manifest["metadata"]
        after = deployment_of(manifest)
        before = self._cache.owner(self._kind, metadata["namespace"], metadata["name"]) or after
        if self._cache.put(self._kind, manifest):
            for deployment in {before, after}:
                self._changed(metadata["namespace"], deployment)

"""Lists a collection of Kubernetes objects, then watches it.

The operator, the frontend and the local cluster's network agent each bring a connection (`Transport`) and a
cache (`Cache`); this module does the rest. Protocol: kubernetes.io/docs/reference/using-api/api-concepts,
"Efficient detection of changes".
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

Manifest: TypeAlias = dict[str, Any]
"""A Kubernetes object as JSON."""
Query: TypeAlias = Mapping[str, str | int]

_EXPIRED: Final = 410
_PAUSE_S: Final = 0.2
"""Between two watches: a server may end every watch at once."""


class ExpiredError(Exception):
    """The API server does not have the history since a version any more (410 Gone): list again."""


class UnavailableError(Exception):
    """The API server does not respond. No change is lost: the next watch continues at the last version."""


class Transport(Protocol):
    """A connection to the API server. Its methods raise ExpiredError and UnavailableError."""

    def get(self, path: str, query: Query) -> bytes:
        """The body of a response."""

    def stream(self, path: str, query: Query, silence_s: float) -> AbstractContextManager[Iterable[bytes]]:
        """The body of a response in pieces, as they come; fails if none comes for `silence_s` seconds."""


@dataclass(frozen=True)
class Page:
    """A part of a list, at the version of the whole list."""

    items: list[Manifest]
    version: str


@dataclass(frozen=True)
class Event:
    """An event of a watch: ADDED, MODIFIED, DELETED or BOOKMARK."""

    kind: str
    item: Manifest

    @property
    def version(self) -> str:
        """The version of the collection after the event."""
        return str(self.item["metadata"]["resourceVersion"])


class Source(Protocol):
    """What can be listed and watched."""

    def pages(self) -> Iterator[Page]:
        """All objects of one version."""

    def events(self, version: str) -> Iterator[Event]:
        """Changes since a version, until the server ends the watch."""


class Cache(Protocol):
    """Takes what a list-watch finds, in its thread."""

    def replace(self, pages: Iterator[Page]) -> None:
        """A complete list: objects that it lacks are deleted."""

    def take(self, event: Event) -> None:
        """A change of one object; no BOOKMARK."""


@dataclass(frozen=True)
class Collection:
    """The objects below a path of the API server.

    path: such as /api/v1/pods.
    selector: labels; empty: all objects.
    page_size: objects of one list request. 20,000 pods at once would take hundreds of MB to parse.
    watch_s: after this time the server ends a watch.
    silence_s: a connection on which nothing came for so long is dead; a bookmark comes every minute.
    decode: parses JSON.
    """

    transport: Transport
    path: str
    selector: str = ""
    page_size: int = 500
    watch_s: int = 300
    silence_s: float = 90.0
    decode: Callable[[bytes], Any] = json.loads

    def pages(self) -> Iterator[Page]:
        """All objects of one version."""
        following: Query = {}
        while True:
            query = {**self._selection, "limit": self.page_size, **following}
            found = self.decode(self.transport.get(self.path, query))
            # The items of a list do not say what they are.
            meaning = {"apiVersion": found["apiVersion"], "kind": found["kind"].removesuffix("List")}
            metadata = found["metadata"]
            yield Page([{**item, **meaning} for item in found["items"]], metadata["resourceVersion"])
            if not metadata.get("continue"):
                return
            following = {"continue": metadata["continue"]}

    def events(self, version: str) -> Iterator[Event]:
        """Changes since a version, until the server ends the watch."""
        query = {
            **self._selection,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": self.watch_s,
        }
        with self.transport.stream(self.path, query, self.silence_s) as pieces:
            for line in lines(pieces):
                event = self.decode(line)
                if event["type"] == "ERROR":
                    raise _error(event["object"])
                yield Event(event["type"], event["object"])

    @property
    def _selection(self) -> Query:
        return {"labelSelector": self.selector} if self.selector else {}


class ListWatch:
    """Keeps a cache equal to a source; `run` is the work of a supervised thread.

    Args:
        source: lists and watches.
        cache: takes what is found.
        stopping: ends `run` at the next event.
    """

    def __init__(self, source: Source, cache: Cache, stopping: threading.Event) -> None:
        self._source = source
        self._cache = cache
        self._stopping = stopping
        self._version: str | None = None
        """Where to watch from; None if everything has to be listed."""

    def run(self) -> None:
        """Lists and watches until an error or `stopping`.

        After UnavailableError the next call continues at the last version. After any other error it lists
        again, because a change may be lost with what could not be read.
        """
        while not self._stopping.is_set():
            try:
                self._list_and_watch()
            except UnavailableError:
                raise
            except ExpiredError:
                self._version = None
            except Exception:
                self._version = None
                raise
            self._stopping.wait(_PAUSE_S)

    def _list_and_watch(self) -> None:
        self._version = self._version or self._list()
        for event in self._source.events(self._version):
            if self._stopping.is_set():
                return
            if event.kind != "BOOKMARK":
                self._cache.take(event)
            self._version = event.version

    def _list(self) -> str:
        version = ""

        def pages() -> Iterator[Page]:
            nonlocal version
            for page in self._source.pages():
                version = page.version
                yield page

        self._cache.replace(pages())
        return version


class Snapshot:
    """A cache for small collections: all objects by "namespace/name".

    Args:
        changed: called with all objects after each list and each change.
    """

    def __init__(self, changed: Callable[[Mapping[str, Manifest]], None]) -> None:
        self._changed = changed
        self._objects: Mapping[str, Manifest] = {}

    def replace(self, pages: Iterator[Page]) -> None:
        """A complete list."""
        self._set({_key(item): item for page in pages for item in page.items})

    def take(self, event: Event) -> None:
        """A change of one object."""
        name = _key(event.item)
        others = {known: item for known, item in self._objects.items() if known != name}
        self._set(others if event.kind == "DELETED" else {**others, name: event.item})

    def _set(self, objects: Mapping[str, Manifest]) -> None:
        self._objects = objects
        self._changed(objects)


def lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The complete lines of a stream, however it is cut into pieces."""
    rest = b""
    for piece in pieces:
        *complete, rest = (rest + piece).split(b"\n")
        yield from complete


def _key(item: Manifest) -> str:
    metadata = item["metadata"]
    return f"{metadata.get('namespace', '')}/{metadata['name']}"


def _error(status: Mapping[str, Any]) -> Exception:
    said = str(status.get("message"))
    return ExpiredError(said) if status.get("code") == _EXPIRED else UnavailableError(said)

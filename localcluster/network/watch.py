"""Lists and watches one kind of object at the API server, with the standard library only.

The list-then-watch protocol: kubernetes.io/docs/reference/using-api/api-concepts, "Efficient detection of
changes".
"""

from __future__ import annotations

import http.client
import json
import logging
import ssl
from collections.abc import Callable, Iterator
from typing import Any

from localcluster.layout import API_PORT, INSIDE, NODE_ADDRESS

_IDENTITY = "network-agent"
_WATCH_SECONDS = 300
_log = logging.getLogger(__name__)


class WatchExpiredError(Exception):
    """The API server no longer knows the version to watch from (410 Gone); list again."""


def _connect(timeout: float) -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile=str(INSIDE.pki / "ca.crt"))
    context.load_cert_chain(INSIDE.pki / f"{_IDENTITY}.crt", INSIDE.pki / f"{_IDENTITY}.key")
    return http.client.HTTPSConnection(str(NODE_ADDRESS), API_PORT, timeout=timeout, context=context)


def _open(connection: http.client.HTTPSConnection, path: str) -> http.client.HTTPResponse:
    connection.request("GET", path)
    response = connection.getresponse()
    if response.status == http.client.GONE:
        raise WatchExpiredError
    if response.status != http.client.OK:
        raise ConnectionError(f"GET {path}: {response.status} {response.read(500)!r}")
    return response


def list_objects(path: str) -> tuple[str, list[dict[str, Any]]]:
    """The objects below an API path, and the version to watch from."""
    connection = _connect(timeout=10)
    try:
        content = json.load(_open(connection, path))
        return content["metadata"]["resourceVersion"], content["items"]
    finally:
        connection.close()


def changes(path: str, version: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (ADDED, MODIFIED or DELETED; object) until the API server ends the watch."""
    connection = _connect(timeout=_WATCH_SECONDS + 30)
    try:
        query = f"watch=1&allowWatchBookmarks=true&resourceVersion={version}&timeoutSeconds={_WATCH_SECONDS}"
        for line in _open(connection, f"{path}?{query}"):
            event = json.loads(line)
            if event["type"] == "ERROR":
                raise WatchExpiredError
            yield event["type"], event["object"]
    finally:
        connection.close()


def follow(path: str, on_change: Callable[[dict[str, dict[str, Any]]], None]) -> None:
    """Calls `on_change` with all objects by "namespace/name", now and after every change, until an error.

    For a supervised thread, which calls it again.
    """
    while True:
        try:
            version, items = list_objects(path)
            objects = {_key(item): item for item in items}
            on_change(dict(objects))
            _follow_changes(path, version, objects, on_change)
        except WatchExpiredError:
            _log.info("%s: watch expired, listing again", path)


def _follow_changes(
    path: str,
    version: str,
    objects: dict[str, dict[str, Any]],
    on_change: Callable[[dict[str, dict[str, Any]]], None],
) -> None:
    for kind, item in changes(path, version):
        if kind == "BOOKMARK":
            continue
        if kind == "DELETED":
            objects.pop(_key(item), None)
        else:
            objects[_key(item)] = item
        on_change(dict(objects))


def _key(item: dict[str, Any]) -> str:
    return f"{item['metadata']['namespace']}/{item['metadata']['name']}"

"""A cache of the API server's objects: reading it costs no request.

Watches and the responses to own writes fill it, so each plan sees the effects of the previous one. The newest
resourceVersion wins, regardless of its source: Kubernetes allows comparing those of one kind as numbers.
Objects are stored as compressed JSON, because 20,000 pods as Python values would take half a gigabyte.
Reading them is most of the cost of a reconcile, so orjson decodes them.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from moe_operator.observed.ownership import is_ours
from moe_operator.observed.pod_status import secret_of
from moe_operator.render.children import KINDS
from moe_operator.render.objects import Manifest
from moe_operator.resources import names
from moe_operator.resources.ports import PORT_NAMES

_FASTEST = 1
"""zlib level: a StatefulSet shrinks to a third in 60 us; higher levels gain little."""

_OF_A_POD = ("nodeName", "readinessGates", "schedulerName")
"""The fields of a pod's spec that are read, in addition to ports that say how to call it, directories of
its node and Secrets. The rest is in its StatefulSet, and there are many pods.
"""

_REMEMBERED_S = 120.0
"""For how long a pod that failed is kept, at least."""


class Place(NamedTuple):
    """Which object of a kind."""

    namespace: str
    name: str


@dataclass(slots=True)
class _Entry:
    version: int
    uid: str
    deployment: str
    content: bytes
    verdict: str = ""
    """The verdict about this version; a newer version is another entry."""


@dataclass
class ObjectCache:
    """Cached objects of some kinds. Thread-safe."""

    kinds: frozenset[str]
    """The watched kinds; objects of other kinds are not stored."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _entries: dict[str, dict[Place, _Entry]] = field(default_factory=lambda: defaultdict(dict))
    _by_deployment: dict[tuple[str, Place], set[Place]] = field(default_factory=lambda: defaultdict(set))
    _complete: set[tuple[str, str]] = field(default_factory=set)
    """Kinds, each with the namespace that was listed; "" stands for all."""
    _failed: dict[Place, tuple[float, Manifest]] = field(default_factory=dict)
    """Workers that their nodes evicted or rejected, and when that was seen (time.monotonic)."""
    _doubted: set[tuple[str, str]] = field(default_factory=set)
    """Those that could not be listed at the last attempt."""

    def complete(self, kind: str, namespace: str = "") -> bool:
        """Whether all objects of a kind, at least in a namespace, have been listed once.

        Only then does absence mean anything.
        """
        return not self._complete.isdisjoint({(kind, ""), (kind, namespace)})

    def doubted(self, kind: str, namespace: str = "") -> bool:
        """Whether a kind could not be listed at the last attempt, so that asking for it again is in vain."""
        return not self._doubted.isdisjoint({(kind, ""), (kind, namespace)})

    def doubt(self, kind: str, namespace: str = "") -> None:
        """Marks a kind as not watched: until the next complete list, absence means nothing."""
        with self._lock:
            self._complete.discard((kind, namespace))
            self._doubted.add((kind, namespace))

    def put(self, kind: str, manifest: Manifest) -> bool:
        """Stores an object unless a newer version is here; returns whether it was new."""
        if kind not in self.kinds:
            return False
        place, entry = _entry(manifest)
        with self._lock:
            is_new = self._put(kind, place, entry)
            if is_new and kind == "Pod" and _is_failed_worker(manifest):
                self._remember(place, _unpacked(entry))
            return is_new

    def drop(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """Removes a deleted object, but not a newer one of the same name."""
        place = Place(namespace, name)
        with self._lock:
            entry = self._entries[kind].get(place)
            if entry is not None and entry.uid == uid:
                self._drop(kind, place)

    def replace(
        self, kind: str, listed: Mapping[Place, int], version: int, namespace: str = ""
    ) -> set[Place]:
        """After a complete list at a version, whose objects were all put: removes those that it lacks.

        namespace: the one that was listed; empty for all.

        Returns the deployments, as (namespace, name), that lost an object.
        """
        with self._lock:
            stale = [
                place
                for place, entry in self._entries[kind].items()
                if place not in listed and entry.version <= version and namespace in ("", place.namespace)
            ]
            losers = {Place(place.namespace, self._entries[kind][place].deployment) for place in stale}
            for place in stale:
                self._drop(kind, place)
            self._complete.add((kind, namespace))
            self._doubted.discard((kind, namespace))
            return losers

    def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        """An object, or None when there is none here."""
        with self._lock:
            entry = self._entries[kind].get(Place(namespace, name))
        return None if entry is None else _unpacked(entry)

    def failed_pod(self, namespace: str, name: str) -> Manifest | None:
        """The last worker of this name that its node evicted or rejected, if that was recently.

        The StatefulSet controller replaces such a pod at once, faster than reconciles follow.
        """
        with self._lock:
            return self._failed.get(Place(namespace, name), (0.0, None))[1]

    def _remember(self, place: Place, pod: Manifest) -> None:
        now = time.monotonic()
        kept = {of: known for of, known in self._failed.items() if now - known[0] < _REMEMBERED_S}
        self._failed = {**kept, place: (now, pod)}

    def owner(self, kind: str, namespace: str, name: str) -> str | None:
        """The deployment whose label a cached object carries; None if it is not here."""
        with self._lock:
            entry = self._entries[kind].get(Place(namespace, name))
        return None if entry is None else entry.deployment

    def all(self, kind: str) -> list[Manifest]:
        """All objects of a kind that are here."""
        with self._lock:
            entries = list(self._entries[kind].values())
        return [_unpacked(entry) for entry in entries]

    def of_deployment(self, kind: str, namespace: str, deployment: str) -> list[Manifest]:
        """The objects that carry a deployment's label."""
        with self._lock:
            places = sorted(self._by_deployment.get((kind, Place(namespace, deployment)), ()))
            entries = [self._entries[kind][place] for place in places]
        return [_unpacked(entry) for entry in entries]

    def note(self, manifests: Iterable[Manifest], verdict: str) -> None:
        """Stores verdicts about cached objects until they change."""
        with self._lock:
            for manifest in manifests:
                entry = self._entry_of(manifest)
                if entry is not None:
                    entry.verdict = verdict

    def verdict(self, manifest: Manifest) -> str:
        """The verdict about this version of an object; empty if there is none."""
        with self._lock:
            entry = self._entry_of(manifest)
            return "" if entry is None else entry.verdict

    def _entry_of(self, manifest: Manifest) -> _Entry | None:
        metadata = manifest["metadata"]
        entry = self._entries[manifest["kind"]].get(Place(metadata["namespace"], metadata["name"]))
        return entry if entry is not None and entry.version == int(metadata["resourceVersion"]) else None

    def _put(self, kind: str, place: Place, entry: _Entry) -> bool:
        before = self._entries[kind].get(place)
        if before is not None and before.version >= entry.version:
            return False
        if before is not None and before.deployment != entry.deployment:
            self._drop(kind, place)
        self._entries[kind][place] = entry
        self._by_deployment[kind, Place(place.namespace, entry.deployment)].add(place)
        return True

    def _drop(self, kind: str, place: Place) -> None:
        entry = self._entries[kind].pop(place)
        owner = (kind, Place(place.namespace, entry.deployment))
        self._by_deployment[owner].discard(place)
        if not self._by_deployment[owner]:
            del self._by_deployment[owner]


def deployment_of(manifest: Mapping[str, Any]) -> str:
    """The deployment whose label an object carries; of a MoEDeployment, its own name."""
    metadata = manifest["metadata"]
    return str((metadata.get("labels") or {}).get(names.LABEL_NAME) or metadata["name"])


def _entry(manifest: Manifest) -> tuple[Place, _Entry]:
    metadata = {name: value for name, value in manifest["metadata"].items() if name != "managedFields"}
    if manifest["kind"] in KINDS:
        metadata["managedFields"] = [*filter(is_ours, manifest["metadata"].get("managedFields", ()))]
    kept = {**manifest, "metadata": metadata}
    if manifest["kind"] == "Pod" and "spec" in manifest:
        kept["spec"] = _read_of_pod(manifest["spec"])
    entry = _Entry(
        int(metadata["resourceVersion"]),
        metadata["uid"],
        deployment_of(manifest),
        zlib.compress(orjson.dumps(kept), _FASTEST),
    )
    return Place(metadata["namespace"], metadata["name"]), entry


def _read_of_pod(spec: Manifest) -> Manifest:
    """The part of a pod's spec that `observed.pods.read` reads."""
    lists = {
        "volumes": [volume for volume in spec.get("volumes", ()) if _is_read(volume)],
        "containers": [kept for container in spec.get("containers", ()) if (kept := _named_ports(container))],
    }
    kept = {name: spec[name] for name in _OF_A_POD if name in spec}
    return {**kept, **{name: items for name, items in lists.items() if items}}


def _is_failed_worker(pod: Manifest) -> bool:
    """Whether its node evicted or rejected it: only then does the status of a pod have a reason."""
    labels, status = pod["metadata"].get("labels") or {}, pod.get("status", {})
    is_failed = status.get("phase") == "Failed" and bool(status.get("reason"))
    return is_failed and labels.get(names.LABEL_ROLE) == names.ROLE_WORKER


def _is_read(volume: Manifest) -> bool:
    return "hostPath" in volume or bool(secret_of(volume))


def _named_ports(container: Manifest) -> Manifest:
    ports = [port for port in container.get("ports", ()) if port.get("name") in PORT_NAMES]
    return {"name": container["name"], "ports": ports} if ports else {}


def _unpacked(entry: _Entry) -> Manifest:
    found: Manifest = orjson.loads(zlib.decompress(entry.content))
    return found

"""Keeps the Secrets with authorities and certificates of each namespace whose deployments use mutual TLS."""

from __future__ import annotations

import base64
import binascii
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from moe_api import mutual, tls
from moe_api.tls import KeyPair
from moe_operator.certificates import renewal
from moe_operator.certificates.issuing import Authority, issue
from moe_operator.errors import ApplyRefusedError, ClusterUnavailableError
from moe_operator.kube.client import Cluster
from moe_operator.render.objects import Manifest
from moe_operator.resources import names

_LOG: Final = logging.getLogger(__name__)
_COMPONENTS: Final = {
    names.WORKER_CERTIFICATE_SECRET: mutual.WORKER,
    names.FRONTEND_CERTIFICATE_SECRET: mutual.FRONTEND,
}
CHECKED_S: Final = 240.0
"""Between two checks of the Secrets of a namespace; a bit less than between two reconciles."""
NEEDED_S: Final = 2.0
"""The same while a pod waits to mount them: they may have been deleted, with their namespace for one."""
FAILED_S: Final = 30.0
"""For so long after a check that the API server did not answer the next ones fail at once: that one may have
taken the whole limit of a request. It is NEEDED_S while there is no certificate.
"""


@dataclass(frozen=True)
class _Namespace:
    own: KeyPair
    """The operator's."""
    checked_at: float


@dataclass(frozen=True)
class _Failure:
    error: ClusterUnavailableError
    at: float


class Certificates:
    """Issues and renews certificates, and has the operator's own. Thread-safe; its effects block.

    Args:
        cluster: the API server.
        clock: the current time.
        monotonic: seconds.
    """

    def __init__(
        self,
        cluster: Cluster,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._clock, self._monotonic = cluster, clock, monotonic
        self._lock = threading.Lock()
        self._checking: dict[str, threading.Lock] = {}
        """One for each namespace: a slow admission webhook of one must not keep others waiting."""
        self._known: dict[str, _Namespace] = {}
        self._failed: dict[str, _Failure] = {}

    def identity(self, namespace: str) -> KeyPair | None:
        """The operator's certificate for the pods of a namespace; None before `ensure`. Does not block."""
        known = self._known.get(namespace)
        return None if known is None else known.own

    def ensure(self, namespace: str, *, needed: bool = False) -> None:
        """Brings the Secrets of a namespace up to date, if they were not checked lately.

        Does not wait for another thread that checks them, unless that is the first check.

        needed: a pod waits to mount them.

        Raises:
            RetryableError: a Secret cannot be read or written.
            ApplyRefusedError: the API server refused a Secret, or its name is taken.
        """
        with self._lock:
            checking = self._checking.setdefault(namespace, threading.Lock())
        if not checking.acquire(blocking=namespace not in self._known):
            return
        try:
            known, now = self._known.get(namespace), self._monotonic()
            if known is None or now - known.checked_at > (NEEDED_S if needed else CHECKED_S):
                self._known[namespace] = self._checked(namespace, known, now)
        finally:
            checking.release()

    def _checked(self, namespace: str, known: _Namespace | None, now: float) -> _Namespace:
        """As `_ensured`. Soon after the API server did not answer, it is not asked again."""
        failed = self._failed.pop(namespace, None)
        if failed is not None and now - failed.at < (NEEDED_S if known is None else FAILED_S):
            self._failed[namespace] = failed
            raise ClusterUnavailableError(str(failed.error))
        try:
            return self._ensured(namespace, known, now)
        except ClusterUnavailableError as error:
            self._failed[namespace] = _Failure(error, self._monotonic())
            raise

    def _ensured(self, namespace: str, known: _Namespace | None, checked_at: float) -> _Namespace:
        now = self._clock()
        authorities = self._authorities(namespace, now)
        trusted, signer = renewal.bundle(authorities), renewal.signing(authorities, now)
        for secret, component in _COMPONENTS.items():
            before = self._read(namespace, secret)
            if why := renewal.due(_content(before), component, authorities, now):
                pair = issue(signer, component, trusted, now)
                self._write(before, namespace, secret, "kubernetes.io/tls", files(pair))
                _LOG.info("%s/%s: a certificate was issued: %s", namespace, secret, why)
        own = None if known is None else known.own
        if own is None or renewal.due(files(own), mutual.OPERATOR, authorities, now):
            own = issue(signer, mutual.OPERATOR, trusted, now)
        return _Namespace(own, checked_at)

    def _authorities(self, namespace: str, now: datetime) -> tuple[Authority, ...]:
        before = self._read(namespace, names.AUTHORITY_SECRET)
        known = renewal.read(_content(before))
        wanted = renewal.renewed(known, namespace, now)
        if wanted != known:
            content = renewal.written(wanted)
            self._write(before, namespace, names.AUTHORITY_SECRET, "Opaque", content)
            _LOG.info("%s/%s: has %d authorities now", namespace, names.AUTHORITY_SECRET, len(wanted))
        return wanted

    def _read(self, namespace: str, name: str) -> Manifest | None:
        """Raises ApplyRefusedError if the Secret is not the operator's."""
        found = self._cluster.read("Secret", namespace, name)
        if found is not None and not _is_ours(found):
            raise ApplyRefusedError(
                f"Secret {name} is not the operator's: it has no label {names.LABEL_MANAGED_BY}="
                f"{names.FIELD_MANAGER}, and internal TLS needs the name; rename the Secret"
            )
        return found

    def _write(
        self, before: Manifest | None, namespace: str, name: str, kind: str, content: Mapping[str, bytes]
    ) -> None:
        """Raises ChangedMeanwhileError if the Secret is not as it was read."""
        data = {key: base64.b64encode(value).decode() for key, value in content.items()}
        if before is None:
            self._cluster.create(_secret(namespace, name, kind, data))
        else:
            self._cluster.replace({**before, "apiVersion": "v1", "kind": "Secret", "data": data})


def files(pair: KeyPair) -> dict[str, bytes]:
    """A key pair as the content of a Secret."""
    return {tls.CERTIFICATE: pair.certificate, tls.KEY: pair.key, tls.AUTHORITIES: pair.authorities}


def _secret(namespace: str, name: str, kind: str, data: Mapping[str, str]) -> Manifest:
    labels = {
        "app.kubernetes.io/name": name,
        "app.kubernetes.io/part-of": names.FIELD_MANAGER,
        names.LABEL_MANAGED_BY: names.FIELD_MANAGER,
    }
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    return {"apiVersion": "v1", "kind": "Secret", "type": kind, "metadata": metadata, "data": dict(data)}


def _is_ours(secret: Mapping[str, Any]) -> bool:
    labels = secret["metadata"].get("labels") or {}
    return bool(labels.get(names.LABEL_MANAGED_BY) == names.FIELD_MANAGER)


def _content(secret: Manifest | None) -> dict[str, bytes]:
    """The files of a Secret; without those that are not base64."""
    found = {}
    for name, text in ((secret or {}).get("data") or {}).items():
        try:
            found[name] = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            continue
    return found

"""What kopf calls: start, stop, and every change of a deployment."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import Any

import kopf

from moe_api.metrics_server import MetricsServer, PortTakenError
from moe_operator.controller.operator import Operator
from moe_operator.controller.watches import WATCHED
from moe_operator.errors import InstallationError, MoEOperatorError
from moe_operator.kube import peering
from moe_operator.kube.cache import ObjectCache
from moe_operator.kube.client import Cluster, connect
from moe_operator.resources import names
from moe_operator.settings import Settings
from moe_operator.statuspage.server import StatusServer


def register(registry: kopf.OperatorRegistry, settings: Settings) -> None:
    """Adds the operator's handlers to a registry."""
    handlers = Handlers(settings)
    kopf.on.startup(registry=registry, id="start")(handlers.start)
    kopf.on.cleanup(registry=registry, id="stop")(handlers.stop)
    kopf.on.probe(registry=registry, id="background")(handlers.background)
    kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=registry, id="deployment")(
        handlers.deployment_changed
    )


class Handlers:
    """kopf's handlers. They translate its arguments and hand them to the operator."""

    def __init__(self, own: Settings) -> None:
        self._own = own
        self._operator: Operator | None = None

    async def start(self, *, settings: kopf.OperatorSettings, **_: Any) -> None:
        """Connects, checks the installation, and starts what the other handlers use."""
        own = self._own
        configure(settings, own, datetime.now(UTC))
        try:
            cache = ObjectCache(frozenset({names.KIND, *WATCHED}))
            cluster = await asyncio.to_thread(connect, own.api_timeout_seconds, cache)
            await asyncio.to_thread(prepare_installation, cluster, own)
            server = _metrics_server(own)
            page = StatusServer(own.status_port) if own.status_port else None
        except MoEOperatorError as error:
            # One `kubectl apply` may create the CRDs and the operator, so the CRDs may exist soon.
            raise kopf.TemporaryError(str(error), delay=own.retry_first_seconds) from error
        self._operator = Operator(cluster, cache, own, settings.peering.priority, server, page)
        await self._operator.watch()

    async def stop(self, **_: Any) -> None:
        """Stops the operator."""
        if self._operator is not None:
            await self._operator.close()

    async def background(self, **_: Any) -> dict[str, dict[str, int]]:
        """The state of background loops: a part of the health response."""
        return {} if self._operator is None else self._operator.background()

    async def deployment_changed(self, *, event: Any, **_: Any) -> None:
        """A deployment was created, changed or deleted."""
        if self._operator is not None:
            self._operator.deployment_changed(event["type"], event["object"])


def _metrics_server(own: Settings) -> MetricsServer | None:
    """Serves metrics, if that is asked for. Raises InstallationError when the port is not available."""
    try:
        return MetricsServer(own.metrics_port) if own.metrics_port else None
    except PortTakenError as error:
        raise InstallationError(f"{error}; set another MOE_OPERATOR_METRICS_PORT") from error


def configure(settings: kopf.OperatorSettings, own: Settings, started: datetime) -> None:
    """Settings of kopf itself."""
    settings.peering.name = own.peering
    settings.peering.mandatory = not settings.peering.standalone
    settings.peering.lifetime = int(own.peering_lifetime_seconds)
    settings.peering.priority = settings.peering.priority or peering.priority(started)
    # Events are created from decisions; kopf's own only report its handlers.
    settings.posting.enabled = False
    # The CRDs exist before the operator starts; watching for more of them would need more rights.
    settings.scanning.disabled = True
    settings.networking.request_timeout = own.api_timeout_seconds
    settings.networking.connect_timeout = own.api_timeout_seconds
    # By default kopf pauses up to 21 s before it reconnects to the API server.
    settings.networking.error_backoffs = (1, 1, 2, 3, *[5] * 12)
    settings.watching.connect_timeout = own.api_timeout_seconds
    settings.watching.server_timeout = 300
    settings.watching.chunk_size = 500
    settings.process.ultimate_exiting_timeout = 20.0
    # They log every event and every probe; the operator logs its decisions.
    for noisy in ("kopf.objects", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # It logs every attempt; the operator logs the final failure itself.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def prepare_installation(cluster: Cluster, own: Settings) -> None:
    """Creates the peering object if it does not exist.

    Raises InstallationError when a CRD is missing: kopf would wait for it without a message.
    """
    for api_version in (names.API_VERSION, peering.API_VERSION):
        if not cluster.serves(api_version):
            raise InstallationError(
                f"{api_version} is not installed; install the chart, or apply charts/install.yaml"
            )
    for namespace in own.namespaces or ("",):
        cluster.apply(peering.manifest(own.peering, namespace))

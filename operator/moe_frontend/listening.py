"""The ports of a frontend: for clients, for the operator and probes, for Prometheus."""

import contextlib
import logging
from collections.abc import Coroutine, Iterator
from typing import Any, Final

from moe_api.metrics_server import MetricsServer, PortTakenError
from moe_api.supervision import Supervisor
from moe_frontend.edges import Edge
from moe_frontend.http.server import HttpServer
from moe_frontend.transport.service import Frontend
from moe_operator.errors import InstallationError

_LOG: Final = logging.getLogger("moe-frontend")


async def listen(
    frontend: Frontend,
    address: str,
    edge: Edge,
    admin: tuple[str, ...] | None,
    health: tuple[str, ...] | None = None,
) -> None:
    """Listens for gRPC clients, and for the operator and probes at the same address unless `admin` is
    another. With mutual TLS the operator needs a certificate there, and probes have `health`.

    Raises:
        InstallationError: an address cannot be listened on.
    """
    if admin is not None:
        internal = None if edge.internal is None else edge.internal.server_credentials()
        port = await _listening(frontend.start_admin(admin[0], internal), admin[0])
        _LOG.info("operator and probes on %s:%d", admin[0].rpartition(":")[0], port)
    if health is not None:
        port = await _listening(frontend.start_health(health[0]), health[0])
        _LOG.info("probes on %s:%d", health[0].rpartition(":")[0], port)
    credentials = None if edge.tls is None else edge.tls.grpc
    port = await _listening(frontend.start(address, credentials, administered=admin is None), address)
    _LOG.info("serving on %s:%d", address.rpartition(":")[0], port)


async def listen_http(server: HttpServer, address: str) -> None:
    """Listens for HTTP clients. Raises InstallationError."""
    port = await server.start(address)
    _LOG.info("serving HTTP on %s:%d", address.rpartition(":")[0], port)


@contextlib.contextmanager
def serving_metrics(port: int, supervisor: Supervisor) -> Iterator[None]:
    """Serves metrics on a port of their own during the block; 0: does not. Raises InstallationError."""
    if not port:
        yield
        return
    try:
        server = MetricsServer(port)
    except PortTakenError as error:
        raise InstallationError(str(error)) from error
    server.start(supervisor)
    try:
        yield
    finally:
        server.stop()


async def _listening(started: Coroutine[Any, Any, int], address: str) -> int:
    try:
        return await started
    except RuntimeError as error:
        raise InstallationError(
            f"cannot listen on {address}; use a free port and an address of this machine"
        ) from error

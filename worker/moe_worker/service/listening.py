"""The ports of a worker: for frontends and the operator, and for probes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from opentelemetry import metrics

from moe_api import expiry, mutual, tls
from moe_api.health import Health, health_server
from moe_api.mounted import Mounted, MountedError
from moe_api.supervision import Supervisor
from moe_worker.errors import SettingsError


def credentials(
    folder: Path | None, supervisor: Supervisor, meter: metrics.Meter | None = None
) -> grpc.ServerCredentials | None:
    """Of a server whose clients need a certificate of ca.crt; renewed files are used for new connections.

    folder: with tls.crt, tls.key and ca.crt; None: plaintext. meter: exports when the certificate expires;
    default: the process-wide one.

    Raises:
        SettingsError: the folder is not valid.
    """
    if folder is None:
        return None
    try:
        pair = Mounted(folder, mutual.parse)
    except MountedError as error:
        raise SettingsError(f"--tls {error}") from error
    supervisor.start("mounted", pair.watch, str(folder))
    expiry.measure(meter or metrics.get_meter("moe_worker"), {expiry.INTERNAL: lambda: pair.value})
    return tls.server_credentials(lambda: pair.value, mutual=True)


def bind(server: grpc.aio.Server, address: str, secured: grpc.ServerCredentials | None = None) -> int:
    """Binds a server to HOST:PORT, and returns the port. Raises SettingsError."""
    with _listening(address):
        if secured is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, secured)


async def probes(health: Health, address: str | None) -> list[grpc.aio.Server]:
    """A started server for probes, which know no TLS; none without an address. Raises SettingsError."""
    if address is None:
        return []
    server = await health_server(health)
    bind(server, address)
    await server.start()
    return [server]


@contextmanager
def _listening(address: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise SettingsError(f"cannot listen on {address}; give a free HOST:PORT of this machine") from error

"""grpc.health.v1 and server reflection for frontends and workers."""

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from moe_api import rich_status
from moe_api.server import create_server
from moe_api.writing import WRITE_TIMEOUT_S, SlowReaderError, Writer

LIVENESS: Final = "liveness"

_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
_Context = grpc.aio.ServicerContext[Any, Any]


class _Servicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpcio-health-checking has no types
    """Statuses of services, and watches of them.

    grpcio-health-checking has a servicer, but it writes to a client while it holds the lock of the service.
    One client that reads nothing then stops every change of the status and all other watches.
    """

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Event()
        self.closed = asyncio.Event()

    def set(self, service: str, status: int) -> None:
        """Changes the status of a service."""
        self._statuses[service] = status
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> health_pb2.HealthCheckResponse:
        """Returns the status of a service."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "service is unknown; reflection lists services")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> None:
        """Reports every change of a service's status until the client cancels or this server stops."""
        watching = asyncio.create_task(self._report(request.service, context))
        closed = asyncio.create_task(self.closed.wait())
        try:
            await asyncio.wait({watching, closed}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
        except SlowReaderError as error:
            await rich_status.abort(context, error.status)
        finally:
            watching.cancel()
            closed.cancel()
            await asyncio.gather(watching, closed, return_exceptions=True)

    async def _report(self, service: str, context: _Context) -> None:
        writer, last = Writer(context, WRITE_TIMEOUT_S), None
        while True:
            changed, status = self._changed, self._statuses.get(service, _UNKNOWN)
            if status != last:
                await writer.write(health_pb2.HealthCheckResponse(status=status))
                last = status
            await changed.wait()


class Health:
    """The health that probes see.

    Service ``""`` and the services by their names are SERVING while the process accepts requests (readiness);
    ``"liveness"`` is SERVING as long as the process responds at all.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self._servicer = _Servicer()
        self._readiness = ("", *services)

    async def register(self, server: grpc.aio.Server, services: Sequence[str] | None = None) -> None:
        """Adds the health service, not ready yet, and reflection of `services` (default: all) to a server."""
        await self.set_ready(ready=False)
        self._servicer.set(LIVENESS, _SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        reflected = self._readiness[1:] if services is None else services
        names = (*reflected, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)

    async def set_ready(self, *, ready: bool) -> None:
        """Tells probes and watchers whether the process accepts requests."""
        for service in self._readiness:
            self._servicer.set(service, _SERVING if ready else _NOT_SERVING)

    async def close(self) -> None:
        """For a server about to stop: reports not ready, then ends the watches."""
        await self.set_ready(ready=False)
        await asyncio.sleep(0.05)  # the watches need a few iterations of the event loop to send it
        self._servicer.closed.set()


async def health_server(health: Health) -> grpc.aio.Server:
    """A server of this health alone, for probes that cannot use the port of clients."""
    server = create_server()
    await health.register(server, ())
    return server

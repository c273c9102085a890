"""grpc.health.v1 and server reflection for frontends and workers."""

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

LIVENESS: Final = "liveness"

_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING


class _Servicer(health.aio.HealthServicer):  # type: ignore[misc]  # grpcio-health-checking has no types
    """Can end watches: a server that stops gracefully waits for all calls, and watches never end by
    themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.closed = asyncio.Event()

    async def Watch(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Reports every change of a service's status until the client cancels or this server stops."""
        watching = asyncio.create_task(super().Watch(request, context))
        closed = asyncio.create_task(self.closed.wait())
        try:
            await asyncio.wait({watching, closed}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
        finally:
            watching.cancel()
            closed.cancel()
            await asyncio.gather(watching, closed, return_exceptions=True)


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
        await self._servicer.set(LIVENESS, _SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        reflected = self._readiness[1:] if services is None else services
        names = (*reflected, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)

    async def set_ready(self, *, ready: bool) -> None:
        """Tells probes and watchers whether the process accepts requests."""
        for service in self._readiness:
            await self._servicer.set(service, _SERVING if ready else _NOT_SERVING)

    async def close(self) -> None:
        """For a server about to stop: reports not ready, then ends the watches."""
        await self.set_ready(ready=False)
        await asyncio.sleep(0.05)  # the watches need a few iterations of the event loop to send it
        self._servicer.closed.set()

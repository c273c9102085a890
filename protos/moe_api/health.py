"""grpc.health.v1 and server reflection, the same on the frontend and on the workers."""

from collections.abc import Sequence
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

LIVENESS: Final = "liveness"

_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """What probes are told.

    Service ``""`` and the services by their names are SERVING while the process takes requests (readiness);
    ``"liveness"`` is SERVING as long as the process answers at all.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self._servicer = health.aio.HealthServicer()
        self._readiness = ("", *services)

    async def register(self, server: grpc.aio.Server) -> None:
        """Adds the health service, not ready yet, and reflection of all services to a server."""
        await self.set_ready(ready=False)
        await self._servicer.set(LIVENESS, _SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        names = (*self._readiness[1:], health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)

    async def set_ready(self, *, ready: bool) -> None:
        """Tells probes and watchers whether requests are taken."""
        for service in self._readiness:
            await self._servicer.set(service, _SERVING if ready else _NOT_SERVING)

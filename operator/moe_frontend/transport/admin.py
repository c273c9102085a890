"""What the operator and the kubelet ask a frontend, on a port of its own: clients need not reach it."""

from __future__ import annotations

from typing import Any, Final

import grpc

from moe_api import rich_status
from moe_api.frontend.v1 import frontend_pb2, frontend_pb2_grpc
from moe_api.health import Health
from moe_api.rich_status import FieldViolation
from moe_api.server import create_server
from moe_frontend.transport.forwarding import Forwarder
from moe_frontend.transport.holding import Hold

SERVICE: Final = frontend_pb2.DESCRIPTOR.services_by_name["FrontendService"].full_name
_LONGEST_WAIT_S: Final = 60
_Context = grpc.aio.ServicerContext[Any, Any]


class ForOperator(frontend_pb2_grpc.FrontendServiceServicer):
    """moe_api.frontend.v1.FrontendService."""

    def __init__(self, hold: Hold, forwarder: Forwarder) -> None:
        self._hold = hold
        self._forwarder = forwarder

    async def GetRoutes(  # noqa: N802 - gRPC's name
        self,
        request: frontend_pb2.GetRoutesRequest,  # noqa: ARG002
        context: _Context,  # noqa: ARG002
    ) -> frontend_pb2.Routes:
        """Says where requests go."""
        routes = (
            frontend_pb2.Route(name=to.name, address=to.address, revision=to.revision, in_flight=running)
            for to, running in self._forwarder.routes()
        )
        return frontend_pb2.Routes(routes=routes)

    async def GetDemand(  # noqa: N802 - gRPC's name
        self, request: frontend_pb2.GetDemandRequest, context: _Context
    ) -> frontend_pb2.Demand:
        """Says how many requests wait, as soon as there is one."""
        wait_s = request.wait.ToTimedelta().total_seconds()
        if not 0 <= wait_s <= _LONGEST_WAIT_S:
            violation = FieldViolation("wait", f"is {wait_s:g} s; use 0 to {_LONGEST_WAIT_S} s")
            await rich_status.abort(context, rich_status.invalid_argument([violation]))
        return frontend_pb2.Demand(held=await self._hold.demand(wait_s))


async def admin_server(service: ForOperator, health: Health) -> grpc.aio.Server:
    """A server with this service, health and reflection."""
    server = create_server()
    frontend_pb2_grpc.add_FrontendServiceServicer_to_server(service, server)
    await health.register(server, [SERVICE])
    return server

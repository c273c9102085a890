"""Authenticates gRPC calls before a byte of their requests is received."""

from __future__ import annotations  # grpc.RpcMethodHandler takes no parameters at run time

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeAlias

import grpc
from google.rpc import status_pb2

from moe_api import rich_status
from moe_frontend.identity.audit import NO_LOG, AuditLog
from moe_frontend.identity.caller import serve_as
from moe_frontend.identity.credentials import Authenticator, RefusedError

_OPEN: Final = "/grpc.health.v1.Health/"
"""For load balancers and probes, which have no credentials."""
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class AuthenticatingInterceptor(grpc.aio.ServerInterceptor):
    """The first interceptor of a server: sets the caller of each call, or ends it with UNAUTHENTICATED."""

    def __init__(self, authenticator: Authenticator, log: AuditLog = NO_LOG) -> None:
        self._authenticator = authenticator
        self._log = log

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Runs in the task that then serves the call, so the caller it sets is the call's."""
        details: Any = handler_call_details  # grpcio's stubs have no metadata of it
        if not details.method.startswith(_OPEN):
            try:
                serve_as(await self._authenticator.caller(details.invocation_metadata))
            except RefusedError as error:
                with self._log.request("grpc", details.method.lstrip("/")) as entry:
                    entry.status = rich_status.status_code(error.status).name
                return _refusal(error.status)
        return await continuation(handler_call_details)


def _refusal(status: status_pb2.Status) -> _Handler:
    """A handler that ends its call without reading: gRPC receives nothing for one that takes a stream."""

    async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        await rich_status.abort(context, status)
        yield

    return grpc.stream_stream_rpc_method_handler(refuse)

"""InferenceService and its server, as the frontend offers them."""

from __future__ import annotations  # grpc.RpcMethodHandler takes no parameters at run time

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

import grpc
from google.protobuf.message import Message

from moe_api import rich_status, transport
from moe_api.frontend.v1 import frontend_pb2_grpc
from moe_api.health import Health, health_server
from moe_api.inference.v1 import chat_pb2, inference_pb2
from moe_api.receiving import InProgress
from moe_api.server import create_server
from moe_api.supervision import Supervisor
from moe_frontend.identity.audit import NO_LOG, AuditLog
from moe_frontend.identity.credentials import NOBODY_ASKED, Authenticator
from moe_frontend.transport import metadata
from moe_frontend.transport.admin import SERVICE as ADMIN_SERVICE
from moe_frontend.transport.admin import ForOperator, admin_server
from moe_frontend.transport.authenticating import AuthenticatingInterceptor
from moe_frontend.transport.forwarding import Context, Forwarder
from moe_frontend.transport.holding import Hold

SERVICE: Final = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
CHAT_SERVICE: Final = chat_pb2.DESCRIPTOR.services_by_name["ChatService"].full_name
MOST_STREAMS: Final = 1024
"""Calls of one connection at a time: gateways and sidecars send those of many clients over one."""

# gRPC answers calls that meet the very moment of the stop with CANCELLED. For this long before, they are
# told what goes on, and clients turn elsewhere.
_SETTLE_S: Final = 0.2
_SHUTTING_DOWN: Final = rich_status.retry_later(
    grpc.StatusCode.UNAVAILABLE, "this frontend is shutting down; send the request again", 0.1
)

_REQUESTS: Final[dict[str, type[Message]]] = {
    "Generate": inference_pb2.GenerateRequest,
    "Tokenize": inference_pb2.TokenizeRequest,
    "GetModel": inference_pb2.GetModelRequest,
}


class Frontend:
    """A gRPC server that forwards, with health and reflection.

    Args:
        forwarder: answers the calls.
        hold: tells the operator how many of them wait for a first replica.
        supervisor: runs what goes on in the background.
        authenticator: knows the callers.
        log: of all calls.
        in_progress: counts the bytes of requests in progress.
    """

    def __init__(
        self,
        forwarder: Forwarder,
        hold: Hold,
        supervisor: Supervisor | None = None,
        authenticator: Authenticator = NOBODY_ASKED,
        log: AuditLog = NO_LOG,
        in_progress: InProgress | None = None,
    ) -> None:
        self._log = log
        self._supervisor = supervisor or Supervisor()
        self._forwarder = forwarder
        self._hold = hold
        self._for_operator = ForOperator(hold, forwarder)
        self._health = Health([SERVICE, CHAT_SERVICE, ADMIN_SERVICE])
        self._server = create_server(
            transport.server_options(most_streams=MOST_STREAMS),
            (AuthenticatingInterceptor(authenticator, log),),
            in_progress,
        )
        self._internal: list[grpc.aio.Server] = []
        self._draining = False
        self._ready = False
        self._giving_up: asyncio.Task[None] | None = None

    async def start(
        self, address: str, credentials: grpc.ServerCredentials | None = None, *, administered: bool = True
    ) -> int:
        """Listens on ``HOST:PORT`` (port 0 takes a free one) and returns the port.

        Args:
            address: for clients.
            credentials: of TLS; None: plaintext.
            administered: whether the operator's service is on this port too (`start_admin` gives it its own).

        Raises:
            RuntimeError: the address cannot be listened on.
        """
        handlers = {name: self._handler(name, request) for name, request in _REQUESTS.items()}
        self._server.add_registered_method_handlers(SERVICE, handlers)
        if administered:
            frontend_pb2_grpc.add_FrontendServiceServicer_to_server(self._for_operator, self._server)
        own = [SERVICE, CHAT_SERVICE]
        await self._health.register(self._server, [*own, ADMIN_SERVICE] if administered else own)
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials)
        await self._server.start()
        return port

    async def start_admin(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Listens on ``HOST:PORT`` for the operator and for probes, and returns the port.

        Args:
            address: for them.
            credentials: of TLS; None: plaintext. Probes then need an address of their own (`start_health`).

        Raises:
            RuntimeError: the address cannot be listened on.
        """
        return await self._start_internal(
            await admin_server(self._for_operator, self._health), address, credentials
        )

    async def start_health(self, address: str) -> int:
        """Listens on ``HOST:PORT`` for probes alone, and returns the port.

        Raises:
            RuntimeError: the address cannot be listened on.
        """
        return await self._start_internal(await health_server(self._health), address, None)

    async def _start_internal(
        self, server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None
    ) -> int:
        """Starts a server that ends with that of clients."""
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
        await server.start()
        self._internal.append(server)
        return port

    def add(self, register: Callable[[grpc.aio.Server], None]) -> None:
        """Lets `register` add a service, whose methods run by `serve`; before `start`."""
        register(self._server)

    @property
    def ready(self) -> bool:
        """Whether probes are told that requests are welcome."""
        return self._ready

    def set_replicas(self, *, there: bool) -> None:
        """Says whether there is a worker: the first one releases the requests that wait."""
        self._hold.set_replicas(there=there)

    async def set_ready(self, *, ready: bool) -> None:
        """Says whether there is a worker, and reports to probes whether the frontend accepts requests.

        It accepts them as long as they may wait for a worker: after the loss of the last worker it becomes
        not ready only after the time that a request waits, so that the gap between two workers turns no
        connection away. A draining frontend stays not ready.
        """
        self.set_replicas(there=ready)
        if ready or self._hold.from_zero:
            self._keep_on()
            await self._tell(ready=True)
        elif not self._ready or self._hold.limit_s <= 0:
            await self._tell(ready=False)
        elif self._giving_up is None:
            self._giving_up = self._supervisor.start("readiness", self._give_up)

    async def _give_up(self) -> None:
        await asyncio.sleep(self._hold.limit_s)
        await self._tell(ready=False)

    def _keep_on(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None

    async def _tell(self, *, ready: bool) -> None:
        self._ready = ready and not self._draining
        await self._health.set_ready(ready=self._ready)

    async def drain(self, grace_s: float) -> None:
        """Takes no more calls, lets those that run finish for `grace_s` seconds, and stops."""
        self._draining = True
        self._keep_on()
        await self._tell(ready=False)
        await asyncio.sleep(_SETTLE_S)
        await self._health.close()
        await self._server.stop(grace_s)
        for server in self._internal:
            await server.stop(None)

    def _handler(self, name: str, request_type: type[Message]) -> grpc.RpcMethodHandler[Message, bytes]:
        """All methods answer as streams: on the wire a unary answer is a stream of one message."""
        method = f"{SERVICE}/{name}"

        async def behaviour(request: Message, context: Context) -> None:
            await self._serve(method, request, context)

        # The stubs know synchronous handlers only.
        return grpc.unary_stream_rpc_method_handler(cast("Any", behaviour), request_type.FromString)

    async def _serve(self, method: str, request: Message, context: Context) -> None:
        await self.serve(method, context, lambda: self._forwarder.forward(method, request, context))

    async def serve(self, method: str, context: Context, work: Callable[[], Awaitable[None]]) -> None:
        """Does the work of one call, unless this frontend drains, and logs the call."""
        with self._log.request("grpc", method, metadata.request_id(context.invocation_metadata())) as entry:
            try:
                if self._draining:
                    await rich_status.abort(context, _SHUTTING_DOWN)
                await work()
                entry.status = (context.code() or grpc.StatusCode.OK).name
            except asyncio.CancelledError:
                entry.status = grpc.StatusCode.CANCELLED.name
                raise
            except BaseException:
                entry.status = (context.code() or grpc.StatusCode.UNKNOWN).name
                raise

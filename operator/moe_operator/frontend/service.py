"""InferenceService and its server, as the frontend offers them."""

from __future__ import annotations  # grpc.RpcMethodHandler takes no parameters at run time

import asyncio
from typing import Any, Final, cast

import grpc
from google.protobuf.message import Message

from moe_api import transport
from moe_api.health import Health
from moe_api.inference.v1 import inference_pb2
from moe_api.malformed import MalformedRequestInterceptor
from moe_operator.frontend.forwarding import Context, Forwarder

SERVICE: Final = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name

# A call that was accepted just before the stop takes a few turns of the event loop to be counted.
_SETTLE_S: Final = 0.1

_REQUESTS: Final[dict[str, type[Message]]] = {
    "Generate": inference_pb2.GenerateRequest,
    "Tokenize": inference_pb2.TokenizeRequest,
    "GetModel": inference_pb2.GetModelRequest,
}


class Frontend:
    """A gRPC server that forwards, with health and reflection.

    Args:
        forwarder: answers the calls.
    """

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder
        self._health = Health([SERVICE])
        self._server = grpc.aio.server(
            interceptors=[MalformedRequestInterceptor()], options=transport.SERVER_OPTIONS
        )
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    async def start(self, address: str) -> int:
        """Listens on ``HOST:PORT`` (port 0 takes a free one) and returns the port.

        Raises:
            RuntimeError: the address cannot be listened on.
        """
        handlers = {name: self._handler(name, request) for name, request in _REQUESTS.items()}
        generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
        self._server.add_generic_rpc_handlers((generic,))
        await self._health.register(self._server)
        port = self._server.add_insecure_port(address)
        await self._server.start()
        return port

    async def set_ready(self, *, ready: bool) -> None:
        """Tells probes whether there is a worker; a frontend that drains stays not ready."""
        await self._health.set_ready(ready=ready and not self._draining)

    async def drain(self, grace_s: float) -> None:
        """Takes no more calls, lets those that run finish for `grace_s` seconds, and stops."""
        self._draining = True
        await self._health.set_ready(ready=False)
        stopping = asyncio.create_task(self._server.stop(grace_s))
        await asyncio.wait({stopping}, timeout=_SETTLE_S)
        idle = asyncio.create_task(self._idle.wait())
        await asyncio.wait({stopping, idle}, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        if not stopping.done():
            # What is left is health watches and reflection, which never end by themselves. The first stop
            # must be out of the way: two at a time crash grpcio 1.85 (the loser uses a destroyed server).
            stopping.cancel()
            await asyncio.wait({stopping})
            await self._server.stop(None)

    def _handler(self, name: str, request_type: type[Message]) -> grpc.RpcMethodHandler[Message, bytes]:
        """All methods answer as streams: on the wire a unary answer is a stream of one message."""
        method = f"{SERVICE}/{name}"

        async def behaviour(request: Message, context: Context) -> None:
            await self._serve(method, request, context)

        # The stubs know synchronous handlers only.
        return grpc.unary_stream_rpc_method_handler(cast("Any", behaviour), request_type.FromString)

    async def _serve(self, method: str, request: Message, context: Context) -> None:
        self._in_flight += 1
        self._idle.clear()
        context.add_done_callback(cast("Any", self._done))  # a callable, whatever its stub says
        await self._forwarder.forward(method, request, context)

    def _done(self, ctx: Context) -> None:  # noqa: ARG002 - gRPC passes it
        """Called after the status was sent, so that draining cannot cut it off."""
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()

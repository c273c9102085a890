"""Refuses requests that are not valid protobuf messages, or have too many fields, with INVALID_ARGUMENT.

By default gRPC returns INTERNAL, "Exception deserializing request!", and logs a stack trace: the client reads
that the server is broken, although its own request is (for example text that is not UTF-8).
"""

from __future__ import annotations  # grpc.RpcMethodHandler takes no parameters at run time

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf import message

from moe_api import rich_status, wire_fields

_Deserializer = Callable[[bytes], Any]
_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class _Malformed:
    """Replaces a request that was not parsed; the message says why. field: "" for the whole request."""

    sentence: str
    field: str = ""


_NOT_A_MESSAGE: Final = _Malformed(
    "the request is not a valid protobuf message: send one that the .proto file describes, "
    "with all text fields (prompt, stop, model) in UTF-8"
)
_TOO_MANY_FIELDS: Final = (
    f"the request has more than {wire_fields.MOST_FIELDS:,} fields; send at most as many elements as the "
    ".proto file allows, and token ids packed"
)


class MalformedRequestInterceptor(grpc.aio.ServerInterceptor):
    """For ``grpc.aio.server(interceptors=[...])``; covers calls that take a single request."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Returns a handler of the call that also accepts malformed requests."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        deserialize = _tolerant(handler.request_deserializer)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _guard_unary(handler.unary_unary), deserialize, handler.response_serializer
            )
        return grpc.unary_stream_rpc_method_handler(
            _guard_stream(handler.unary_stream), deserialize, handler.response_serializer
        )


def _tolerant(deserialize: _Deserializer) -> _Deserializer:
    # Generated code passes the class's own FromString.
    kind = getattr(getattr(deserialize, "__self__", None), "DESCRIPTOR", None)

    def parse(data: bytes) -> Any:
        try:
            crowded = None if kind is None else wire_fields.crowded_field(data, kind)
            return deserialize(data) if crowded is None else _Malformed(_TOO_MANY_FIELDS, crowded)
        except (message.DecodeError, wire_fields.NotWireFormatError):
            return _NOT_A_MESSAGE

    return parse


def _guard_unary(behaviour: Any) -> Any:
    async def guarded(request: Any, context: _Context) -> Any:
        await _refuse_malformed(request, context)
        return await behaviour(request, context)

    return guarded


def _guard_stream(behaviour: Any) -> Any:
    """A streaming handler is an async generator, or a coroutine that calls ``context.write``."""

    async def guarded_generator(request: Any, context: _Context) -> AsyncIterator[Any]:
        await _refuse_malformed(request, context)
        async with contextlib.aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                yield response

    return guarded_generator if inspect.isasyncgenfunction(behaviour) else _guard_unary(behaviour)


async def _refuse_malformed(request: Any, context: _Context) -> None:
    if isinstance(request, _Malformed):
        violation = rich_status.FieldViolation(request.field, request.sentence)
        await rich_status.abort(context, rich_status.invalid_argument([violation]))

"""What a server does with the requests of all methods: receive within bounds, parse, let go at the end.

gRPC receives and parses the request of a call before the method's code runs. So `RequestInterceptor` tells it
that each method takes a stream of requests, reads the one that comes by itself, and calls the method with it;
on the wire this is the same.
"""

from __future__ import annotations  # grpc.RpcMethodHandler takes no parameters at run time

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeAlias

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from moe_api import malformed, rich_status
from moe_api.malformed import Deserializer, MalformedError
from moe_api.receiving import BYTES_MOST, InProgress, NotReceivedError, Receiver

_LOG: Final = logging.getLogger(__name__)
_Context = grpc.aio.ServicerContext[Any, Any]
_Read = Callable[[_Context], contextlib.AbstractAsyncContextManager[Any]]
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_NO_REQUEST: Final = rich_status.invalid_argument(
    [rich_status.FieldViolation("", "the call has no request; send one message")]
)


class RequestInterceptor(grpc.aio.ServerInterceptor):
    """For ``grpc.aio.server(interceptors=[...])``, as the first one; methods of synchronous code pass it by.

    Args:
        most_bytes: of one message.
        in_progress: counts the requests; None: this server has a count of its own.
    """

    def __init__(self, most_bytes: int, in_progress: InProgress | None = None) -> None:
        self._receiver = Receiver(max(BYTES_MOST // most_bytes, 1))
        self._in_progress = in_progress or InProgress()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Returns a handler of the call that reads its request itself."""
        handler = await continuation(handler_call_details)
        behaviour = None if handler is None else _behaviour(handler)
        if handler is None or not _is_async(behaviour):
            return handler
        read = _stream if handler.request_streaming else _single
        reader = _Reader(self._receiver, self._in_progress, handler.request_deserializer or bytes)
        guarded = _guard(behaviour, functools.partial(read, reader))
        make: Any = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(guarded, None, handler.response_serializer)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class _Reader:
    """How the requests of one method are read."""

    receiver: Receiver
    in_progress: InProgress
    deserialize: Deserializer

    async def receive(self, context: _Context) -> Any:
        """The next request as bytes, or EOF. Raises AbortError."""
        try:
            return await self.receiver.receive(context.read)
        except NotReceivedError as error:
            return await rich_status.abort(context, error.status)

    async def parse(self, data: bytes, context: _Context) -> Any:
        """Raises AbortError."""
        try:
            return malformed.parse(data, self.deserialize)
        except MalformedError as error:
            return await rich_status.abort(context, rich_status.invalid_argument([error.violation]))


@contextlib.asynccontextmanager
async def _single(reader: _Reader, context: _Context) -> AsyncIterator[Any]:
    """The one request of a call, counted during the block. Raises AbortError."""
    data = await reader.receive(context)
    if data is grpc.aio.EOF:
        await rich_status.abort(context, _NO_REQUEST)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(reader.in_progress.place(len(data)))
        except NotReceivedError as error:
            await rich_status.abort(context, error.status)
        request = await reader.parse(data, context)
        del data
        yield request


@contextlib.asynccontextmanager
async def _stream(reader: _Reader, context: _Context) -> AsyncIterator[Any]:
    """The requests of a call, as an iterator; each is as good as gone when the next one is read."""

    async def each() -> AsyncGenerator[Any, None]:
        while (data := await reader.receive(context)) is not grpc.aio.EOF:
            yield await reader.parse(data, context)

    async with contextlib.aclosing(each()) as requests:
        yield requests


def _behaviour(handler: _Handler) -> Any:
    return handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream


def _is_async(behaviour: Any) -> bool:
    return inspect.iscoroutinefunction(behaviour) or inspect.isasyncgenfunction(behaviour)


def _guard(behaviour: Any, read: _Read) -> Any:
    """The method's code, which gets its request by `read`.

    gRPC keeps the error of an aborted call for as long as the call's context, which the frames of the error's
    traceback hold. This is a cycle, which would keep the request until the garbage collector runs. So the
    error leaves here without frames.

    A client that reads nothing and then closes its connection makes the core refuse the status that waits for
    it. gRPC would log this as an error of the method's code, with a traceback, as often as clients like.
    """

    async def guarded_generator(_: Any, context: _Context) -> AsyncIterator[Any]:
        request = responses = response = None
        try:
            async with (
                read(context) as request,
                contextlib.aclosing(behaviour(request, context)) as responses,
            ):
                async for response in responses:
                    yield response
        except grpc.aio.AbortError as error:
            raise _bare(error) from None
        except cygrpc.ExecuteBatchError as error:
            raise _cancelled(error) from None
        finally:
            del _, context, request, responses, response

    async def guarded(_: Any, context: _Context) -> Any:
        request = None
        try:
            async with read(context) as request:
                return await behaviour(request, context)
        except grpc.aio.AbortError as error:
            raise _bare(error) from None
        except cygrpc.ExecuteBatchError as error:
            raise _cancelled(error) from None
        finally:
            del _, context, request

    return guarded_generator if inspect.isasyncgenfunction(behaviour) else guarded


def _bare(error: grpc.aio.AbortError) -> grpc.aio.AbortError:
    error.__context__ = None
    return error.with_traceback(None)


def _cancelled(error: Exception) -> asyncio.CancelledError:
    _LOG.debug("a call ended before its answer: %s", error)
    return asyncio.CancelledError()

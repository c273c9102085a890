"""A gRPC server that bounds what its requests hold, and that no request for an unknown method can stop.

`moe_api.requests` does the former. As for the latter: grpcio 1.85 decodes the path of a call to an
unregistered method as UTF-8 in the task that accepts all calls (`_server_main_loop` in its
aio/server.pyx.pxi). One call with a path that is not UTF-8 ends this task and with it the server, which
accepts no more calls while the process lives on. The path of a call to a registered method is not decoded.
So a server created here accepts registered methods only, and ends every other call with UNIMPLEMENTED
without decoding its path.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from moe_api import transport
from moe_api.receiving import InProgress
from moe_api.requests import RequestInterceptor

_LOG: Final = logging.getLogger(__name__)
_UNKNOWN: Final = "method not found; server reflection lists the methods of this server"


class _Server(cygrpc.AioServer):  # type: ignore[misc]  # grpcio has no types for its core
    """Overrides how calls to unregistered methods are accepted."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._refusals: set[asyncio.Task[None]] = set()

    def _make_request_call_future(self, method: bytes | None) -> "asyncio.Future[Any]":
        if method is not None:
            accepted: asyncio.Future[Any] = super()._make_request_call_future(method)
            return accepted
        return asyncio.get_running_loop().create_task(self._refuse_unknown())

    async def _refuse_unknown(self) -> None:
        """Raises the error of the core, if there is one; the caller handles it."""
        while True:
            call = await self._request_call()
            task = asyncio.get_running_loop().create_task(_refuse(call))
            self._refusals.add(task)
            task.add_done_callback(self._refusals.discard)


async def _refuse(call: Any) -> None:
    context = cygrpc._ServicerContext(call, None, None, asyncio.get_running_loop())  # noqa: SLF001
    try:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, _UNKNOWN)
    except grpc.aio.AbortError:
        return
    except Exception:  # noqa: BLE001 - logged; other calls go on
        _LOG.exception("call to an unknown method was not answered")


def create_server(
    options: Sequence[tuple[str, Any]] = transport.SERVER_OPTIONS,
    first: Sequence[grpc.aio.ServerInterceptor] = (),
    in_progress: InProgress | None = None,
) -> grpc.aio.Server:
    """Like `grpc.aio.server`, for methods that are registered (as generated code does) before it starts.

    A handler that is only added by `add_generic_rpc_handlers` is never called.

    Args:
        options: of `moe_api.transport`.
        first: interceptors that see calls before their requests are received.
        in_progress: counts the bytes of requests in progress, also those of other servers of the process.
    """
    most_bytes = dict(options)["grpc.max_receive_message_length"]
    interceptors = (*first, RequestInterceptor(most_bytes, in_progress))
    made = grpc.aio.server(interceptors=interceptors, options=options)
    core = _Server(asyncio.get_running_loop(), None, (), interceptors, tuple(options), None)
    made._server = core  # type: ignore[attr-defined]  # noqa: SLF001
    return made

"""The spans of remote procedure calls, by OpenTelemetry's conventions for gRPC."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any, Final

import grpc
from opentelemetry import trace

from moe_api import semconv, telemetry
from moe_api.clock import Anchor, deadline_s

# Codes that mark a server span as failed; the others are errors of the caller (RPC conventions, gRPC).
SERVER_ERRORS: Final = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
# Tolerance between gRPC's deadline and the deadline as read here.
_DEADLINE_ERROR_S: Final = 0.01


@contextlib.contextmanager
def server_span(
    tracer: trace.Tracer,
    context: grpc.aio.ServicerContext[Any, Any],
    method: str,
    anchor: Anchor | None = None,
) -> Iterator[trace.Span]:
    """The server span of one RPC, a child of the caller's; ends with the status of the call.

    The span is not made the current one: a streaming handler is an async generator, which may be closed
    in another context than it ran in. Give children their parent with
    ``context=trace.set_span_in_context(span)``.

    Args:
        tracer: makes the span.
        context: of the RPC, for its metadata and its status.
        method: full name without the leading slash, ``package.Service/Method``.
        anchor: the start of the call; use it for the timestamps of children. Default: now.
    """
    anchor = anchor or Anchor.now()
    deadline = deadline_s(context)
    span = tracer.start_span(
        method,
        context=telemetry.extract(context.invocation_metadata()),
        kind=trace.SpanKind.SERVER,
        attributes={semconv.RPC_SYSTEM_NAME: "grpc", semconv.RPC_METHOD: method},
        start_time=anchor.wall_ns,
    )
    code, details = grpc.StatusCode.UNKNOWN, ""
    try:
        yield span
        code, details = context.code() or grpc.StatusCode.OK, context.details()
    except (asyncio.CancelledError, GeneratorExit):
        code = why_cancelled(deadline)
        raise
    except BaseException as error:
        code, details = context.code() or grpc.StatusCode.UNKNOWN, context.details() or str(error)
        raise
    finally:
        end_ns = anchor.timestamp_ns(time.monotonic_ns())
        end_rpc_span(span, code, details, SERVER_ERRORS, end_ns)


def end_rpc_span(
    span: trace.Span,
    code: grpc.StatusCode,
    details: str | None,
    errors: frozenset[grpc.StatusCode] | None = None,
    end_ns: int | None = None,
) -> None:
    """Records how an RPC ended and ends its span.

    Args:
        span: of the call.
        code: its status.
        details: the message of the status.
        errors: codes that mark the span as failed; by default, as for clients, all but OK.
        end_ns: when the call ended, in nanoseconds since the epoch. Default: now.
    """
    span.set_attribute(semconv.RPC_RESPONSE_STATUS_CODE, code.name)
    failed = code in errors if errors is not None else code is not grpc.StatusCode.OK
    if failed:
        span.set_attribute(semconv.ERROR_TYPE, code.name)
        span.set_status(trace.StatusCode.ERROR, details or None)
    span.end(end_time=end_ns)


def why_cancelled(deadline_s: float | None) -> grpc.StatusCode:
    """gRPC cancels the handler of a call in the same way if the deadline passes and if the client
    disconnects.

    deadline_s: of the call, as `clock.deadline_s` gave it.
    """
    late = deadline_s is not None and time.monotonic() >= deadline_s - _DEADLINE_ERROR_S
    return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED

"""The spans of remote procedure calls, by OpenTelemetry's conventions for gRPC."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any, Final

import grpc
from opentelemetry import trace

from moe_api import semconv, telemetry

# What a server span counts as its own failure; the rest is the caller's doing (RPC conventions, gRPC).
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


@contextlib.contextmanager
def server_span(
    tracer: trace.Tracer, context: grpc.aio.ServicerContext[Any, Any], method: str
) -> Iterator[trace.Span]:
    """The server span of one RPC, a child of the caller's; ends with the status of the call.

    The span is not made the current one: a streaming handler is an async generator, which may be closed
    in another context than it ran in. Give children their parent with
    ``context=trace.set_span_in_context(span)``.

    Args:
        tracer: makes the span.
        context: of the RPC, for its metadata and its status.
        method: full name without the leading slash, ``package.Service/Method``.
    """
    span = tracer.start_span(
        method,
        context=telemetry.extract(context.invocation_metadata()),
        kind=trace.SpanKind.SERVER,
        attributes={semconv.RPC_SYSTEM_NAME: "grpc", semconv.RPC_METHOD: method},
    )
    try:
        yield span
        end_rpc_span(span, context.code() or grpc.StatusCode.OK, context.details(), SERVER_ERRORS)
    except (asyncio.CancelledError, GeneratorExit):
        end_rpc_span(span, why_cancelled(context), "", SERVER_ERRORS)
        raise
    except BaseException as error:
        code = context.code() or grpc.StatusCode.UNKNOWN
        end_rpc_span(span, code, context.details() or str(error), SERVER_ERRORS)
        raise


def end_rpc_span(
    span: trace.Span,
    code: grpc.StatusCode,
    details: str | None,
    errors: frozenset[grpc.StatusCode] | None = None,
) -> None:
    """Records how an RPC ended and ends its span.

    Args:
        span: of the call.
        code: its status.
        details: the sentence that came with the status.
        errors: codes that mark the span as failed; by default, as for clients, all but OK.
    """
    span.set_attribute(semconv.RPC_RESPONSE_STATUS_CODE, code.name)
    failed = code in errors if errors is not None else code is not grpc.StatusCode.OK
    if failed:
        span.set_attribute(semconv.ERROR_TYPE, code.name)
        span.set_status(trace.StatusCode.ERROR, details or None)
    span.end()


def why_cancelled(context: grpc.aio.ServicerContext[Any, Any]) -> grpc.StatusCode:
    """gRPC cancels the handler of a call whose deadline passed just as one whose client went away."""
    remaining: float | None = context.time_remaining()
    late = remaining is not None and remaining <= 0
    return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED

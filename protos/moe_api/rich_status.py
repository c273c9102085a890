"""Errors with details: google.rpc.Status in the trailing metadata of a call, for servers and clients.

https://google.aip.dev/193 and grpcio-status describe the form; details used here are
google.rpc.BadRequest (the field and its valid range), google.rpc.RetryInfo (when to retry) and
google.rpc.ErrorInfo (the reason, for programs).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Final, NoReturn, cast

import grpc
from google.protobuf import duration_pb2, message
from google.rpc import error_details_pb2, status_pb2

DETAILS_KEY: Final = "grpc-status-details-bin"

DOMAIN: Final = "serving.moe-operator.dev"
"""The domain of the reasons in google.rpc.ErrorInfo."""
ENGINE_DIED: Final = "ENGINE_DIED"
"""A worker's engine process ended with the request in flight."""
REPLICAS_DIED: Final = "REPLICAS_DIED"
"""Replicas died one after the other with the request in flight; it is not safe to send it again."""
REPLICA_BROKE_PROTOCOL: Final = "REPLICA_BROKE_PROTOCOL"
"""The response of a replica violated the .proto file."""

TENANT_LIMIT: Final = "TENANT_LIMIT"
"""A limit of the client's tenant is reached; other tenants' requests are accepted."""

CONTEXT_LENGTH_EXCEEDED: Final = "CONTEXT_LENGTH_EXCEEDED"
"""Of a violation: the prompt is longer than the model's context; clients shorten it and try again."""

# gRPC may drop a call whose trailing metadata exceeds 8 KiB, so texts that may quote what a user sent are
# cut. At worst the message is percent-encoded to three times its bytes, and the details (the message and
# four violations) take a third more in base64: 1.5 + 3.5 KiB.
_MAX_TEXT_BYTES: Final = 512
_MAX_VIOLATIONS: Final = 4

_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


@dataclasses.dataclass(frozen=True)
class FieldViolation:
    """One field of a request that cannot be accepted.

    Attributes:
        field: path of the field, e.g. ``sampling.top_p``.
        description: a message with the problem and the remedy.
        reason: for programs, where they react to this problem; else "".
    """

    field: str
    description: str
    reason: str = ""


def build(code: grpc.StatusCode, sentence: str, details: Iterable[message.Message] = ()) -> status_pb2.Status:
    """A google.rpc.Status; texts longer than 512 bytes are cut."""
    status = status_pb2.Status(code=code.value[0], message=_cut(sentence))
    for detail in details:
        status.details.add().Pack(detail)
    return status


def invalid_argument(violations: Sequence[FieldViolation]) -> status_pb2.Status:
    """INVALID_ARGUMENT with one BadRequest violation for each field (the first four are named)."""
    shown = violations[:_MAX_VIOLATIONS]
    detail = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=v.field, description=_cut(v.description), reason=v.reason
            )
            for v in shown
        ]
    )
    sentence = "; ".join(f"{v.field}: {v.description}" if v.field else v.description for v in shown)
    return build(grpc.StatusCode.INVALID_ARGUMENT, sentence, [detail])


def retry_later(code: grpc.StatusCode, sentence: str, delay_s: float, reason: str = "") -> status_pb2.Status:
    """RESOURCE_EXHAUSTED or UNAVAILABLE with the retry delay in seconds.

    reason: one of this module's reasons, if programs have to distinguish this status from others of its code.
    """
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(round(delay_s * 1e9))
    details: list[message.Message] = [error_details_pb2.RetryInfo(retry_delay=delay)]
    return build(code, sentence, [*details, *([error_info(reason)] if reason else [])])


def error_info(reason: str) -> error_details_pb2.ErrorInfo:
    """The detail that names a reason of this module."""
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)


async def abort(context: grpc.aio.ServicerContext[Any, Any], status: status_pb2.Status) -> NoReturn:
    """Ends a call with this status.

    Raises:
        grpc.aio.AbortError: always; let it pass.
    """
    await context.abort(status_code(status), status.message, ((DETAILS_KEY, status.SerializeToString()),))


def status_code(status: status_pb2.Status) -> grpc.StatusCode:
    """The gRPC code of a google.rpc.Status; UNKNOWN for a number that gRPC does not define."""
    return _CODES.get(status.code, grpc.StatusCode.UNKNOWN)


def from_error(error: grpc.RpcError | grpc.aio.AioRpcError) -> status_pb2.Status:
    """The google.rpc.Status of a failed call, as a client sees it; without details if none were sent.

    Details that cannot be parsed, or that contradict the code of the call, are ignored.
    """
    code, sentence = error.code(), error.details() or ""
    # grpcio's stubs call an entry a class of its own; at run time it is a tuple of two.
    trailing = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    for key, value in trailing:
        if key == DETAILS_KEY and isinstance(value, bytes):
            status = _parse(value)
            if status is not None and status.code == code.value[0]:
                return status
    return status_pb2.Status(code=code.value[0], message=sentence)


def field_violations(status: status_pb2.Status) -> tuple[FieldViolation, ...]:
    """The fields with violations."""
    bad_request = error_details_pb2.BadRequest()
    for detail in status.details:
        if detail.Unpack(bad_request):
            return tuple(
                FieldViolation(v.field, v.description, v.reason) for v in bad_request.field_violations
            )
    return ()


def retry_delay(status: status_pb2.Status) -> float | None:
    """Seconds after which to retry, if the status contains them."""
    info = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return float(info.retry_delay.ToNanoseconds() / 1e9)
    return None


def reason(status: status_pb2.Status) -> str:
    """The reason of a status in this module's domain; empty if it has none."""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info) and info.domain == DOMAIN:
            return str(info.reason)
    return ""


def _parse(data: bytes) -> status_pb2.Status | None:
    try:
        return status_pb2.Status.FromString(data)
    except message.DecodeError:
        return None


def _cut(text: str) -> str:
    """At most 512 bytes of UTF-8."""
    data = text.encode()
    if len(data) <= _MAX_TEXT_BYTES:
        return text
    ellipsis = "…"
    return data[: _MAX_TEXT_BYTES - len(ellipsis.encode())].decode(errors="ignore") + ellipsis

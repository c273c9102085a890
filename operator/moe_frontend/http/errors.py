"""Errors as OpenAI's API answers them. Pure."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final

import grpc
from google.rpc import status_pb2

from moe_api import rich_status
from moe_api.rich_status import FieldViolation

INVALID_REQUEST: Final = "invalid_request_error"
SERVER_ERROR: Final = "server_error"
OVERLOADED: Final = "rate_limit_error"
_CODES: Final[Mapping[grpc.StatusCode, tuple[int, str, str | None]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, INVALID_REQUEST, None),
    grpc.StatusCode.UNAUTHENTICATED: (401, INVALID_REQUEST, "invalid_api_key"),
    grpc.StatusCode.PERMISSION_DENIED: (403, "permission_error", None),
    grpc.StatusCode.NOT_FOUND: (404, INVALID_REQUEST, "model_not_found"),
    grpc.StatusCode.ABORTED: (408, "timeout_error", "slow_reader"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, OVERLOADED, "queue_full"),
    grpc.StatusCode.UNAVAILABLE: (503, SERVER_ERROR, "unavailable"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, "timeout_error", "deadline_exceeded"),
}
_OTHER: Final = (500, SERVER_ERROR, None)
_RETRYABLE: Final = frozenset({408, 429, 503})


@dataclasses.dataclass
class ApiError(Exception):
    """An error for the client.

    Attributes:
        status: of HTTP.
        message: a sentence.
        type, param, code: as OpenAI's error objects have them; `param` is the field that is wrong.
        retry_after_s: when to send the request again, if there is a time to tell.
        allow: methods, where another one was used.
        close: whether the connection ends, because nobody knows where the next request begins.
    """

    status: int
    message: str
    type: str = INVALID_REQUEST
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None
    allow: str | None = None
    close: bool = False

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What clients go by: OpenAI's wait for Retry-After, and send nothing again that must not be."""
        headers = [] if self.allow is None else [(b"allow", self.allow.encode())]
        if self.close:
            headers.append((b"connection", b"close"))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))  # RFC 9110, 11.6.1
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(math.ceil(self.retry_after_s)).encode()))
            headers.append((b"retry-after-ms", str(math.ceil(self.retry_after_s * 1000)).encode()))
        if self.status >= 500 or self.status in _RETRYABLE:
            again = b"true" if self.status in _RETRYABLE else b"false"
            headers.append((b"x-should-retry", again))
        return headers


def invalid(param: str, problem: str, status: int = 400) -> ApiError:
    """A field of the request cannot be accepted; `problem` goes on behind its name."""
    return ApiError(status, f"{param} {problem}", param=param)


def shutting_down() -> ApiError:
    """This process takes no more requests, or ends those that it has."""
    sentence = "this frontend is shutting down; send the request again"
    return ApiError(503, sentence, SERVER_ERROR, code="unavailable", retry_after_s=0.1)


def of_status(status: status_pb2.Status, renamed: Mapping[str, str]) -> ApiError:
    """What a status of the gRPC API is over HTTP.

    renamed: fields of the gRPC request to those of the HTTP request.
    """
    code, kind, name = _CODES.get(rich_status.status_code(status), _OTHER)
    violations = [_renamed(violation, renamed) for violation in rich_status.field_violations(status)]
    message = "; ".join(f"{v.field} {v.description}".strip() for v in violations) or status.message
    param = next((violation.field for violation in violations), None) or None
    if name == "model_not_found":
        param = "model"
    if any(violation.reason == rich_status.CONTEXT_LENGTH_EXCEEDED for violation in violations):
        name = "context_length_exceeded"
    if rich_status.reason(status) == rich_status.TENANT_LIMIT:
        name = "rate_limit_exceeded"
    return ApiError(
        code, message, kind, param, name or _reason(status), retry_after_s=rich_status.retry_delay(status)
    )


def _reason(status: status_pb2.Status) -> str | None:
    return rich_status.reason(status).lower() or None


def _renamed(violation: FieldViolation, renamed: Mapping[str, str]) -> FieldViolation:
    field = violation.field.removeprefix("sampling.")
    return dataclasses.replace(violation, field=renamed.get(field, field))

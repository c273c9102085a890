"""What every request passes: an id, a span, a place among those that run, and an end with the process."""

import asyncio
import re
import uuid
from collections.abc import Sequence
from typing import Any, Final

from opentelemetry import metrics, trace
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_api import telemetry
from moe_frontend.http import answers
from moe_frontend.http.errors import OVERLOADED, ApiError, of_status, shutting_down
from moe_frontend.http.exchange import ClientGoneError
from moe_frontend.http.measures import Measured, Measures, bounded
from moe_frontend.identity.audit import NO_LOG, AuditLog
from moe_frontend.identity.caller import serve_as
from moe_frontend.identity.credentials import NOBODY_ASKED, Authenticator, RefusedError

REQUESTS_MOST: Final = 1024
"""At a time; as of one gRPC connection."""
HEAD_MOST: Final = 16 * 2**10
"""Bytes of the head of a request."""
_RETRY_S: Final = 1.0
_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_CLIENT_GONE: Final = "client_gone"


class Gate:
    """An ASGI application around another one.

    Args:
        app: answers requests; finds `id`, `span`, `measured` and `stopping` in `scope["state"]`.
        tracer, meter: of what is told about requests.
        open_paths: answered whatever goes on and whoever asks, and not told about.
        authenticator: knows the callers of all other paths.
        log: of the requests for them.
    """

    def __init__(
        self,
        app: ASGIApp,
        tracer: trace.Tracer,
        meter: metrics.Meter,
        open_paths: frozenset[str],
        authenticator: Authenticator = NOBODY_ASKED,
        log: AuditLog = NO_LOG,
    ) -> None:
        self._log = log
        self._app = app
        self._tracer = tracer
        self._measures = Measures(meter)
        self._open_paths = open_paths
        self._authenticator = authenticator
        self._running: set[asyncio.Task[Any]] = set()
        self._draining = False
        self._stopped = False

    def drain(self) -> None:
        """Takes no more requests."""
        self._draining = True

    def stop(self) -> None:
        """Ends those that run; each client is told."""
        self._draining = self._stopped = True
        for task in self._running:
            task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            return
        refusal = _of_head(scope)
        if refusal is None and scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        with self._measures.request(scope["method"], scope["scheme"]) as measured:
            await self._traced(scope, receive, send, measured, refusal)

    async def _traced(
        self, scope: Scope, receive: Receive, send: Send, measured: Measured, refusal: ApiError | None
    ) -> None:
        metadata = [(key.decode("latin-1"), value.decode("latin-1")) for key, value in scope["headers"]]
        method, id_ = bounded(scope["method"]), _request_id(metadata)
        span = self._tracer.start_span(
            method, telemetry.extract(metadata), trace.SpanKind.SERVER, {"http.request.method": method}
        )
        scope["state"].update(id=id_, span=span, measured=measured, stopping=lambda: self._stopped)
        with self._log.request("http", method, id_) as entry:
            try:
                noting = _noting(send, id_, measured)
                if refusal := refusal or self._refusal() or await self._unauthenticated(metadata):
                    await answer_error(refusal, noting)
                else:
                    await self._placed(scope, receive, noting, measured)
            finally:
                entry.method, entry.status = f"{method} {measured.route}".strip(), measured.status
                _describe(span, method, measured)
                span.end()

    async def _unauthenticated(self, metadata: Sequence[tuple[str, str]]) -> ApiError | None:
        """Sets the caller of the request, whose task this is; returns why it is not known, or None."""
        try:
            serve_as(await self._authenticator.caller(metadata))
        except RefusedError as error:
            return of_status(error.status, {})
        return None

    async def _placed(self, scope: Scope, receive: Receive, send: Send, measured: Measured) -> None:
        task = asyncio.current_task()
        self._running |= {task} if task else set()
        try:
            if scope["state"]["left"]():  # while others kept this process busy
                scope["state"]["abort"]()
                raise ClientGoneError
            await self._app(scope, receive, send)
        except (ClientGoneError, ClientDisconnect):
            measured.error = _CLIENT_GONE
            await _gone()
        except asyncio.CancelledError:
            if not self._stopped or task is None:
                raise
            task.uncancel()
            if not measured.status:
                await answer_error(shutting_down(), send)
        finally:
            self._running -= {task} if task else set()

    def _refusal(self) -> ApiError | None:
        if self._draining:
            return shutting_down()
        if len(self._running) >= REQUESTS_MOST:
            sentence = f"{REQUESTS_MOST} requests are being answered; try later"
            return ApiError(429, sentence, OVERLOADED, code="queue_full", retry_after_s=_RETRY_S)
        return None


def _of_head(scope: Scope) -> ApiError | None:
    """What is wrong with the head of a request that h11 takes."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
        # A proxy in front may go by the other one and take the rest for a request of its own (RFC 9112, 6.1).
        sentence = "the request has both Content-Length and Transfer-Encoding; send one of them"
        return ApiError(400, sentence, close=True)
    size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(n) + len(v) + 4 for n, v in headers)
    if size > HEAD_MOST:
        sentence = f"the head of the request is larger than {HEAD_MOST} bytes; send shorter headers"
        return ApiError(431, sentence)
    return None


async def answer_error(error: ApiError, send: Send) -> None:
    """Sends an error as the whole answer."""
    await answer(answers.encode(error.body()), send, error.status, error.headers())


async def answer(
    body: bytes, send: Send, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Sends JSON as the whole answer."""
    length = (b"content-length", str(len(body)).encode())
    kind = (b"content-type", b"application/json")
    await send({"type": "http.response.start", "status": status, "headers": [kind, length, *headers]})
    await send({"type": "http.response.body", "body": body})


async def _gone() -> None:
    """Lets a connection that was cut be gone, so that the server expects no answer."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def _request_id(metadata: Sequence[tuple[str, str]]) -> str:
    given = next((value for key, value in metadata if key == "x-request-id"), "")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex


def _noting(send: Send, id_: str, measured: Measured) -> Send:
    """Sends with the request's number, and notes the status."""

    async def noting(message: Message) -> None:
        if message["type"] == "http.response.start":
            measured.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", id_.encode())]
        await send(message)

    return noting


def _describe(span: trace.Span, method: str, measured: Measured) -> None:
    if measured.route:
        span.update_name(f"{method} {measured.route}")
        span.set_attribute("http.route", measured.route)
    if measured.status:
        span.set_attribute("http.response.status_code", measured.status)
    error = measured.error or (str(measured.status) if measured.status >= 500 else "")
    if error:
        span.set_attribute("error.type", error)
        span.set_status(trace.StatusCode.ERROR)

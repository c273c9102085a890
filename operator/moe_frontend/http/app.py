"""The routes of OpenAI's API, and routes with information about the deployment."""

import asyncio
import importlib.metadata
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import prometheus_client
from opentelemetry import metrics, trace
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from moe_api.inference.v1 import inference_pb2
from moe_frontend.chat.renderer import Renderer
from moe_frontend.discovery.endpoints import Served
from moe_frontend.http import answers, bodies, openapi
from moe_frontend.http.bodies import Bodies, Counted
from moe_frontend.http.chats import Chats, render, requests
from moe_frontend.http.completions import Completions, plan
from moe_frontend.http.conversation import conversation
from moe_frontend.http.errors import SERVER_ERROR, ApiError, of_status
from moe_frontend.http.exchange import Exchange, new_exchange
from moe_frontend.http.gate import Gate, answer, answer_error
from moe_frontend.http.schemas import ChatRequest, CompletionRequest
from moe_frontend.identity.audit import NO_LOG, AuditLog
from moe_frontend.identity.credentials import NOBODY_ASKED, Authenticator
from moe_frontend.transport.forwarding import Forwarder

_METRICS: Final = "/metrics"
_OPEN: Final = frozenset({"/health", _METRICS, "/version", "/openapi.json"})
_SHOWN: Final = 200
T = TypeVar("T")
_Handler = Callable[[Exchange, Request], Awaitable[bytes | None]]


class Api:
    """OpenAI's API over what the forwarder reaches.

    Args:
        forwarder: answers requests.
        tracer: of their spans.
        ready: whether requests are welcome, for /health.
        reader: of bodies.
        renderer: of conversations.
        authenticator: knows the callers.
        measured: whether there is /metrics.
    """

    def __init__(
        self,
        forwarder: Forwarder,
        tracer: trace.Tracer,
        ready: Callable[[], bool],
        reader: Bodies,
        renderer: Renderer,
        authenticator: Authenticator = NOBODY_ASKED,
        *,
        measured: bool = True,
    ) -> None:
        self._authenticator = authenticator
        self._open = _OPEN if measured else _OPEN - {_METRICS}
        self._forwarder = forwarder
        self._tracer = tracer
        self._ready = ready
        self._bodies = reader
        self._renderer = renderer
        self._began = int(time.time())

    def gated(self, meter: metrics.Meter, log: AuditLog = NO_LOG) -> Gate:
        """The application that a server runs; `meter` makes its instruments, `log` gets its requests."""
        routes = [
            self._route("/v1/completions", self._complete, "POST"),
            self._route("/v1/chat/completions", self._chat, "POST"),
            self._route("/v1/models", self._list_models, "GET"),
            self._route("/v1/models/{model:path}", self._get_model, "GET"),
            Route("/health", self._health, methods=["GET"]),
            Route("/version", _version, methods=["GET"]),
            Route("/openapi.json", _openapi, methods=["GET"]),
            *([Route(_METRICS, _metrics, methods=["GET"])] if _METRICS in self._open else []),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _refused, Exception: _failed})
        app.router.redirect_slashes = False
        return Gate(app, self._tracer, meter, self._open, self._authenticator, log)

    def _route(self, path: str, handler: _Handler, method: str) -> Route:
        return Route(path, _Endpoint(path, handler), methods=[method])

    async def _complete(self, exchange: Exchange, request: Request) -> bytes | None:
        with self._bodies.place() as counted:
            asked, served = await self._asked(exchange, request, CompletionRequest, counted)
            planned = plan(asked, served)
            counted.grow(_size(planned.requests))
            completions = Completions(exchange, served.name or asked.model or "", planned)
            if asked.stream:
                await completions.stream(self._forwarder, self._tracer)
                return None
            return await completions.whole(self._forwarder, self._tracer)

    async def _chat(self, exchange: Exchange, request: Request) -> bytes | None:
        with self._bodies.place() as counted:
            asked, served = await self._asked(exchange, request, ChatRequest, counted)
            talk = conversation(asked, served)
            prompt = await render(self._renderer, talk)
            wanted = requests(asked, served, talk, prompt)
            counted.grow(_size(wanted))
            chats = Chats(exchange, served.name or asked.model or "", asked, talk, prompt)
            if asked.stream:
                await chats.stream(self._forwarder, self._tracer, wanted)
                return None
            return await chats.whole(self._forwarder, self._tracer, wanted)

    async def _asked(
        self, exchange: Exchange, request: Request, kind: type[T], counted: Counted
    ) -> tuple[T, Served]:
        """The request in a body, and the model that will answer it."""
        most = bodies.most_bytes(self._forwarder.served.context_length)
        body = await self._bodies.read(request, most, counted)
        asked = bodies.decode(body, kind)
        if not self._forwarder.served.name:
            await exchange.wait(self._until_served(len(body)))
        return asked, self._forwarder.served

    async def _until_served(self, size: int) -> None:
        """Waits for a first replica, whose model says what holds for fields that a request does not set."""
        status = await self._forwarder.until_replica(size)
        if status is not None:
            raise of_status(status, {})

    async def _list_models(self, exchange: Exchange, request: Request) -> bytes:  # noqa: ARG002
        return answers.encode(answers.ModelList([self._described()]))

    async def _get_model(self, exchange: Exchange, request: Request) -> bytes:  # noqa: ARG002
        described, asked = self._described(), request.path_params["model"]
        if asked != described.id:
            sentence = f"model {asked[:_SHOWN]!r} is not served here; ask for {described.id!r}"
            raise ApiError(404, sentence, param="model", code="model_not_found")
        return answers.encode(described)

    def _described(self) -> answers.Model:
        served = self._forwarder.served
        if not served.name:
            sentence = "no replica has been ready yet, so the model is not known; try later"
            raise ApiError(503, sentence, "server_error", code="unavailable", retry_after_s=1.0)
        return answers.Model(
            id=served.name,
            object="model",
            created=self._began,
            owned_by="moe-operator",
            max_model_len=served.context_length,
        )

    async def _health(self, request: Request) -> Response:  # noqa: ARG002
        return Response(status_code=200 if self._ready() else 503)


class _Endpoint:
    """An ASGI application: one route, whose handler gives JSON or has sent its answer itself."""

    def __init__(self, path: str, handler: _Handler) -> None:
        self._path = path
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["measured"].route = self._path
        try:
            exchange = new_exchange(scope, receive, send)
            body = await self._handler(exchange, Request(scope, receive))
        except ApiError as error:
            await answer_error(error, send)
            return
        if body is not None:
            await answer(body, send)


def _size(asked: Sequence[inference_pb2.GenerateRequest]) -> int:
    """Bytes of what is sent to replicas: each text has a copy of its prompt."""
    return sum(request.ByteSize() for request in asked)


async def _version(request: Request) -> Response:  # noqa: ARG001
    version = importlib.metadata.version("moe-operator")
    return Response(answers.encode({"version": version}), media_type="application/json")


async def _openapi(request: Request) -> Response:  # noqa: ARG001
    return Response(openapi.document(), media_type="application/json")


async def _metrics(request: Request) -> Response:  # noqa: ARG001
    text = await asyncio.to_thread(prometheus_client.generate_latest)
    return PlainTextResponse(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)


async def _refused(request: Request, error: Exception) -> Response:
    """What Starlette refuses: paths and methods that there are not."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    allow = (getattr(error, "headers", None) or {}).get("Allow")
    where = f"{request.method} {request.url.path}"[:_SHOWN]
    known = (
        "/v1/chat/completions, /v1/completions and /v1/models are, and /health, /version, /metrics, "
        "/openapi.json"
    )
    refusal = ApiError(status, f"{where!r} is not served here; {known}", allow=allow)
    return _error_response(refusal)


async def _failed(request: Request, error: Exception) -> Response:  # noqa: ARG001 - uvicorn logs it
    """What nobody foresaw."""
    name = request.scope["state"].get("id", "")
    sentence = f"the frontend failed on request {name}: this is a bug; report it with the frontend's log"
    return _error_response(ApiError(500, sentence, SERVER_ERROR))


def _error_response(error: ApiError) -> Response:
    response = Response(answers.encode(error.body()), error.status, media_type="application/json")
    response.raw_headers.extend(error.headers())
    return response

"""moe_api.inference.v1.ChatService of a frontend."""

import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import grpc
from google.rpc import status_pb2
from opentelemetry import trace

from moe_api import rich_status, spans
from moe_api.inference.v1 import chat_pb2, chat_pb2_grpc, inference_pb2
from moe_api.rich_status import FieldViolation
from moe_frontend.chat.parsing import Parser, ToolCall, unformatted
from moe_frontend.chat.renderer import Renderer
from moe_frontend.http.chats import output_format, render
from moe_frontend.http.conversation import conversation
from moe_frontend.http.errors import ApiError
from moe_frontend.rpc.messages import chat_request
from moe_frontend.transport.failures import Failure
from moe_frontend.transport.forwarding import Context, Forwarder, give_up
from moe_frontend.transport.service import CHAT_SERVICE, SERVICE

_CHAT: Final = f"{CHAT_SERVICE}/Chat"
_GENERATE: Final = f"{SERVICE}/Generate"
_RENAMED: Final = {
    "prompt": "messages",
    "output_format.tagged": "tools",
    "output_format.tagged.tags": "tools",
}
_NAMES: Final = (
    ("chat_template_kwargs", "template_arguments"),
    ("response_format", "output_format"),
    ("].function.", "]."),
)
_CODES: Final = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}


@dataclass(frozen=True)
class _Asked:
    """What a conversation asks the replicas for. parser: of the text."""

    request: inference_pb2.GenerateRequest
    parser: Parser


class ChatService(chat_pb2_grpc.ChatServiceServicer):
    """Answers conversations by what the forwarder reaches.

    Args:
        forwarder: answers requests for text.
        renderer: of conversations.
        tracer: of their spans.
        serve: does the work of a call (`Frontend.serve`).
    """

    def __init__(
        self,
        forwarder: Forwarder,
        renderer: Renderer,
        tracer: trace.Tracer,
        serve: Callable[[str, Context, Callable[[], Awaitable[None]]], Awaitable[None]],
    ) -> None:
        self._forwarder = forwarder
        self._renderer = renderer
        self._tracer = tracer
        self._serve = serve

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to a server."""
        chat_pb2_grpc.add_ChatServiceServicer_to_server(self, server)

    async def Chat(self, request: chat_pb2.ChatRequest, context: Context) -> None:  # type: ignore[override]  # noqa: N802 - the stubs know generators only
        """Streams the answer to a conversation."""
        await self._serve(_CHAT, context, lambda: self._chat(request, context))

    async def _chat(self, request: chat_pb2.ChatRequest, context: Context) -> None:
        with spans.server_span(self._tracer, context, _CHAT) as span:
            try:
                asked = await self._asked(request, context)
            except ApiError as error:
                await rich_status.abort(context, status_of(error))
            answer = _Answer(context, asked.parser)
            failure = await self._forwarder.answer(_GENERATE, asked.request, answer, span)
            if failure is not None:
                await give_up(_renamed(failure), context)

    async def _asked(self, request: chat_pb2.ChatRequest, context: Context) -> _Asked:
        asked = chat_request(request)
        if not self._forwarder.served.name:  # a first replica says which template there is
            status = await self._forwarder.until_replica(request.ByteSize())
            if status is not None:
                await rich_status.abort(context, status)
        served = self._forwarder.served
        talk = conversation(asked, served)
        prompt = await render(self._renderer, talk)
        generate = inference_pb2.GenerateRequest(
            model=request.model, prompt=prompt, without_special_tokens=True, sampling=request.sampling
        )
        if not generate.sampling.HasField("max_tokens"):
            generate.sampling.max_tokens = max(served.context_length, 1)
        after = unformatted(talk.thinks, prompt)
        if request.HasField("output_format"):
            generate.output_format.CopyFrom(request.output_format)
            generate.output_format.after = after
        elif (forced := output_format(asked, talk, after)) is not None:
            generate.output_format.CopyFrom(forced)
        return _Asked(generate, Parser(talk.thinks, talk.tools, prompt))


class _Answer:
    """Takes the place of the call's context: the text becomes reasoning, content and calls of tools."""

    def __init__(self, context: Context, parser: Parser) -> None:
        self._context = context
        self._parser = parser
        self._id = uuid.uuid4().hex
        self._calls = 0

    def invocation_metadata(self) -> Iterable[Any] | None:
        return self._context.invocation_metadata()

    def time_remaining(self) -> float | None:
        return self._context.time_remaining()

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self._context.set_trailing_metadata(trailing_metadata)

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        await self._context.send_initial_metadata(initial_metadata)

    async def write(self, message: bytes) -> None:
        response = inference_pb2.GenerateResponse.FromString(message)
        last = response.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED
        piece = self._parser.take(response.text, last=last)
        said = chat_pb2.ChatResponse(
            reasoning_content=piece.reasoning,
            content=piece.content,
            tool_calls=self._numbered(piece.calls),
            tokens=response.tokens,
            logprobs=response.logprobs,
            finish_reason=response.finish_reason,
        )
        if response.HasField("usage"):
            said.usage.CopyFrom(response.usage)
        await self._context.write(said)  # type: ignore[arg-type]  # the context of this service's calls

    def _numbered(self, calls: Iterable[ToolCall]) -> Iterator[chat_pb2.ToolCall]:
        for call in calls:
            yield chat_pb2.ToolCall(
                id=f"call_{self._id}_{self._calls}", name=call.name, arguments=call.arguments
            )
            self._calls += 1


def status_of(error: ApiError) -> status_pb2.Status:
    """An error of the HTTP API as a status of the gRPC API."""
    code = _CODES.get(error.status, grpc.StatusCode.INTERNAL)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        param = error.param or ""
        return rich_status.invalid_argument(
            [FieldViolation(_field(param), error.message.removeprefix(param).lstrip())]
        )
    if error.retry_after_s is not None:
        return rich_status.retry_later(code, error.message, error.retry_after_s)
    return rich_status.build(code, error.message)


def _field(param: str) -> str:
    """The field of a conversation that has this name over HTTP."""
    for theirs, ours in _NAMES:
        param = param.replace(theirs, ours)
    return param


def _renamed(failure: Failure) -> Failure:
    """A failure of the request to a replica, with the fields of the conversation."""
    violations = rich_status.field_violations(failure.status)
    if not violations:
        return failure
    renamed = [replace(one, field=_RENAMED.get(one.field, one.field)) for one in violations]
    return replace(failure, status=rich_status.invalid_argument(renamed))

"""``POST /v1/chat/completions``: the answer to a conversation, whole or as a stream."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace
from opentelemetry import trace

from moe_api.inference.v1 import inference_pb2
from moe_frontend.chat.parsing import Parser, Piece, ToolCall, unformatted
from moe_frontend.chat.renderer import Renderer, RendererBusyError, RendererNotStartedError, RenderError
from moe_frontend.discovery.endpoints import Served
from moe_frontend.http import answers, formats, sampling
from moe_frontend.http.answers import (
    Chat,
    ChatChoice,
    ChatChunk,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    Delta,
)
from moe_frontend.http.conversation import Conversation, most_tokens, top_logprobs
from moe_frontend.http.errors import OVERLOADED, SERVER_ERROR, ApiError
from moe_frontend.http.events import EventStream
from moe_frontend.http.exchange import Answering, Exchange
from moe_frontend.http.logprobs import chat_logprobs
from moe_frontend.http.prompts import check_together
from moe_frontend.http.schemas import ChatRequest, ToolChoice

PROMPT_MOST: Final = 16 * 2**20
"""Characters of a rendered conversation; the model's own bound is checked with the others."""
_RENAMED: Final = {
    "prompt": "messages",
    "prompt_tokens": "messages",
    "logprobs": "top_logprobs",
    **formats.RENAMED,
}


async def render(renderer: Renderer, asked: Conversation) -> str:
    """The prompt.

    Raises:
        ApiError: the template gives none.
    """
    try:
        return await renderer.render(asked.template, asked.variables, PROMPT_MOST)
    except RendererBusyError as error:
        raise ApiError(429, str(error), OVERLOADED, code="queue_full", retry_after_s=1.0) from None
    except RendererNotStartedError as error:
        raise ApiError(503, str(error), SERVER_ERROR, code="unavailable", retry_after_s=1.0) from None
    except RenderError as error:
        raise ApiError(400, str(error), param="messages") from None


def requests(
    request: ChatRequest, served: Served, talk: Conversation, prompt: str
) -> list[inference_pb2.GenerateRequest]:
    """What a rendered conversation asks the replicas for. Pure.

    Raises:
        ApiError: the request is not valid, as far as that can be told here.
    """
    check_together(len(prompt), request.n or 1)
    parameters = sampling.parameters(
        request,
        most_tokens=most_tokens(request, served),
        samples=served.samples,
        logprobs=top_logprobs(request),
    )
    wanted = output_format(request, talk, unformatted(talk.thinks, prompt))
    found = [
        inference_pb2.GenerateRequest(
            model=request.model or "",
            prompt=prompt,
            without_special_tokens=True,
            sampling=parameters,
            output_format=wanted,
        )
        for _ in range(request.n or 1)
    ]
    sampling.set_seeds(request, found)
    sampling.set_priority(request, found)
    return found


def output_format(request: ChatRequest, talk: Conversation, after: str) -> inference_pb2.OutputFormat | None:
    """What the text must be behind `after`: calls of tools, or the response format. Raises ApiError."""
    if not talk.forced or talk.tools is None:
        return formats.output_format(request.response_format, after)
    single = request.parallel_tool_calls is False or isinstance(request.tool_choice, ToolChoice)
    return formats.tool_calls(talk.forced, talk.tools, after, single=single)


@dataclass
class _Message:
    """One message as it comes."""

    parser: Parser
    begun: bool = False
    pieces: list[Piece] = field(default_factory=list)
    scores: list[inference_pb2.TokenLogprobs] = field(default_factory=list)
    calls: int = 0
    finish_reason: str | None = None
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)

    def take(self, response: inference_pb2.GenerateResponse) -> Piece:
        """What a response adds."""
        reason = answers.FINISH_REASONS[response.finish_reason]
        piece = self.parser.take(response.text, last=reason is not None)
        self.finish_reason = "tool_calls" if reason == "stop" and self.parser.called else reason
        if response.HasField("usage"):
            self.usage = response.usage
        return piece


class Chats:
    """The answer to one request.

    Args:
        exchange: with the client.
        model: name that the answer bears.
        request: of the client.
        asked: its conversation.
        prompt: what that was rendered to.
    """

    def __init__(
        self, exchange: Exchange, model: str, request: ChatRequest, asked: Conversation, prompt: str
    ) -> None:
        self._exchange = exchange
        self._model = model
        self._scores = bool(request.logprobs)
        self._include_usage = sampling.include_usage(request)
        self._messages = [_Message(Parser(asked.thinks, asked.tools, prompt)) for _ in range(request.n or 1)]
        self._events = EventStream(exchange.send)

    async def whole(
        self, service: Answering, tracer: trace.Tracer, asked: Sequence[inference_pb2.GenerateRequest]
    ) -> bytes:
        """The answer in one object.

        Raises:
            ApiError, ClientGoneError: there is none.
        """
        await self._exchange.generate(service, tracer, asked, self._gather, _RENAMED)
        choices = [self._choice(index, message) for index, message in enumerate(self._messages)]
        return answers.encode(
            Chat(
                id=f"chatcmpl-{self._exchange.id}",
                object="chat.completion",
                created=self._exchange.created,
                model=self._model,
                choices=choices,
                usage=self._usage(),
            )
        )

    async def stream(
        self, service: Answering, tracer: trace.Tracer, asked: Sequence[inference_pb2.GenerateRequest]
    ) -> None:
        """The answer as a stream of chunks.

        Raises:
            ApiError: it failed before the first one; later the stream says so.
            ClientGoneError: nobody reads it.
        """
        generation = self._exchange.generate(service, tracer, asked, self._pass_on, _RENAMED)
        usage = (lambda: self._chunk([], self._usage())) if self._include_usage else None
        await self._events.carry(generation, usage)

    async def _gather(self, index: int, response: inference_pb2.GenerateResponse) -> None:
        message = self._messages[index]
        message.pieces.append(message.take(response))
        message.scores.extend(response.logprobs)

    async def _pass_on(self, index: int, response: inference_pb2.GenerateResponse) -> None:
        message = self._messages[index]
        piece = message.take(response)
        delta = self._delta(message, piece)
        scores = chat_logprobs(response.logprobs) if self._scores else None
        if delta == Delta() and not (scores and scores.content) and message.finish_reason is None:
            return
        choice = ChunkChoice(index=index, delta=delta, logprobs=scores, finish_reason=message.finish_reason)
        await self._events.event(self._chunk([choice]))

    def _delta(self, message: _Message, piece: Piece) -> Delta:
        fields: dict[str, object] = {}
        if not message.begun:
            message.begun = True
            fields["role"] = "assistant"
            if not (piece.reasoning or piece.calls):
                fields["content"] = ""
        if piece.reasoning:
            fields["reasoning_content"] = piece.reasoning
        if piece.content:
            fields["content"] = piece.content
        if piece.calls:
            numbered = enumerate(piece.calls, start=message.calls)
            fields["tool_calls"] = [self._call(message, number, call) for number, call in numbered]
            message.calls += len(piece.calls)
        return Delta(**fields)  # type: ignore[arg-type]

    def _call(
        self, message: _Message, number: int, call: ToolCall, *, numbered: bool = True
    ) -> answers.AnsweredToolCall:
        function = answers.AnsweredFunction(call.name, call.arguments)
        index = next(at for at, one in enumerate(self._messages) if one is message)
        id_ = f"call_{self._exchange.id}_{index}_{number}"
        if numbered:
            return answers.AnsweredToolCall(index=number, id=id_, type="function", function=function)
        return answers.AnsweredToolCall(id=id_, type="function", function=function)

    def _choice(self, index: int, message: _Message) -> ChatChoice:
        content = "".join(piece.content for piece in message.pieces)
        reasoning = "".join(piece.reasoning for piece in message.pieces)
        found = [call for piece in message.pieces for call in piece.calls]
        calls = [self._call(message, number, call, numbered=False) for number, call in enumerate(found)]
        said = ChatMessage(role="assistant", content=None if calls and not content.strip() else content)
        if reasoning:
            said = replace(said, reasoning_content=reasoning)
        if calls:
            said = replace(said, tool_calls=calls)
        scores: ChatLogprobs | None = chat_logprobs(message.scores) if self._scores else None
        return ChatChoice(index=index, message=said, logprobs=scores, finish_reason=message.finish_reason)

    def _chunk(self, choices: list[ChunkChoice], usage: answers.Usage | None = None) -> bytes:
        chunk = ChatChunk(
            id=f"chatcmpl-{self._exchange.id}",
            object="chat.completion.chunk",
            created=self._exchange.created,
            model=self._model,
            choices=choices,
            usage=usage,
        )
        return answers.encode(chunk)

    def _usage(self) -> answers.Usage:
        return answers.total((message.usage for message in self._messages), len(self._messages))

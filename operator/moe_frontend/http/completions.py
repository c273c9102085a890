"""``POST /v1/completions``: what a request asks the replicas for, and its answer, whole or as a stream."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from opentelemetry import trace

from moe_api.inference.v1 import inference_pb2
from moe_frontend.discovery.endpoints import Served
from moe_frontend.http import answers, formats, prompts, sampling
from moe_frontend.http.answers import Completion, CompletionChoice, Logprobs
from moe_frontend.http.errors import invalid
from moe_frontend.http.events import EventStream
from moe_frontend.http.exchange import Answering, Exchange
from moe_frontend.http.logprobs import CompletionLogprobs, joined
from moe_frontend.http.prompts import Prompt
from moe_frontend.http.schemas import CompletionRequest

MAX_TOKENS: Final = 16
"""OpenAI's default."""
_RENAMED: Final = {"prompt_tokens": "prompt", **formats.RENAMED}


@dataclass(frozen=True)
class Plan:
    """What a request asks for.

    Attributes:
        requests: one for each text; the texts of a prompt are neighbours.
        echoes: what is put before each text.
        n: texts of each prompt.
    """

    requests: Sequence[inference_pb2.GenerateRequest]
    echoes: Sequence[str]
    n: int
    stream: bool
    include_usage: bool
    logprobs: bool


def plan(request: CompletionRequest, served: Served) -> Plan:
    """What the request asks for. Pure.

    Raises:
        ApiError: it is not valid, as far as that can be told here.
    """
    sampling.refuse({"suffix": request.suffix or None})
    n = request.n or 1
    if request.best_of not in (None, n):
        raise invalid("best_of", "is not supported; leave it out, or give the value of n")
    given = prompts.prompts(request.prompt)
    prompts.check_number(given, n)
    if request.echo:
        _check_echo(request, given)
    parameters = sampling.parameters(
        request,
        most_tokens=MAX_TOKENS if request.max_tokens is None else request.max_tokens,
        samples=served.samples,
        logprobs=request.logprobs,
    )
    wanted = formats.output_format(request.response_format)
    asked = [_generate(request.model or "", prompt, parameters, wanted) for prompt in given for _ in range(n)]
    sampling.set_seeds(request, asked)
    sampling.set_priority(request, asked)
    echoed = [prompt if request.echo and isinstance(prompt, str) else "" for prompt in given]
    return Plan(
        asked,
        [echo for echo in echoed for _ in range(n)],
        n,
        bool(request.stream),
        sampling.include_usage(request),
        request.logprobs is not None,
    )


def _check_echo(request: CompletionRequest, given: Sequence[Prompt]) -> None:
    """What echo cannot do: workers give neither log-probabilities of a prompt nor the text of token ids."""
    if request.logprobs is not None:
        raise invalid(
            "echo", "with logprobs is not supported: prompts are not scored; leave one of the two out"
        )
    if not all(isinstance(prompt, str) for prompt in given):
        raise invalid("echo", "needs prompts that are texts; leave it out for token ids")


def _generate(
    model: str,
    prompt: Prompt,
    parameters: inference_pb2.SamplingParameters,
    output_format: inference_pb2.OutputFormat | None,
) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(model=model, sampling=parameters, output_format=output_format)
    if isinstance(prompt, str):
        request.prompt = prompt
    else:
        request.prompt_tokens.ids.extend(prompt)
    return request


@dataclass
class _Text:
    """One text as it comes."""

    logprobs: CompletionLogprobs
    begun: bool = False
    parts: list[str] = field(default_factory=list)
    scores: list[Logprobs] = field(default_factory=list)
    finish_reason: str | None = None
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)


class Completions:
    """The answer to one request.

    Args:
        exchange: with the client.
        model: name that the answer bears.
        asked: what is asked for.
    """

    def __init__(self, exchange: Exchange, model: str, asked: Plan) -> None:
        self._exchange = exchange
        self._model = model
        self._plan = asked
        self._texts = [_Text(CompletionLogprobs(len(echo))) for echo in asked.echoes]
        self._events = EventStream(exchange.send)

    async def whole(self, service: Answering, tracer: trace.Tracer) -> bytes:
        """The answer in one object.

        Raises:
            ApiError, ClientGoneError: there is none.
        """
        await self._exchange.generate(service, tracer, self._plan.requests, self._gather, _RENAMED)
        choices = [
            self._choice(index, echo + "".join(text.parts), joined(text.scores))
            for index, (echo, text) in enumerate(zip(self._plan.echoes, self._texts, strict=True))
        ]
        return answers.encode(self._completion(choices, self._usage()))

    async def stream(self, service: Answering, tracer: trace.Tracer) -> None:
        """The answer as a stream of chunks.

        Raises:
            ApiError: it failed before the first one; later the stream says so.
            ClientGoneError: nobody reads it.
        """
        generation = self._exchange.generate(service, tracer, self._plan.requests, self._pass_on, _RENAMED)
        await self._events.carry(generation, self._last_chunk if self._plan.include_usage else None)

    def _last_chunk(self) -> bytes:
        return answers.encode(self._completion([], self._usage()))

    async def _gather(self, index: int, response: inference_pb2.GenerateResponse) -> None:
        text = self._note(index, response)
        text.parts.append(response.text)
        text.scores.append(text.logprobs.take(response.logprobs))

    async def _pass_on(self, index: int, response: inference_pb2.GenerateResponse) -> None:
        """Sends a chunk; tokens that make no text yet are worth none, but for their log-probabilities."""
        text = self._note(index, response)
        scores = text.logprobs.take(response.logprobs)
        echo, text.begun = "" if text.begun else self._plan.echoes[index], True
        if echo or response.text or scores.tokens or text.finish_reason:
            choice = self._choice(index, echo + response.text, scores)
            await self._events.event(answers.encode(self._completion([choice])))

    def _note(self, index: int, response: inference_pb2.GenerateResponse) -> _Text:
        text = self._texts[index]
        text.finish_reason = answers.FINISH_REASONS[response.finish_reason]
        if response.HasField("usage"):
            text.usage = response.usage
        return text

    def _choice(self, index: int, text: str, scores: Logprobs) -> CompletionChoice:
        reason = self._texts[index].finish_reason
        return CompletionChoice(index, text, scores if self._plan.logprobs else None, reason)

    def _completion(self, choices: list[CompletionChoice], usage: answers.Usage | None = None) -> Completion:
        return Completion(
            id=f"cmpl-{self._exchange.id}",
            object="text_completion",
            created=self._exchange.created,
            model=self._model,
            choices=choices,
            usage=usage,
        )

    def _usage(self) -> answers.Usage:
        return answers.total((text.usage for text in self._texts), self._plan.n)

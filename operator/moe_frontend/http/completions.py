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
SCORES_MOST: Final = 2**19
"""Log-probabilities of the prompts of one request whose answer is one object: about 100 bytes each."""
_RENAMED: Final = {"prompt_tokens": "prompt", "prompt_logprobs": "echo", **formats.RENAMED}


@dataclass(frozen=True)
class Plan:
    """What a request asks for.

    Attributes:
        requests: one for each text; the texts of a prompt are neighbours.
        echoes: the prompt that is put before each text; "": none, or it comes token by token.
        n: texts of each prompt.
        prompt_alone: whether no text is generated. Workers generate a token nevertheless.
    """

    requests: Sequence[inference_pb2.GenerateRequest]
    echoes: Sequence[str]
    n: int
    stream: bool
    include_usage: bool
    logprobs: bool
    prompt_alone: bool


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
    most_tokens = MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if not (most_tokens or request.echo):
        raise invalid("max_tokens", "is 0, which needs echo; ask for 1 token at least")
    parameters = sampling.parameters(
        request,
        most_tokens=max(most_tokens, 1),
        samples=served.samples,
        logprobs=request.logprobs,
        prompt_logprobs=_prompt_logprobs(request, given),
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
        not most_tokens,
    )


def _prompt_logprobs(request: CompletionRequest, given: Sequence[Prompt]) -> int | None:
    """Likely tokens to report with each token of the prompts; None: the prompts' tokens are not needed."""
    if not request.echo:
        return None
    of_ids = not isinstance(given[0], str)  # whose text the worker knows
    return 0 if request.logprobs is None and of_ids else request.logprobs


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
    """One text as it comes. echo: of the prompt, not sent yet."""

    logprobs: CompletionLogprobs
    echo: str
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
        self._texts = [_Text(CompletionLogprobs(echo), echo) for echo in asked.echoes]
        self._scores_left = SCORES_MOST
        self._events = EventStream(exchange.send)

    async def whole(self, service: Answering, tracer: trace.Tracer) -> bytes:
        """The answer in one object.

        Raises:
            ApiError, ClientGoneError: there is none.
        """
        await self._exchange.generate(service, tracer, self._plan.requests, self._gather, _RENAMED)
        choices = [
            self._choice(index, "".join(text.parts), joined(text.scores))
            for index, text in enumerate(self._texts)
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
        added, scores = self._take(index, response)
        self._scores_left -= sum(len(token.top) + 1 for token in response.prompt)
        if self._scores_left < 0:
            problem = f"with logprobs asks for more than {SCORES_MOST} log-probabilities of prompts"
            raise invalid("echo", f"{problem}; send several requests, or stream")
        self._texts[index].parts.append(added)
        self._texts[index].scores.append(scores)

    async def _pass_on(self, index: int, response: inference_pb2.GenerateResponse) -> None:
        """Sends a chunk; tokens that make no text yet are worth none, but for their log-probabilities."""
        added, scores = self._take(index, response)
        shown = scores.tokens if self._plan.logprobs else ()
        if added or shown or self._texts[index].finish_reason:
            choice = self._choice(index, added, scores)
            await self._events.event(answers.encode(self._completion([choice])))

    def _take(self, index: int, response: inference_pb2.GenerateResponse) -> tuple[str, Logprobs]:
        """What a response adds: text, of the prompt as well where that is echoed, and its tokens."""
        text = self._texts[index]
        text.finish_reason = answers.FINISH_REASONS[response.finish_reason]
        if response.HasField("usage"):
            text.usage = response.usage
        echo, text.echo = text.echo, ""
        of_prompt, prompt_scores = text.logprobs.take_prompt(response.prompt)
        if not self._plan.echoes[index]:
            echo += of_prompt
        if self._plan.prompt_alone:
            text.usage.completion_tokens = 0
            text.finish_reason = text.finish_reason and "length"
            return echo, prompt_scores
        scores = text.logprobs.take(response.logprobs)
        return echo + response.text, joined((prompt_scores, scores))

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

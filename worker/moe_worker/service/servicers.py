"""The RPCs of a worker."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.metrics import Meter

from moe_api import rich_status, spans
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_api.rich_status import FieldViolation
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_worker.config.model import ModelConfig
from moe_worker.engine.requests import FinishReason, Load
from moe_worker.engine.statistics import Statistics
from moe_worker.errors import EngineDiedError, QueueFullError
from moe_worker.models.tokenizer import Tokenizer
from moe_worker.sampling.defaults import NEUTRAL
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.service.engine_client import EngineClient
from moe_worker.service.load_messages import expert_message, load_message
from moe_worker.service.request_metrics import RequestMetrics
from moe_worker.service.streams import Chunk, Stream
from moe_worker.service.tracing import describe_request, record_outcome
from moe_worker.service.validation import Checked, Limits, check_generate, defaults_message

GENERATE = "moe_api.inference.v1.InferenceService/Generate"
# Loading takes seconds to minutes, a drained worker does not come back: a frontend asks another one.
RETRY_ELSEWHERE_S = 1.0
# Longer texts are tokenized in a thread: 64 KiB take some 10 ms, which other streams would wait for.
TOKENIZE_INLINE_CHARACTERS = 2_000
FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
FAILURES = {
    FinishReason.DEADLINE: (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "the deadline of the call passed; allow more time, or ask for fewer tokens",
    ),
    FinishReason.FAILED: (
        grpc.StatusCode.INTERNAL,
        "the model gave no valid probabilities for the next token; check its weights (serve --check-weights)",
    ),
}
Context = grpc.aio.ServicerContext[Any, Any]


class Phase(Enum):
    """Where the worker is in its life; the text is what refused requests are told."""

    LOADING = "the model is still loading; try again"
    SERVING = ""
    DRAINING = "this worker is shutting down; try another one"


@dataclass(frozen=True)
class Served:
    """The model behind the RPCs."""

    name: str
    config: ModelConfig
    context_length: int
    tokenizer: Tokenizer
    engine: EngineClient
    revision: str = ""
    defaults: SamplingParameters = NEUTRAL

    @property
    def limits(self) -> Limits:
        """What requests are checked against."""
        ends = frozenset(self.config.eos_token_ids)
        return Limits(self.config.vocab_size, self.context_length, ends, self.defaults)


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """moe_api.inference.v1.InferenceService; takes requests while its phase is SERVING."""

    def __init__(self, tracer: trace.Tracer, meter: Meter) -> None:
        self.phase = Phase.LOADING
        self.served: Served | None = None
        self.metrics = RequestMetrics(meter)
        self._tracer = tracer

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Streams a continuation."""
        with spans.server_span(self._tracer, context, GENERATE) as span:
            served = await self._available(request.model, context)
            await _check_revision(request.resume.revision, served, context)
            checked = await _check(request, served, context)
            await self._available(request.model, context)  # a long prompt takes time: draining may have begun
            describe_request(span, served.name, checked.sampling, len(checked.prompt))
            async with contextlib.aclosing(self._stream(served, checked, span, context)) as responses:
                async for response in responses:
                    yield response

    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """Turns text into token ids."""
        served = await self._available(request.model, context)
        ids = await asyncio.to_thread(served.tokenizer.encode, request.text, request.add_special_tokens)
        return inference_pb2.TokenizeResponse(tokens=inference_pb2.TokenIds(ids=ids))

    async def GetModel(  # noqa: N802
        self, request: inference_pb2.GetModelRequest, context: Context
    ) -> inference_pb2.Model:
        """Says which model is served."""
        served = await self._available(request.model, context)
        return inference_pb2.Model(
            name=served.name,
            architecture=served.config.architecture,
            parameters_total=served.config.parameters_total,
            parameters_active=served.config.parameters_active,
            format=served.engine.format,
            context_length=served.context_length,
            vocabulary_size=served.config.vocab_size,
            revision=served.revision,
            sampling_defaults=defaults_message(served.defaults),
        )

    async def _available(self, model: str, context: Context) -> Served:
        """The served model, if it is the one asked for and takes requests; else ends the call."""
        if self.phase is not Phase.SERVING or self.served is None:
            code = grpc.StatusCode.UNAVAILABLE
            await rich_status.abort(
                context, rich_status.retry_later(code, self.phase.value, RETRY_ELSEWHERE_S)
            )
        if model not in ("", self.served.name):
            sentence = f"model {model!r} is not served here; ask for {self.served.name!r}, or leave it empty"
            await rich_status.abort(context, rich_status.build(grpc.StatusCode.NOT_FOUND, sentence))
        return self.served

    async def _stream(
        self, served: Served, checked: Checked, span: trace.Span, context: Context
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        seed = secrets.randbits(64) if checked.seed is None else checked.seed
        self.metrics.receive()
        try:
            number, stream = served.engine.submit(
                checked.prompt, checked.sampling, seed, _deadline(context), checked.written
            )
        except QueueFullError as error:
            self.metrics.refuse(served.name)
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
            await rich_status.abort(context, rich_status.retry_later(code, str(error), error.retry_after_s))
        try:
            resumed = len(checked.written)
            while stream.timeline.finish_reason is None or stream.pending:
                chunk = await stream.take()
                if chunk.finish_reason in FAILURES:
                    break
                response = _response(
                    chunk, len(checked.prompt), len(checked.written) + stream.timeline.tokens
                )
                response.resumed, resumed = resumed, 0  # on the first message only
                yield response
            if stream.timeline.finish_reason in FAILURES:
                await rich_status.abort(context, rich_status.build(*FAILURES[stream.timeline.finish_reason]))
        except EngineDiedError as error:
            code = grpc.StatusCode.UNAVAILABLE
            status = rich_status.retry_later(code, str(error), RETRY_ELSEWHERE_S, rich_status.ENGINE_DIED)
            await rich_status.abort(context, status)
        finally:
            # Also when the client has gone: the engine frees the slot before its next step.
            served.engine.close(number)
            now_ns = time.time_ns()
            record_outcome(self._tracer, span, served.name, stream.timeline, now_ns)
            failure = _failure(stream, context)
            self.metrics.end(served.name, len(checked.prompt), stream.timeline, failure, now_ns)


class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    """moe_api.worker.v1.WorkerService; answers from what the engine said last, so at once.

    stop: set where the worker shall drain and end.
    """

    def __init__(self, inference: InferenceService, stop: asyncio.Event) -> None:
        self._inference = inference
        self._stop = stop

    async def Drain(  # noqa: N802
        self,
        request: worker_pb2.DrainRequest,  # noqa: ARG002
        context: Context,
    ) -> worker_pb2.Drained:
        """Takes no more requests; ends when those under way have."""
        served = self._inference.served
        if served is None:
            code = grpc.StatusCode.UNAVAILABLE
            await rich_status.abort(
                context, rich_status.retry_later(code, Phase.LOADING.value, RETRY_ELSEWHERE_S)
            )
        self._inference.phase = Phase.DRAINING
        self._stop.set()
        return worker_pb2.Drained(requests=served.engine.requests)

    async def GetLoad(self, request: worker_pb2.GetLoadRequest, context: Context) -> worker_pb2.Load:  # noqa: N802, ARG002
        """Says how busy this worker is."""
        served, requests = self._inference.served, self._inference.metrics
        if served is None:
            return load_message(Load(), Statistics(), 0.0, requests)
        engine = served.engine
        return load_message(engine.current_load, engine.statistics, engine.step_s, requests)

    async def GetExpertLoad(  # noqa: N802
        self,
        request: worker_pb2.GetExpertLoadRequest,  # noqa: ARG002
        context: Context,
    ) -> worker_pb2.ExpertLoad:
        """Says which experts tokens went to."""
        served, code = self._inference.served, grpc.StatusCode.UNAVAILABLE
        if served is None:
            await rich_status.abort(
                context, rich_status.retry_later(code, Phase.LOADING.value, RETRY_ELSEWHERE_S)
            )
        try:
            return expert_message(await served.engine.expert_statistics())
        except EngineDiedError as error:
            await rich_status.abort(context, rich_status.retry_later(code, str(error), RETRY_ELSEWHERE_S))


async def _check(request: inference_pb2.GenerateRequest, served: Served, context: Context) -> Checked:
    """The request in the engine's terms; else ends the call with a violation for each wrong field."""
    if len(request.prompt) <= TOKENIZE_INLINE_CHARACTERS:
        checked = check_generate(request, served.tokenizer, served.limits)
    else:
        checked = await asyncio.to_thread(check_generate, request, served.tokenizer, served.limits)
    if isinstance(checked, list):
        violations = [FieldViolation(violation.field, violation.description) for violation in checked]
        await rich_status.abort(context, rich_status.invalid_argument(violations))
    return checked


async def _check_revision(revision: str, served: Served, context: Context) -> None:
    """Ends the call where a stream of another revision is to be taken up: the text would change midway."""
    if revision not in ("", served.revision):
        sentence = f"the stream is of revision {revision!r}, this worker of {served.revision!r}; ask another"
        await rich_status.abort(context, rich_status.build(grpc.StatusCode.FAILED_PRECONDITION, sentence))


def _failure(stream: Stream, context: Context) -> str | None:
    """The status that a request ends with; None where it has its whole text."""
    if stream.timeline.finish_reason in FINISH_REASONS:
        return None
    if stream.timeline.finish_reason is FinishReason.DEADLINE:
        return grpc.StatusCode.DEADLINE_EXCEEDED.name
    return grpc.StatusCode.UNAVAILABLE.name if stream.failed else spans.why_cancelled(context).name


def _deadline(context: Context) -> float | None:
    """When the client stops waiting, on this machine's monotonic clock, which all its processes share."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def _response(chunk: Chunk, prompt_tokens: int, completion_tokens: int) -> inference_pb2.GenerateResponse:
    response = inference_pb2.GenerateResponse(text=chunk.text, tokens=chunk.tokens)
    for logprobs in chunk.logprobs:
        top = [inference_pb2.TopLogprob(token=token, logprob=value) for token, value in logprobs.top]
        response.logprobs.append(inference_pb2.TokenLogprobs(logprob=logprobs.logprob, top=top))
    if chunk.finish_reason is not None:
        response.finish_reason = FINISH_REASONS[chunk.finish_reason]
        response.usage.prompt_tokens = prompt_tokens
        response.usage.completion_tokens = completion_tokens
    return response

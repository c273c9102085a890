"""moe_api.inference.v1.InferenceService of a worker."""

import secrets
import time
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.metrics import Meter

from moe_api import rich_status, spans
from moe_api.clock import Anchor, deadline_s
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_api.prefixes import ends_of, names_of
from moe_api.tenancy import MalformedTenancyError, Tenancy, tenancy_of
from moe_api.writing import WRITE_TIMEOUT_S, SlowReaderError, Writer
from moe_worker.config.model import ModelConfig
from moe_worker.engine.requests import Request
from moe_worker.errors import QueueFullError, WorkerError
from moe_worker.models.chat_template import ChatTemplate
from moe_worker.models.tokenizer import Tokenizer
from moe_worker.sampling.defaults import NEUTRAL
from moe_worker.sampling.parameters import SamplingParameters, Violation
from moe_worker.scheduler.plan import Block
from moe_worker.service import answers
from moe_worker.service.engine_client import EngineClient
from moe_worker.service.formats import Formats
from moe_worker.service.off_loop import OffLoop
from moe_worker.service.request_metrics import RequestMetrics
from moe_worker.service.streams import Stream
from moe_worker.service.tracing import describe_request, record_outcome
from moe_worker.service.validation import (
    Checked,
    RequestLimits,
    check_generate,
    defaults_message,
    oversize,
    oversize_name,
    oversize_text,
    size,
    token_ids,
    too_many,
)

GENERATE = "moe_api.inference.v1.InferenceService/Generate"
# Longer requests are checked in a thread: 64 KiB of text take about 10 ms, for which other streams would
# wait.
INLINE_SIZE = 2_000
Context = grpc.aio.ServicerContext[Any, Any]


class Phase(Enum):
    """The worker's phase; the value is the message of refused requests."""

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
    chat_template: ChatTemplate | None = None

    @property
    def limits(self) -> RequestLimits:
        """The limits for checking requests."""
        ends = frozenset(self.config.eos_token_ids)
        return RequestLimits(self.config.vocab_size, self.context_length, ends, self.defaults)


@dataclass(frozen=True)
class _Call:
    """One call of Generate. deadline: when its client stops waiting, on `time.monotonic`.

    tenancy: as the frontend states it.
    """

    context: Context
    span: trace.Span
    anchor: Anchor
    deadline: float | None
    tenancy: Tenancy


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """moe_api.inference.v1.InferenceService; accepts requests while its phase is SERVING.

    write_timeout_s: a stream whose client reads nothing for this long is stopped.
    """

    def __init__(self, tracer: trace.Tracer, meter: Meter, write_timeout_s: float = WRITE_TIMEOUT_S) -> None:
        self.phase = Phase.LOADING
        self.served: Served | None = None
        self.metrics = RequestMetrics(meter)
        self._tracer = tracer
        self.write_timeout_s = write_timeout_s
        self._off_loop = OffLoop()
        self._formats = Formats()

    async def close(self) -> None:
        """Ends the processes that check output formats."""
        await self._formats.close()

    async def Generate(  # type: ignore[override]  # noqa: N802 - the stubs know generators only
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> None:
        """Streams a continuation."""
        anchor = Anchor.now()
        try:
            with spans.server_span(self._tracer, context, GENERATE, anchor) as span:
                tenancy = await _tenancy(context)
                await self._generate(request, _Call(context, span, anchor, deadline_s(context), tenancy))
        except SlowReaderError as error:
            # Only after everything is released, because the status waits for the client.
            await rich_status.abort(context, error.status)

    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """Converts text into token ids."""
        served = await self._available(request.model, context)
        tokenizer, text, most = served.tokenizer, request.text, served.context_length
        await _refuse(oversize_text("text", text, tokenizer, most), context)
        try:
            ids = await self._off_loop.run(
                lambda: token_ids("text", text, tokenizer, most, request.add_special_tokens)
            )
        except QueueFullError as error:
            await rich_status.abort(context, answers.of_error(error))
        if not isinstance(ids, Violation) and len(ids) > most:
            ids = too_many("text", most)
        if isinstance(ids, Violation):
            await rich_status.abort(context, answers.of_violations([ids]))
        return inference_pb2.TokenizeResponse(tokens=inference_pb2.TokenIds(ids=ids))

    async def GetModel(  # noqa: N802
        self, request: inference_pb2.GetModelRequest, context: Context
    ) -> inference_pb2.Model:
        """Describes the served model."""
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
            characters_per_token=served.tokenizer.characters_per_token,
            sampling_defaults=defaults_message(served.defaults),
            chat_template=_template_message(served.chat_template),
            max_requests=served.engine.most_requests,
        )

    async def _available(self, model: str, context: Context) -> Served:
        """The served model, if it is the requested one and the worker serves; otherwise ends the call."""
        if self.phase is not Phase.SERVING or self.served is None:
            await rich_status.abort(context, answers.unavailable(self.phase.value))
        await _refuse(oversize_name(model), context)
        if model not in ("", self.served.name):
            sentence = f"model {model!r} is not served here; ask for {self.served.name!r}, or leave it empty"
            await rich_status.abort(context, rich_status.build(grpc.StatusCode.NOT_FOUND, sentence))
        return self.served

    async def _generate(self, request: inference_pb2.GenerateRequest, call: _Call) -> None:
        served = await self._available(request.model, call.context)
        await _check_revision(request.resume.revision, served, call.context)
        await _refuse(oversize(request, served.tokenizer, served.limits), call.context)
        number = await self._admit(served, call)
        try:
            checked = await self._check(request, served, call)
            describe_request(call.span, served.name, checked.sampling, len(checked.prompt))
            await self._stream(served, number, checked, call)
        except WorkerError as error:
            await rich_status.abort(call.context, answers.of_error(error))
        finally:
            # Also if the client has disconnected: the engine frees the slot before its next step.
            served.engine.close(number)

    async def _admit(self, served: Served, call: _Call) -> int:
        """Reserves a slot for the request before anything takes time; returns its number."""
        try:
            return served.engine.admit(call.tenancy.tenant)
        except WorkerError as error:
            if isinstance(error, QueueFullError):
                self.metrics.refuse(served.name)
            await rich_status.abort(call.context, answers.of_error(error))

    async def _check(self, request: inference_pb2.GenerateRequest, served: Served, call: _Call) -> Checked:
        """The request for the engine; otherwise ends the call with a violation for each wrong field."""
        salt = call.tenancy.salt if served.engine.cached.wanted else None
        context = call.context
        if size(request) <= INLINE_SIZE:
            checked = _checked(request, served, salt)
        else:
            checked = await self._off_loop.run(lambda: _checked(request, served, salt))
        if isinstance(checked, list):
            await rich_status.abort(context, answers.of_violations(checked))
        if checked.output_format is not None:
            wrong = await self._formats.violation(checked.output_format)
            await _refuse([] if wrong is None else [wrong], context)
        return checked

    async def _stream(self, served: Served, number: int, checked: Checked, call: _Call) -> None:
        seed = secrets.randbits(64) if checked.seed is None else checked.seed
        self.metrics.receive()
        stream = served.engine.submit(
            Request(
                number,
                checked.prompt,
                checked.sampling,
                seed,
                deadline=call.deadline,
                written=checked.written,
                output_format=checked.output_format,
                priority=max(checked.priority, call.tenancy.priority),
                tenant=call.tenancy.tenant,
                weight=call.tenancy.weight,
                salt=call.tenancy.salt,
                blocks=checked.blocks,
            ),
            call.anchor,
        )
        failure = None
        try:
            await self._send(stream, checked, served.tokenizer, call.context)
        except BaseException as error:
            failure = _failure(error, stream, call.deadline)
            raise
        finally:
            now_ns = time.monotonic_ns()
            record_outcome(self._tracer, call.span, served.name, stream.timeline, now_ns)
            self.metrics.end(served.name, len(checked.prompt), stream.timeline, failure, now_ns)

    async def _send(self, stream: Stream, checked: Checked, tokenizer: Tokenizer, context: Context) -> None:
        """Sends the engine's results. Raises SlowReaderError, and WorkerError if the stream failed."""
        writer, resumed = Writer(context, self.write_timeout_s), len(checked.written)
        scored = answers.PromptTokens(checked.prompt, tokenizer.piece) if checked.scored else None
        while stream.timeline.finish_reason is None or stream.pending:
            chunk = await stream.take()
            if chunk.finish_reason in answers.FAILURES:
                break
            usage = None if chunk.finish_reason is None else _usage(checked, stream)
            response = answers.of_chunk(chunk, usage, tokenizer.piece)
            response.resumed, resumed = resumed, 0  # on the first message only
            if scored is not None:
                response.prompt.extend(scored.take(chunk.prompt))
            await writer.write(response)
        if stream.timeline.finish_reason in answers.FAILURES:
            code, sentence = answers.FAILURES[stream.timeline.finish_reason]
            await rich_status.abort(context, rich_status.build(code, sentence))


def _checked(
    request: inference_pb2.GenerateRequest, served: Served, salt: str | None
) -> Checked | list[Violation]:
    """A checked request; with the names of its blocks if its prefixes have a salt that is known."""
    checked = check_generate(request, served.tokenizer, served.limits)
    if salt is None or isinstance(checked, list):
        return checked
    ends = ends_of(request, checked.prompt, served.tokenizer.piece)
    pairs = zip(names_of(request, salt), ends, strict=True)
    return replace(checked, blocks=tuple(Block(name, end) for name, end in pairs))


def _usage(checked: Checked, stream: Stream) -> inference_pb2.Usage:
    """Of the stream so far. Where it was taken up, the cache may hold tokens of the text as well."""
    timeline, prompt = stream.timeline, len(checked.prompt)
    return inference_pb2.Usage(
        prompt_tokens=prompt,
        completion_tokens=len(checked.written) + timeline.tokens,
        cached_tokens=min(timeline.cached_tokens, prompt),
    )


def _template_message(template: ChatTemplate | None) -> inference_pb2.ChatTemplate | None:
    if template is None:
        return None
    return inference_pb2.ChatTemplate(template=template.template, special_tokens=template.special_tokens)


async def _refuse(violations: list[Violation], context: Context) -> None:
    """Ends the call if there are violations."""
    if violations:
        await rich_status.abort(context, answers.of_violations(violations))


async def _tenancy(context: Context) -> Tenancy:
    """What the frontend says of the request's client; otherwise ends the call."""
    try:
        return tenancy_of(context.invocation_metadata())
    except MalformedTenancyError as error:
        await _refuse([Violation(f"metadata {error.key}", error.problem)], context)
        raise


async def _check_revision(revision: str, served: Served, context: Context) -> None:
    """Ends the call if it resumes a stream of another revision: the text would change midway."""
    if revision not in ("", served.revision):
        sentence = f"the stream is of revision {revision!r}, this worker of {served.revision!r}; ask another"
        await rich_status.abort(context, rich_status.build(grpc.StatusCode.FAILED_PRECONDITION, sentence))


def _failure(error: BaseException, stream: Stream, deadline: float | None) -> str | None:
    """The status under which a request that met `error` is counted; None if it is complete."""
    reason = stream.timeline.finish_reason
    if reason in answers.FAILURES:
        return answers.FAILURES[reason][0].name
    if isinstance(error, WorkerError):
        return rich_status.status_code(answers.of_error(error)).name
    if isinstance(error, SlowReaderError):
        return rich_status.status_code(error.status).name
    return None if reason in answers.FINISH_REASONS else spans.why_cancelled(deadline).name

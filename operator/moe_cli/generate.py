"""`moe generate`: a prompt in, text out as it is generated."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import click
import grpc
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from moe_api import semconv, telemetry
from moe_api.inference.v1 import inference_pb2
from moe_cli import sampling, timing
from moe_cli.timing import Timing
from moe_client import calling, errors, terminal
from moe_client.endpoint import Endpoint

_UNFINISHED: Final = inference_pb2.FINISH_REASON_UNSPECIFIED
_NO_END: Final = (
    "answer is not complete: the server ended it without a finish reason; update or report the server"
)
# A server ends a call directly after the last message of its response.
_END_S: Final = 5.0


@click.command()
@calling.model_options
@sampling.sampling_options
@click.option("--stats", is_flag=True, help="Print usage, TTFT and TPOT to stderr.")
@click.option(
    "--trace-id", is_flag=True, help="Print the trace id to stderr (as is done when traces are sent)."
)
@click.argument("prompt", type=calling.TEXT)
def generate(
    endpoint: Endpoint,
    model: str,
    timeout: float | None,
    prompt: str,
    *,
    stats: bool,
    trace_id: bool,
    **choices: Any,
) -> None:
    """Continues PROMPT and prints the text as it comes ("-" reads the prompt from standard input).

    \b
    moe generate "A Service in Kubernetes is" --max-tokens 64 --stats
    echo "Once" | moe generate - --temperature 0.8 --seed 1
    """
    request = build_request(model, prompt, choices)
    with telemetry.configure("moe") as handle:
        tracer = _tracer(sent=handle.enabled, wanted=trace_id)
        with tracer.start_as_current_span(
            "moe generate", kind=trace.SpanKind.CLIENT, record_exception=False, set_status_on_exception=False
        ) as span:
            if trace_id or handle.enabled:
                click.echo(f"trace: {span.get_span_context().trace_id:032x}", err=True)
            _describe_request(span, request)
            try:
                result = _call(endpoint, request, timeout)
            except errors.CommandError as error:
                span.set_status(trace.StatusCode.ERROR, error.format_message())
                raise
            _describe_result(span, result)
    if stats:
        click.echo(timing.summary(result), err=True)


def build_request(model: str, prompt: str, choices: dict[str, Any]) -> inference_pb2.GenerateRequest:
    """The request for the given options; the server applies its defaults for the others."""
    return inference_pb2.GenerateRequest(model=model, prompt=prompt, sampling=sampling.message(choices))


def print_stream(
    responses: Iterable[inference_pb2.GenerateResponse],
    clock: Callable[[], float] = time.monotonic,
    sent: float | None = None,
) -> Timing:
    """Prints text as it arrives, and log-probabilities to stderr; returns when the first and last arrived.

    Args:
        responses: of one call; nothing behind the message that ends the answer is read.
        clock: seconds, monotonic.
        sent: when the call began, by this clock. Default: now.

    Raises:
        CommandError: the answer has no end.
    """
    write = terminal.writer(sys.stdout)
    started = clock() if sent is None else sent
    first = last = None
    usage, reason, text = inference_pb2.Usage(), _UNFINISHED, ""
    for response in responses:
        last = clock()
        first = last if first is None and (response.tokens or response.text) else first
        text = response.text or text
        write(response.text)
        sys.stdout.flush()
        for line in sampling.logprob_lines(response):
            click.echo(line, err=True)
        if response.finish_reason != _UNFINISHED:
            usage, reason = response.usage, response.finish_reason
            break
    if sys.stdout.isatty() and not text.endswith("\n"):
        sys.stdout.write("\n")
    if reason == _UNFINISHED:
        raise errors.CommandError(_NO_END, errors.FAILED)
    return Timing(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        finish_reason=timing.reason_name(reason),
        first_s=None if first is None else first - started,
        total_s=(last or clock()) - started,
    )


def _tracer(*, sent: bool, wanted: bool) -> trace.Tracer:
    """With --trace-id the request gets a trace even where this side sends none: the servers may."""
    if wanted and not sent:
        return TracerProvider(shutdown_on_exit=False).get_tracer(__name__)
    return trace.get_tracer(__name__)


def _call(endpoint: Endpoint, request: inference_pb2.GenerateRequest, timeout: float | None) -> Timing:
    with calling.calling(endpoint) as stub:
        sent = time.monotonic()
        call = stub.Generate(request, timeout=timeout, metadata=telemetry.inject(endpoint.metadata))
        try:
            result = print_stream(call, sent=sent)
            _end(call)
            return result
        except BrokenPipeError:
            # The reader, such as `head`, has closed the pipe. Python would report that again at exit.
            call.cancel()
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)


def _end(call: Any) -> None:
    """Waits for the end of a call with a complete response, which the server would count as cancelled."""
    with contextlib.suppress(grpc.FutureTimeoutError, grpc.RpcError):
        call.result(_END_S)
    call.cancel()


def _describe_request(span: trace.Span, request: inference_pb2.GenerateRequest) -> None:
    span.set_attribute(semconv.GEN_AI_OPERATION_NAME, semconv.OPERATION_TEXT_COMPLETION)
    span.set_attribute(semconv.GEN_AI_PROVIDER_NAME, semconv.PROVIDER)
    span.set_attribute(semconv.GEN_AI_REQUEST_STREAM, value=True)
    if request.model:
        span.set_attribute(semconv.GEN_AI_REQUEST_MODEL, request.model)
    for field, value in request.sampling.ListFields():
        span.set_attribute(semconv.SAMPLING_ATTRIBUTES[field.name], _attribute_value(value))


def _attribute_value(value: Any) -> Any:
    """Attributes support lists of texts and signed 64-bit integers; a seed may be larger."""
    if isinstance(value, Mapping):
        return [f"{key}:{number:g}" for key, number in value.items()]
    if isinstance(value, int | float | str):
        return str(value) if isinstance(value, int) and value >= 2**63 else value
    return list(value)


def _describe_result(span: trace.Span, result: Timing) -> None:
    span.set_attribute(semconv.GEN_AI_USAGE_INPUT_TOKENS, result.prompt_tokens)
    span.set_attribute(semconv.GEN_AI_USAGE_OUTPUT_TOKENS, result.completion_tokens)
    span.set_attribute(semconv.GEN_AI_RESPONSE_FINISH_REASONS, [result.finish_reason])
    if result.first_s is not None:
        span.set_attribute(semconv.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK, result.first_s)

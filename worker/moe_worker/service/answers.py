"""Converts results and errors of the engine to messages and statuses of the RPCs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import grpc
from google.rpc import status_pb2

from moe_api import rich_status
from moe_api.inference.v1 import inference_pb2
from moe_api.rich_status import FieldViolation
from moe_worker.engine.requests import FinishReason
from moe_worker.errors import EngineDiedError, QueueFullError, RequestError, WorkerError
from moe_worker.sampling.logprobs import TokenLogprobs
from moe_worker.sampling.parameters import Violation
from moe_worker.service.streams import TextChunk

# Loading takes seconds to minutes, and a drained worker does not return: a frontend tries another one.
RETRY_ELSEWHERE_S: Final = 1.0
FINISH_REASONS: Final = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
FAILURES: Final[Mapping[FinishReason | None, tuple[grpc.StatusCode, str]]] = {
    FinishReason.DEADLINE: (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "the deadline of the call passed; allow more time, or ask for fewer tokens",
    ),
    FinishReason.FORMAT: (
        grpc.StatusCode.INVALID_ARGUMENT,
        "output_format is too complex to go on with this text; simplify it",
    ),
    FinishReason.FAILED: (
        grpc.StatusCode.INTERNAL,
        "the model gave no valid probabilities for the next token; check its weights (serve --check-weights)",
    ),
}


def unavailable(sentence: str, reason: str = "") -> status_pb2.Status:
    """UNAVAILABLE: another worker may succeed. reason: one of `rich_status`, for programs."""
    return rich_status.retry_later(grpc.StatusCode.UNAVAILABLE, sentence, RETRY_ELSEWHERE_S, reason)


def of_error(error: WorkerError) -> status_pb2.Status:
    """The status of a call that an error of the engine, or on the way to it, has stopped."""
    if isinstance(error, QueueFullError):
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        return rich_status.retry_later(code, str(error), error.retry_after_s)
    if isinstance(error, RequestError):
        return rich_status.invalid_argument([FieldViolation(error.field, str(error))])
    return unavailable(str(error), rich_status.ENGINE_DIED if isinstance(error, EngineDiedError) else "")


def of_violations(violations: Sequence[Violation]) -> status_pb2.Status:
    """INVALID_ARGUMENT with the fields that are wrong."""
    return rich_status.invalid_argument([_violation(it) for it in violations])


def _violation(violation: Violation) -> FieldViolation:
    reason = rich_status.CONTEXT_LENGTH_EXCEEDED if violation.too_long else ""
    return FieldViolation(violation.field, violation.description, reason)


def of_chunk(
    chunk: TextChunk, usage: inference_pb2.Usage | None, piece: Callable[[int], bytes]
) -> inference_pb2.GenerateResponse:
    """The next message of a stream.

    usage: of the last message. piece: the bytes that a token stands for.
    """
    response = inference_pb2.GenerateResponse(text=chunk.text, tokens=chunk.tokens)
    # Without logprobs where the client asked for none.
    for token, logprobs in zip(chunk.tokens, chunk.logprobs, strict=False):
        response.logprobs.append(_logprobs(token, logprobs, piece))
    if chunk.finish_reason is not None:
        response.finish_reason = FINISH_REASONS[chunk.finish_reason]
    if usage is not None:
        response.usage.CopyFrom(usage)
    return response


class PromptTokens:
    """The tokens of a prompt with their log-probabilities, in the order in which these come.

    Args:
        prompt: all tokens.
        piece: the bytes that a token stands for.
    """

    def __init__(self, prompt: Sequence[int], piece: Callable[[int], bytes]) -> None:
        self._left = iter(prompt)
        self._piece = piece
        self._begun = False

    def take(self, scores: Iterable[TokenLogprobs]) -> Iterator[inference_pb2.PromptToken]:
        """The next tokens: as many as there are scores; before all others the first one, which has none."""
        if not self._begun:
            self._begun = True
            token = next(self._left)
            yield inference_pb2.PromptToken(token=token, piece=self._piece(token))
        for score in scores:
            token = next(self._left)
            yield inference_pb2.PromptToken(
                token=token, piece=self._piece(token), logprob=score.logprob, top=_top(score, self._piece)
            )


def _logprobs(
    token: int, logprobs: TokenLogprobs, piece: Callable[[int], bytes]
) -> inference_pb2.TokenLogprobs:
    return inference_pb2.TokenLogprobs(
        logprob=logprobs.logprob, top=_top(logprobs, piece), piece=piece(token)
    )


def _top(logprobs: TokenLogprobs, piece: Callable[[int], bytes]) -> Iterator[inference_pb2.TopLogprob]:
    for likely, value in logprobs.top:
        yield inference_pb2.TopLogprob(token=likely, logprob=value, piece=piece(likely))

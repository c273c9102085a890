"""Refuses requests that are too large to be valid, before they wait for a replica or are sent to one. Pure.

Only lengths are read, never elements: a check takes microseconds for any request. Workers check the rest, and
say the same of the same field.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import Message

from moe_api import lengths
from moe_api.inference.v1 import inference_pb2
from moe_api.rich_status import CONTEXT_LENGTH_EXCEEDED, FieldViolation

# As inference.proto states them.
STOP_MOST: Final = 16
STOP_TOKENS_MOST: Final = 64
BIASES_MOST: Final = 1024
_TEXTS: Final = ("prompt", "prompt_tokens", "text")
"""Fields of which only the length is checked here."""

_Lengths = Iterator[tuple[str, str | None]]


@dataclass(frozen=True)
class Limits:
    """What the served model takes; 0: not known.

    context_length: tokens of prompt and text together. characters_per_token: of the longest one.
    """

    context_length: int = 0
    characters_per_token: int = 0


def violations(request: Message, limits: Limits) -> list[FieldViolation]:
    """The fields that are too long. request: of any method."""
    return [
        FieldViolation(field, wrong, CONTEXT_LENGTH_EXCEEDED if field in _TEXTS else "")
        for field, wrong in _checked(request, limits)
        if wrong is not None
    ]


def _checked(request: Message, limits: Limits) -> _Lengths:
    """(field, what is wrong with its length)."""
    match request:
        case inference_pb2.GenerateRequest():
            yield "model", lengths.of_name(len(request.model))
            yield from _of_prompt(request, limits)
            yield from _of_lists(request)
            yield from _of_resume(request, limits)
            yield from lengths.of_output_format(request.output_format)
        case inference_pb2.TokenizeRequest():
            yield "model", lengths.of_name(len(request.model))
            yield "text", _of_text(request.text, limits.context_length, limits)
        case inference_pb2.GetModelRequest():
            yield "model", lengths.of_name(len(request.model))


def _of_prompt(request: inference_pb2.GenerateRequest, limits: Limits) -> _Lengths:
    if not limits.context_length:
        return
    if request.WhichOneof("input") != "prompt_tokens":
        yield "prompt", _of_text(request.prompt, limits.context_length - 1, limits)
        return
    yield "prompt_tokens", lengths.of_prompt_tokens(len(request.prompt_tokens.ids), limits.context_length)


def _of_text(text: str, tokens: int, limits: Limits) -> str | None:
    known = limits.context_length and limits.characters_per_token
    return lengths.of_text(len(text), tokens, limits.characters_per_token) if known else None


def _of_lists(request: inference_pb2.GenerateRequest) -> _Lengths:
    sampling = request.sampling
    yield "sampling.stop", lengths.of_list(len(sampling.stop), STOP_MOST, "texts")
    yield (
        "sampling.stop_token_ids",
        lengths.of_list(len(sampling.stop_token_ids), STOP_TOKENS_MOST, "token ids"),
    )
    yield "sampling.logit_bias", lengths.of_list(len(sampling.logit_bias), BIASES_MOST, "token ids")


def _of_resume(request: inference_pb2.GenerateRequest, limits: Limits) -> _Lengths:
    resumed, most = len(request.resume.tokens), limits.context_length - 1
    yield "resume.revision", lengths.of_name(len(request.resume.revision))
    if request.sampling.HasField("max_tokens") and resumed:
        of_text = max(request.sampling.max_tokens, 1) - 1
        most = min(most, of_text) if limits.context_length else of_text
    elif not limits.context_length:
        return
    yield "resume.tokens", lengths.of_list(resumed, most, "tokens")

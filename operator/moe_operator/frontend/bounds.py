"""Refuses requests that are too large to be valid, before they wait for a replica or are sent to one. Pure.

Only lengths are read, never elements: a check takes microseconds for any request. Workers check the rest.
"""

from collections.abc import Iterator
from typing import Final

from google.protobuf.message import Message

from moe_api.inference.v1 import inference_pb2
from moe_api.rich_status import FieldViolation

# As inference.proto states them.
STOP_MOST: Final = 16
STOP_TOKENS_MOST: Final = 64
BIASES_MOST: Final = 1024
_REVISION_MOST: Final = 253


def violations(request: Message, context_length: int) -> list[FieldViolation]:
    """The fields that are too long.

    Args:
        request: of any method; only Generate has fields with bounds.
        context_length: tokens of prompt and text together, of the model that is served; 0: not known.
    """
    if not isinstance(request, inference_pb2.GenerateRequest):
        return []
    return [
        FieldViolation(field, f"holds {length} {elements}; use {most} at most")
        for field, length, elements, most in _lengths(request, context_length)
        if length > most
    ]


def _lengths(
    request: inference_pb2.GenerateRequest, context_length: int
) -> Iterator[tuple[str, int, str, int]]:
    """(field, length, what it is of, the most that is valid)."""
    sampling, resumed = request.sampling, len(request.resume.tokens)
    yield "sampling.stop", len(sampling.stop), "texts", STOP_MOST
    yield "sampling.stop_token_ids", len(sampling.stop_token_ids), "tokens", STOP_TOKENS_MOST
    yield "sampling.logit_bias", len(sampling.logit_bias), "token ids", BIASES_MOST
    yield "resume.revision", len(request.resume.revision), "characters", _REVISION_MOST
    if sampling.HasField("max_tokens") and resumed:
        yield "resume.tokens", resumed, "tokens", max(sampling.max_tokens, 1) - 1
    if context_length:
        yield "prompt_tokens", len(request.prompt_tokens.ids), "tokens", context_length
        yield "resume.tokens", resumed, "tokens", context_length

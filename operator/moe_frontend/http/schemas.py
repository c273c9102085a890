"""What clients send, as OpenAI's API and its usual extensions name it. Pure.

Fields that are not named here are refused: a client that misspells one should not get another answer than
it asked for. docs/openai-api.md lists them.
"""

from typing import Annotated, Any, Final

import msgspec

CHOICES_MOST: Final = 128
"""Texts of one request: prompts times `n`."""

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
_Choices = Annotated[int, msgspec.Meta(ge=1, le=CHOICES_MOST)]
_Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a stream is sent. include_obfuscation: accepted, and nothing is added."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all requests for text have in common; None: the default, as where a field is missing."""

    model: str | None = None
    max_tokens: _Positive | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: _Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[TokenId, _Bias] | None = None
    seed: _Seed | None = None
    # Extensions that other servers of open models have under the same names.
    top_k: _Count | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    min_tokens: _Count | None = None
    # Accepted without effect: they name who asks, or where OpenAI computes.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None


class CompletionRequest(Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/completions``."""

    prompt: str | list[str | TokenId | list[TokenId]] | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: _Choices | None = None
    suffix: str | None = None

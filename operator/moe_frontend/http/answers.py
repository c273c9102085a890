"""Answers as OpenAI's API gives them. Pure."""

from collections.abc import Iterable
from typing import Any, Final, Literal

import msgspec

from moe_api.inference.v1 import inference_pb2

FINISH_REASONS: Final = {
    inference_pb2.FINISH_REASON_UNSPECIFIED: None,
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}
_ENCODER: Final = msgspec.json.Encoder()


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """cached_tokens: of the prompt, those that a worker's prefix cache held."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request: of each prompt once, of all texts.

    cached: true where all texts come from the frontend's output cache; else it is not there.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    cached: bool | msgspec.UnsetType = msgspec.UNSET


class Logprobs(msgspec.Struct, frozen=True):
    """What the model thought of the tokens of a completion; one entry for each token.

    None: of the first token of a prompt, for which it has no probabilities.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """A text, or a piece of it."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A completion, or a chunk of a stream: both have this shape."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is served. max_model_len: tokens of prompt and text together, as vLLM names it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True):
    """All models that are served."""

    data: list[Model]
    object: str = "list"


def encode(answer: Any) -> bytes:
    """The JSON of an answer."""
    return _ENCODER.encode(answer)


def total(usages: Iterable[inference_pb2.Usage], n: int) -> Usage:
    """The usage of a request of which each prompt gave `n` texts, in the order of the texts."""
    prompt = cached = completion = 0
    stored = True
    for index, usage in enumerate(usages):
        stored &= usage.cached
        completion += usage.completion_tokens
        if index % n == 0:
            prompt += usage.prompt_tokens
            cached += usage.cached_tokens
    details = PromptTokensDetails(cached)
    return Usage(prompt, completion, prompt + completion, details, stored or msgspec.UNSET)


class AnsweredFunction(msgspec.Struct, frozen=True):
    """arguments: JSON, as the model wrote it."""

    name: str
    arguments: str


class AnsweredToolCall(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A call that the client should make. index: in streams."""

    index: int | msgspec.UnsetType = msgspec.UNSET
    id: str
    type: str
    function: AnsweredFunction


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """What the assistant said. refusal: OpenAI's description requires it; no model here has one."""

    role: str
    content: str | None
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[AnsweredToolCall] | msgspec.UnsetType = msgspec.UNSET


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is new of it."""

    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[AnsweredToolCall] | msgspec.UnsetType = msgspec.UNSET


class LikelyToken(msgspec.Struct, frozen=True):
    """A token and its log-probability. bytes: of UTF-8, which need not be whole characters."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(LikelyToken, frozen=True):
    """The token that was chosen, and the likeliest ones."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Of the tokens of a message, reasoning and tool calls included."""

    content: list[ChosenToken]
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A message."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a message."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class Chat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A chunk of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None

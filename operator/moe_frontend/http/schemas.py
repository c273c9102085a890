"""What clients send, as OpenAI's API and its usual extensions name it. Pure.

Fields that are not named here are refused: a client that misspells one should not get another answer than
it asked for. docs/openai-api.md lists them. Nothing is built of values that are ignored or refused: objects
take 20 times the memory of their JSON.
"""

from typing import Annotated, Any, Final, Literal

import msgspec

CHOICES_MOST: Final = 128
"""Texts of one request: prompts times `n`."""

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
_TopK = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
_Choices = Annotated[int, msgspec.Meta(ge=1, le=CHOICES_MOST)]
_Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]
# Its defaults are made by factories: those are no part of the OpenAPI description, which has no raw JSON.
_Ignored = msgspec.Raw


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a stream is sent. include_obfuscation: accepted, and nothing is added."""

    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchemaFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """schema: passed on as it is. strict: true or not, the text satisfies the schema."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    schema: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"{}"))
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


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
    response_format: ResponseFormat | None = None
    # Extensions that other servers of open models have under the same names.
    top_k: _TopK | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    min_tokens: _Count | None = None
    priority: Annotated[int, msgspec.Meta(ge=0, le=9)] | None = None
    # Accepted without effect: they name who asks, or where OpenAI computes.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: _Ignored = msgspec.field(default_factory=msgspec.Raw)
    store: bool | None = None
    service_tier: str | None = None


class CompletionRequest(Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/completions``."""

    prompt: str | list[str | TokenId | list[TokenId]] | None = None
    max_tokens: _Count | None = None  # 0 with echo: the prompt alone
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: _Choices | None = None
    suffix: str | None = None


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a message's content; models here read text alone."""

    type: Literal["text"]
    text: str


class FunctionCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """arguments: JSON, as the model wrote it."""

    name: str
    arguments: str


class MessageToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call that an assistant made. index: as chunks of a stream have it; without meaning in a request."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: _Ignored = msgspec.field(default_factory=msgspec.Raw)


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # As answers have them; without meaning in a request.
    refusal: str | None = None
    annotations: _Ignored = msgspec.field(default_factory=msgspec.Raw)


class FunctionDefinition(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """parameters: a JSON Schema. Fields that are null are left out, as clients mean it."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The name of one of the tools."""

    name: str


class ToolChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that the model must call."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/chat/completions``."""

    messages: list[Message] | None = None
    max_completion_tokens: _Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], msgspec.Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, msgspec.Meta(max_length=32)] | None = None
    chat_template_kwargs: dict[str, bool | str] | None = None
    # Refused unless they are null: no model here has them.
    modalities: None = None
    audio: None = None
    prediction: None = None
    functions: None = None
    function_call: None = None
    web_search_options: None = None
    verbosity: None = None

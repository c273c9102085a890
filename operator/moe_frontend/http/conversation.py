"""What a chat request asks for: variables of the template, and parameters of the texts. Pure."""

from dataclasses import dataclass
from typing import Any, Final

import msgspec

from moe_frontend.chat.environment import VARIABLES
from moe_frontend.chat.parsing import ToolFormat, thinks, tool_format
from moe_frontend.discovery.endpoints import Served
from moe_frontend.http.bodies import check_depth
from moe_frontend.http.errors import ApiError, invalid
from moe_frontend.http.schemas import (
    ChatRequest,
    FunctionDefinition,
    Message,
    MessageToolCall,
    TextPart,
    ToolChoice,
)

_TEXT_MOST: Final = 64


@dataclass(frozen=True)
class Conversation:
    """A conversation to be rendered.

    Attributes:
        template: in Jinja.
        variables: what it may name.
        thinks: whether the model reasons before it answers.
        tools: how it writes calls of the tools that it was given; None: it was given none.
        forced: functions of which it must call one or more, and do nothing else; none: it may answer as it
            likes.
    """

    template: str
    variables: dict[str, Any]
    thinks: bool
    tools: ToolFormat | None
    forced: tuple[FunctionDefinition, ...] = ()


def conversation(request: ChatRequest, served: Served) -> Conversation:
    """The conversation of a request.

    Raises:
        ApiError: the request is not valid, as far as that can be told here, or the model has no template.
    """
    _check_format(request)
    if not request.messages:
        raise invalid("messages", "is missing or empty; give at least one message")
    if not served.template:
        raise ApiError(
            400,
            f"model {served.name!r} has no chat template; use /v1/completions (`moe generate`), or serve a "
            "chat model",
            param="model",
        )
    tools = _tools(request)
    variables: dict[str, Any] = {
        **dict(served.special_tokens),
        **_arguments(request),
        "messages": [_message(message) for message in request.messages],
        "tools": tools or None,
        "documents": None,
        "add_generation_prompt": True,
    }
    return Conversation(
        served.template,
        variables,
        thinks(served.template),
        _format(served.template) if tools else None,
        _forced(request),
    )


def most_tokens(request: ChatRequest, served: Served) -> int:
    """Tokens to generate at most; without a bound of the request as many as the context has room for."""
    if request.max_completion_tokens is not None:
        return request.max_completion_tokens
    return request.max_tokens if request.max_tokens is not None else max(served.context_length, 1)


def top_logprobs(request: ChatRequest) -> int | None:
    """Likely tokens to send with each token; None: no log-probabilities.

    Raises:
        ApiError: top_logprobs without logprobs.
    """
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs is not None:
        raise invalid("top_logprobs", "needs logprobs; set logprobs to true, or leave it out")
    return None


def _check_format(request: ChatRequest) -> None:
    if request.tools and request.tool_choice != "none" and _formatted(request):
        raise invalid("response_format", "excludes tools, whose calls have their own format; leave one out")
    if request.parallel_tool_calls is False and request.tools and request.tool_choice in (None, "auto"):
        problem = "can be false only where tool_choice forces a call: otherwise the model decides"
        raise invalid("parallel_tool_calls", f"{problem}; leave it out")


def _formatted(request: ChatRequest) -> bool:
    return request.response_format is not None and request.response_format.type != "text"


def _tools(request: ChatRequest) -> list[Any]:
    """The tools, as the template gets them."""
    if not request.tools or request.tool_choice == "none":
        return []
    tools = msgspec.to_builtins(request.tools)
    check_depth("tools", tools)
    return list(tools)


def _forced(request: ChatRequest) -> tuple[FunctionDefinition, ...]:
    """The functions of which one must be called."""
    if request.tool_choice in (None, "auto", "none"):
        return ()
    functions = tuple(tool.function for tool in request.tools or ())
    if isinstance(request.tool_choice, ToolChoice):
        name = request.tool_choice.function.name
        functions = tuple(function for function in functions if function.name == name)
        if not functions:
            raise invalid(
                "tool_choice", f"names {name[:_TEXT_MOST]!r}, which is not among tools; add it there"
            )
    if not functions:
        raise invalid("tool_choice", "forces a call, and there are no tools; add some, or leave it out")
    return functions


def _format(template: str) -> ToolFormat:
    found = tool_format(template)
    if found is None:
        raise invalid("tools", "are not supported: how this model writes calls is not known; leave them out")
    return found


def _arguments(request: ChatRequest) -> dict[str, bool | str]:
    """Variables that the request may set, and no others: templates see all of them."""
    given = request.chat_template_kwargs or {}
    for name, value in given.items():
        if name not in VARIABLES:
            raise invalid(
                f"chat_template_kwargs.{name[:_TEXT_MOST]}",
                f"is not allowed; use {', '.join(sorted(VARIABLES))}",
            )
        if isinstance(value, str) and len(value) > _TEXT_MOST:
            raise invalid(f"chat_template_kwargs.{name}", f"is longer than {_TEXT_MOST} characters")
    effort = {} if request.reasoning_effort is None else {"reasoning_effort": request.reasoning_effort}
    return {**effort, **given}


def _message(message: Message) -> dict[str, Any]:
    """As templates expect it: fields that are not set are not there, and content is one text.

    Content that is null stays where there are tool calls: templates of DeepSeek ask for it.
    """
    fields: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    fields["content"] = _content(message.content)
    if fields["content"] is None and not message.tool_calls:
        fields["content"] = ""
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            fields[name] = value
    if message.tool_calls:
        fields["tool_calls"] = [_call(call) for call in message.tool_calls]
    return fields


def _call(call: MessageToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": call.type, "function": msgspec.to_builtins(call.function)}


def _content(content: str | list[TextPart] | None) -> str | None:
    return "\n".join(part.text for part in content) if isinstance(content, list) else content
